//! Images as they are sent whole: what both sides say and count of one.
//!
//! * `parts`: the frames' payloads.
//! * `ledger`: what was said of one image so far. Both sides keep one, and compare.
//! * `sender`, `receiver`: the two ends of a connection.

mod ledger;
mod parts;
mod receiver;
mod sender;

#[cfg(test)]
pub(super) mod tests;

pub(super) use parts::{IMAGE_BEGIN_LEN, IMAGE_END_LEN, IMAGE_STORED_LEN, raw};
pub use parts::{ImageBegin, ImageCounts, ImageEnd, ImageId, ImageStored, ImageTotals, MAX_CHUNK};
pub use receiver::{ImageLimits, ImageReceiverSession};
pub use sender::ImageSenderSession;
