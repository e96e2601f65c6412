//! Checkpoints of the memory of a running process, in rounds, as chains of images.
//!
//! As CRIU's pre-dump does it: the first image has everything, and is made while the process runs
//! and its writes are tracked. Each following round stops the process, asks what was written,
//! lets it go on, and makes an image of just that, until so little is left that the last round can be
//! made while the process stands still. The chain of images is then the memory of that moment,
//! page for page; every image before it is a mixture of moments, and good only as its parent.
//!
//! What is kept: private memory, heap and stacks, shared memory without a file of its own (memfd,
//! System V, `/dev/zero`), and changed pages of private mappings of files; for everything else
//! the mapping and its name. What lies in a file that stays where it is is not copied. Registers,
//! file descriptors and the rest of a process are CRIU's subject.
//!
//! Writes are noticed in this process's own mappings. Shared memory that *other* processes write,
//! or that is written by write(2), changes unnoticed: say [`Options::retake_shared`] then.
#![forbid(unsafe_code)]

mod contents;
mod destination;
mod error;
mod populated;
mod ranges;
mod remote;
mod rounds;

pub use destination::{
    Destination, DestinationError, Directory, DirectoryError, Head, InProgress, Stored,
};
pub use error::{CheckpointError, Why};
pub use remote::{Receiving, Remote, SendingError};
pub use rounds::{Event, Options, Report, Round, checkpoint};
