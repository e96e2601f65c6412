//! Images over the network: one side makes them, the other stores them, each as it is made.
//!
//! * `sender`, `unsent`, `answers`: [`ImageSender`], what it collects before it sends, and the
//!   thread that hears what the receiver says.
//! * `receiver`: [`ImageReceiver`], which takes one sender after the other.
//! * `session`, `queue`, `store`: one sender. A thread receives into buffers, and the caller's
//!   thread hands them to the sink, so that a slow disk does not silence the connection.

mod answers;
mod queue;
mod receiver;
mod sender;
mod session;
mod sink;
mod store;
mod unsent;

use std::{fmt, sync::Arc};

pub use self::{
    receiver::{ImageReceiver, ReceiverOptions},
    sender::{ImageSender, SenderOptions},
    sink::{ImageInProgress, ImageSink, ReceiveEvent, ReceivedImages, SinkFailure},
};
use crate::{
    MigrateError,
    core::{ImageBegin, ImageId},
};

/// What is known of an image before its first page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageDescription {
    /// Its identity.
    pub id: ImageId,
    /// The image that knows what this one does not say.
    pub parent: Option<ImageId>,
    /// Bytes of a page, the unit of everything said about the image: a power of two from 4 KiB
    /// on.
    pub page_size: u64,
    /// What its maker says about it, in the maker's own format.
    pub metadata: Vec<u8>,
    /// The table of mappings, in the maker's own format.
    pub mappings: Vec<u8>,
}

impl ImageDescription {
    fn begin(&self) -> Result<ImageBegin, MigrateError> {
        let length = |bytes: &[u8]| {
            u32::try_from(bytes.len())
                .map_err(|_| MigrateError::Misuse("a description of 4 GiB and more"))
        };
        Ok(ImageBegin {
            id: self.id,
            parent: self.parent,
            page_size: self.page_size,
            metadata_len: length(&self.metadata)?,
            mappings_len: length(&self.mappings)?,
        })
    }
}

/// Why images could not be sent or received, and what is left of them. What was begun has been
/// dropped, or is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImageStreamError {
    /// The image begun.
    pub image: Option<ImageId>,
    /// Sender: all of the image was sent, but the receiver has not said whether it is stored.
    pub in_doubt: bool,
    /// The last image that is stored, and known to be. It, and its ancestors, stay.
    pub last_stored: Option<ImageId>,
    /// What went wrong.
    pub error: Arc<MigrateError>,
}

impl fmt::Display for ImageStreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.image {
            Some(id) if self.in_doubt => {
                write!(f, "image {id} was sent, whether it is stored is not known: ")?;
            }
            Some(id) => write!(f, "image {id} is not complete: ")?,
            None => {}
        }
        write!(f, "{}; ", self.error)?;
        match self.last_stored {
            Some(id) => write!(f, "the last complete image is {id}"),
            None => f.write_str("no image was completed"),
        }
    }
}

impl std::error::Error for ImageStreamError {
    // What `error` says is part of what this says.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}
