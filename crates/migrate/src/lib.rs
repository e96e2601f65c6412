//! The page-transfer protocol of Pageferry: how memory comes from a peer, page by page.
//!
//! * [`core`]: the protocol without I/O. The bytes are drawn in `docs/protocol.md`.
//! * [`PeerSource`]: the destination's end, a [`PageSource`](pageferry_paging::PageSource).
//! * [`PageServer`]: the source's end, which serves any [`PageStore`] to any number of clients.
//! * [`PeerReader`]: reads a peer's memory without taking it over.
//! * [`SourceMigration`], [`DestinationMigration`]: whole running guests, from one side to the
//!   other: pre-copy, post-copy, or one after the other.
//! * [`ImageSender`], [`ImageReceiver`]: whole images, each as it is made, from one side to the
//!   other.

#![deny(unsafe_code)]

pub mod core;
pub mod fuzz;

mod endpoint;
mod error;
mod guest;
mod images;
mod net;
mod peer;
mod reader;
mod server;
mod store;

pub use endpoint::{Endpoint, EndpointError};
pub use error::MigrateError;
pub use guest::{
    Compression, DestinationCounts, DestinationGuest, DestinationMigration, DestinationStatus,
    DeviceState, DirtySink, Event, GuestError, MigrateOptions, Mode, Observer, OnNoConvergence,
    Outcome, ReceiveOptions, RoundReport, SourceCounts, SourceGuest, SourceMigration, SourceStatus,
    Stage, Via,
};
pub use images::{
    ImageDescription, ImageInProgress, ImageReceiver, ImageSender, ImageSink, ImageStreamError,
    ReceiveEvent, ReceivedImages, ReceiverOptions, SenderOptions, SinkFailure,
};
pub use net::{Piece, Stop};
pub use peer::{PeerOptions, PeerSource};
pub use reader::PeerReader;
pub use server::{
    PageServer, ServerObserver, ServerOptions, ServerStats, SessionInfo, SessionOutcome,
};
pub use store::{ImageStore, MemoryStore, PageKind, PageStore, Placement};
