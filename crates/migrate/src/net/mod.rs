//! Sockets: connected streams, listeners, and frames read from them.

mod listener;
mod piece;
mod reader;
mod stream;

pub(crate) use listener::Listener;
pub use piece::Piece;
pub(crate) use reader::FrameReader;
pub(crate) use stream::{Stream, Timeouts};
