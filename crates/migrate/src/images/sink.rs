//! What an embedder implements to store images, and what it is told.

use super::{ImageDescription, ImageStreamError};
use crate::{
    MigrateError,
    core::{ImageCounts, ImageId},
};

/// Why an image cannot be stored. Its text is sent to the sender.
pub type SinkFailure = Box<dyn std::error::Error + Send + Sync>;

/// Stores images as they come. All calls come from the thread that serves.
pub trait ImageSink {
    /// An image begins. Whether its parent is known is the sink's to check.
    ///
    /// # Errors
    /// Why it cannot be stored. The session ends then, as it does after every other failure of a
    /// sink.
    fn begin(
        &mut self,
        image: &ImageDescription,
    ) -> Result<Box<dyn ImageInProgress + '_>, SinkFailure>;
}

/// An image that is being stored. Pages come by ascending address, each at most once. Dropped
/// unfinished, as after a failure of its own, it must leave nothing behind that could be taken for
/// an image.
pub trait ImageInProgress {
    /// The bytes of pages from `address` on: a whole number of pages, all within the address
    /// space.
    ///
    /// # Errors
    /// Why they cannot be stored.
    fn pages(&mut self, address: u64, bytes: &[u8]) -> Result<(), SinkFailure>;

    /// `count` pages from `address` on are all zero.
    ///
    /// # Errors
    /// Why that cannot be stored.
    fn zero(&mut self, address: u64, count: u64) -> Result<(), SinkFailure>;

    /// `count` pages from `address` on could not be read where they were.
    ///
    /// # Errors
    /// Why that cannot be stored.
    fn poisoned(&mut self, address: u64, count: u64) -> Result<(), SinkFailure>;

    /// `count` pages from `address` on are no longer memory, whatever the image's ancestors say.
    ///
    /// # Errors
    /// Why that cannot be stored.
    fn gone(&mut self, address: u64, count: u64) -> Result<(), SinkFailure>;

    /// All has come, unaltered. Returns, once the image is stored for good (it is to survive a
    /// crash of the host), how many pages it has: the sender is told, and compares.
    ///
    /// # Errors
    /// Why it cannot be stored.
    fn finish(self: Box<Self>) -> Result<ImageCounts, SinkFailure>;

    /// The image will not be completed. The same as to drop it, unless the sink wants to know
    /// why.
    fn abort(self: Box<Self>, _why: &str) {}
}

/// What a receiver tells of, on the thread that serves: be quick.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReceiveEvent<'a> {
    /// A sender has connected, and shaken hands.
    Connected {
        /// Where it comes from.
        peer: &'a str,
    },
    /// Somebody who connected was turned away.
    TurnedAway {
        /// Where it came from.
        peer: &'a str,
        /// Why.
        why: &'a MigrateError,
    },
    /// An image has begun.
    Begun {
        /// Which.
        image: &'a ImageDescription,
    },
    /// Some of it has been handed to the sink.
    Progress {
        /// Which.
        image: ImageId,
        /// How much so far.
        counts: ImageCounts,
    },
    /// An image is stored for good.
    Stored {
        /// Which.
        image: ImageId,
        /// How many pages it has.
        counts: ImageCounts,
    },
    /// The image begun is dropped.
    Dropped {
        /// Which.
        image: ImageId,
        /// Why.
        why: &'a str,
    },
    /// The sender has gone.
    Ended {
        /// How.
        outcome: &'a Result<ReceivedImages, ImageStreamError>,
    },
}

/// What came of a sender that went on purpose.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ReceivedImages {
    /// Images stored.
    pub stored: u64,
    /// Images that the sender began and gave up.
    pub aborted: u64,
    /// The last one stored.
    pub last: Option<ImageId>,
    /// Both sides agreed on these numbers. If not, the sender just said goodbye.
    pub completed: bool,
}
