//! The kinds of frame, and the phases in which they come.

use std::fmt;

/// The kinds of frame, by the number they have on the wire.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Versions, role, features, session and channel: the first frame each way.
    Hello = 1,
    /// What the source holds.
    Regions = 2,
    /// A span is wanted.
    Request = 3,
    /// A span asked for in the background is now waited for.
    Expedite = 4,
    /// Bytes of a span.
    Data = 5,
    /// A span is all zero.
    Zero = 6,
    /// A span can never come.
    Poison = 7,
    /// The destination has everything; its counts.
    Complete = 8,
    /// The source agrees; its counts.
    CompleteAck = 9,
    /// The sender gives up, and says why.
    Error = 10,
    /// The sender leaves on purpose.
    Bye = 11,
    /// Are you there?
    Ping = 12,
    /// Yes.
    Pong = 13,
    /// An image begins: its identity, its parent, how much describes it.
    ImageBegin = 14,
    /// A part of what the sender's user says about the image.
    ImageMetadata = 15,
    /// A part of the table of mappings.
    ImageMappings = 16,
    /// Pages that are no longer memory.
    Gone = 17,
    /// The image ends: its counts and its digest.
    ImageEnd = 18,
    /// The image begun is given up.
    ImageAbort = 19,
    /// The image is stored for good; its counts.
    ImageStored = 20,
    /// The destination has room for the guest; its granules.
    Accept = 21,
    /// A round of pre-copy begins.
    RoundBegin = 22,
    /// A round's pages have all been sent on this connection; how many so far.
    RoundEnd = 23,
    /// A round's pages have all come; how many so far.
    RoundAck = 24,
    /// Bytes of a span, compressed or as a difference.
    Packed = 25,
    /// What the device state is: name, version, length, digest.
    StateBegin = 26,
    /// A part of the device state.
    State = 27,
    /// What the destination does not have of a region.
    Missing = 28,
    /// The guest is stopped, and everything needed to run it has been said.
    Switch = 29,
    /// The destination could run the guest now, and will not before it is told to.
    Ready = 30,
    /// The guest is the destination's.
    Run = 31,
    /// The guest runs at the destination.
    Running = 32,
    /// The migration is given up; the guest stays with the source.
    Cancel = 33,
    /// The destination has dropped the guest.
    Cancelled = 34,
    /// The source is back after a loss, and says what it believes.
    Resume = 35,
    /// The guest never ran at the destination, and never will.
    Dropped = 36,
    /// What the destination has of a region.
    Have = 37,
    /// How much the destination has in all.
    HaveEnd = 38,
}

impl Kind {
    /// Every kind, in wire order.
    pub const ALL: [Self; 38] = [
        Self::Hello,
        Self::Regions,
        Self::Request,
        Self::Expedite,
        Self::Data,
        Self::Zero,
        Self::Poison,
        Self::Complete,
        Self::CompleteAck,
        Self::Error,
        Self::Bye,
        Self::Ping,
        Self::Pong,
        Self::ImageBegin,
        Self::ImageMetadata,
        Self::ImageMappings,
        Self::Gone,
        Self::ImageEnd,
        Self::ImageAbort,
        Self::ImageStored,
        Self::Accept,
        Self::RoundBegin,
        Self::RoundEnd,
        Self::RoundAck,
        Self::Packed,
        Self::StateBegin,
        Self::State,
        Self::Missing,
        Self::Switch,
        Self::Ready,
        Self::Run,
        Self::Running,
        Self::Cancel,
        Self::Cancelled,
        Self::Resume,
        Self::Dropped,
        Self::Have,
        Self::HaveEnd,
    ];

    /// The kind with this number.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where one connection stands, on either side; of a guest's migration, where the session stands.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Phase {
    /// The peer's hello is awaited.
    Greeting,
    /// The source's regions are awaited (destination, demand channel only).
    Listing,
    /// Requests and answers; on the images channel, between two images.
    Active,
    /// An image has begun, and is being described.
    Describing,
    /// Pages of an image have come.
    Filling,
    /// An image has ended, and is being stored.
    Storing,
    /// The side that connected has sent its counts and awaits the other's.
    Completing,
    /// Both sides agreed on the counts.
    Completed,
    /// Nothing may come any more.
    Closed,
    /// Guest, source: the regions have been stated; the destination makes room.
    Offering,
    /// Guest, source: rounds of pre-copy.
    Copying,
    /// Guest, source: the guest is stopped; its state is being sent.
    Stopping,
    /// Guest, source: everything has been said; the destination loads the state.
    Switching,
    /// Guest, source: the destination is ready; to commit or to cancel.
    Deciding,
    /// Guest, source: the guest has been given away; nothing was heard of it yet.
    Committing,
    /// Guest, source: the guest runs at the destination, and its memory is sent.
    Serving,
    /// Guest, source: given up; the destination has not yet said that it dropped the guest.
    Cancelling,
    /// Guest, destination: the regions are known; room is being made.
    Allocating,
    /// Guest, destination: rounds of pre-copy.
    Receiving,
    /// Guest, destination: the guest is stopped; its state is coming.
    Loading,
    /// Guest, destination: everything has been said; pages are still on their way.
    Settling,
    /// Guest, destination: the state is being loaded.
    Restoring,
    /// Guest, destination: it could run the guest, and waits to be told.
    Prepared,
    /// Guest, destination: the guest is its own, and is being started.
    Starting,
    /// Guest, destination: the guest runs, and its memory is still coming.
    Running,
    /// Guest, destination: the source gave up; the guest is being dropped.
    Dropping,
    /// Guest: a new connection after a loss; the peer's hello is awaited.
    Returning,
    /// Guest: hellos have been said again; the source says what it believes.
    Rejoining,
    /// Guest: the destination says what it has.
    Comparing,
}

impl Phase {
    /// Every phase, in the order of their numbers.
    pub const ALL: [Self; 29] = [
        Self::Greeting,
        Self::Listing,
        Self::Active,
        Self::Describing,
        Self::Filling,
        Self::Storing,
        Self::Completing,
        Self::Completed,
        Self::Closed,
        Self::Offering,
        Self::Copying,
        Self::Stopping,
        Self::Switching,
        Self::Deciding,
        Self::Committing,
        Self::Serving,
        Self::Cancelling,
        Self::Allocating,
        Self::Receiving,
        Self::Loading,
        Self::Settling,
        Self::Restoring,
        Self::Prepared,
        Self::Starting,
        Self::Running,
        Self::Dropping,
        Self::Returning,
        Self::Rejoining,
        Self::Comparing,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
