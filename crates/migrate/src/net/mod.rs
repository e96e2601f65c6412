//! Sockets: connected streams, listeners, and frames read from them.

mod listener;
mod piece;
mod reader;
mod stop;
mod stream;
mod wire;

pub(crate) use listener::Listener;
pub use piece::Piece;
pub(crate) use piece::Place;
pub(crate) use reader::FrameReader;
pub use stop::Stop;
pub(crate) use stop::Woken;
pub(crate) use stream::{Stream, Timeouts};
pub(crate) use wire::Wire;
