//! Another process: what tracking and checkpointing its memory need.
//!
//! * [`Process`] holds a process, by a descriptor, so that another one with the same number, or
//!   another program in it, is noticed. [`Process::mappings`] says what is mapped there and what
//!   of it a checkpoint can take, [`Process::read_memory`] reads it.
//! * [`Process::stop`] stops all its threads, by ptrace or by its control group. [`Stopped`] is the
//!   proof that they are; when it is dropped, or this process dies, the other one goes on as it
//!   was.
//! * [`Stopped::syscall`] makes a system call in its name, and [`Stopped::open_userfaultfd`] gets a
//!   userfaultfd of its memory in this way, of which nothing is left in the process.
//!
//! ```no_run
//! use pageferry_process::{Pid, Process, StopMethod, StopOptions, UserfaultfdRequest};
//! use pageferry_uffd::{Features, Userfaultfd};
//!
//! /// A userfaultfd that tracks writes to the memory of another process.
//! fn attach(pid: Pid) -> Result<Userfaultfd, Box<dyn std::error::Error>> {
//!     let process = Process::open(pid)?;
//!     let mut stopped = process.stop_with(StopOptions::default().method(StopMethod::Ptrace))?;
//!     let uffd = stopped.open_userfaultfd(&UserfaultfdRequest::new(Features::WP_ASYNC))?;
//!     let time = stopped.resume()?;
//!     println!("stopped for {time:?}");
//!     Ok(uffd)
//! }
//! ```
//!
//! It is for 64-bit x86, and for 64-bit processes, as far as system calls in their name go.
#![deny(unsafe_code)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("pageferry-process knows the registers of 64-bit x86 only");

mod error;
mod inject;
mod mappings;
mod process;
mod reading;
mod status;
mod stop;
#[allow(unsafe_code)]
mod sys;
mod userfaultfd;

pub use error::{Missing, ProcessError, Seccomp};
pub use mappings::{Detail, Details, Mapping, MappingFlags, MappingName, NotTaken, Permissions};
pub use process::Process;
pub use rustix::process::{Pid, Signal};
pub use stop::{StopMethod, StopOptions, Stopped};
pub use userfaultfd::UserfaultfdRequest;
