//! The protocol without any I/O: bytes to frames and back, and which frame is legal when.
//!
//! Nothing here opens a socket, starts a thread or reads a clock, so that all of it runs under
//! property tests and fuzzing. The bytes are drawn in `docs/protocol.md`.

mod client;
mod decoder;
mod encoder;
mod error;
mod frame;
mod geometry;
mod guest;
mod hello;
mod images;
mod kind;
mod layout;
mod outstanding;
mod parts;
mod queue;
mod server;
mod table;

#[cfg(test)]
mod tests;

pub use client::ClientSession;
pub use decoder::{Decoder, Item};
pub use encoder::Encoder;
pub use error::ProtocolError;
pub use frame::{
    Channel, Counts, DataHeader, FRAME_MAGIC, Frame, HEADER_LEN, MAX_CONTROL, MAX_REGIONS,
    MAX_TEXT, Refusal, RefusalCode, WireSpan,
};
pub use geometry::{Geometry, REGION_IMAGE, REGION_LEN, RegionInfo};
pub use guest::{
    AcceptedRegion, AfterLoss, Belief, Codec, DestinationEvent, DestinationLane,
    DestinationLaneEvent, GuestDestinationSession, GuestLimits, GuestSourceSession, Hold, LaneEnd,
    MAX_RUNS, PackedHeader, Placement, STATE_NAME_LEN, SourceEvent, SourceLane, SourceLaneEvent,
    StateInfo, StateName, UnitRun, UnitSet, guest_destination_next, guest_destination_sends,
    guest_source_next, guest_source_sends,
};
pub use hello::{
    DEFAULT_MAX_PAYLOAD, FEATURES, Features, HELLO_LEN, HELLO_MAGIC, Hello, Lane, MAX_LANES,
    MIN_MAX_PAYLOAD, Role, SessionId, Terms, VERSION_GUESTS, VERSION_IMAGES, VERSION_MAX,
    VERSION_MIN,
};
pub use images::{
    ImageBegin, ImageCounts, ImageEnd, ImageId, ImageLimits, ImageReceiverSession,
    ImageSenderSession, ImageStored, ImageTotals, MAX_CHUNK,
};
pub use kind::{Kind, Phase};
pub use outstanding::Outstanding;
pub use queue::RequestQueue;
pub use server::ServerSession;
pub use table::{client_next, image_receiver_next, image_sender_next, server_next};
