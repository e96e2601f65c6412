//! Demand paging of KVM guests: a guest touches memory that is not there, its vCPU leaves KVM_RUN,
//! and the vCPU's own thread brings the page and enters again.
//!
//! For an embedder that owns its `VmFd`, its `VcpuFd`s and its memory. It calls
//! [`VcpuPager::run`] where it called [`VcpuFd::run`](kvm_ioctls::VcpuFd::run): paging exits are
//! resolved inside, every other exit is returned untouched.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::{VcpuExit, VcpuFd};
//! use pageferry_kvm::{Exit, VcpuDelivery, VmPager, VmPagerOptions, choose, probe};
//! use pageferry_memory::Layout;
//! use pageferry_paging::{PageSource, Pager};
//!
//! # fn example(
//! #     layout: Layout, source: Arc<dyn PageSource>, mut vcpus: Vec<VcpuFd>
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let (delivery, why) = choose(VcpuDelivery::Auto, probe::host(), &Default::default())?;
//! println!("faults are delivered by {delivery}: {why}");
//! let pager = Arc::new(Pager::builder(layout).delivery(delivery).start(source)?);
//! // Memslots show `Region::kvm_view()`.
//! let vm = VmPager::new(pager, VmPagerOptions::default())?;
//! for mut vcpu in vcpus {
//!     let mut pager = vm.vcpu();
//!     std::thread::spawn(move || {
//!         loop {
//!             match pager.run(&mut vcpu) {
//!                 Ok(Exit::Kvm(VcpuExit::Hlt)) => break,
//!                 Ok(Exit::Kvm(exit)) => println!("{exit:?}"),
//!                 Ok(Exit::MemoryError { guest, .. }) => panic!("no memory at {guest:?}"),
//!                 Err(error) if error.is_interrupted() => {} // a kick
//!                 Err(error) => panic!("{error}"),
//!             }
//!         }
//!     });
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How a fault leaves KVM_RUN
//! On every kernel with userfaultfd's POISON (Linux 6.6): absent pages carry a marker. KVM's stage 2
//! meets it and sends the vCPU's thread a SIGBUS with the page's address; the signal is blocked in
//! the thread and unblocked inside KVM_RUN, which so ends with EINTR, and is then taken from the
//! queue. A kernel's own paging exits, where there are any, are one more kind of exit in `exit.rs`.
//!
//! # Signals
//! While memory is missing, `run` blocks all signals in the calling thread (but those that a crash
//! raises, SIGSEGV for one) and unblocks, inside KVM_RUN, those that were not blocked before. So a
//! signal of the embedder's is never lost: it ends KVM_RUN, `run` returns EINTR, and with the mask as
//! it was before the signal is delivered. All the ways to kick a vCPU work: a handler that sets
//! `immediate_exit`, an empty handler, and a blocked signal that is unblocked in KVM_RUN only; the last
//! needs [`VcpuPager::set_signal_mask`] instead of KVM_SET_SIGNAL_MASK. Once all memory is there, `run`
//! is KVM_RUN and nothing else.
//!
//! # What KVM writes by itself
//! Its clocks, stolen time and the like are in guest memory. Those that a vCPU has when it first runs
//! are brought before; for a guest that boots while its memory is absent see [`KvmAreas::Follow`].
//!
//! # Writes
//! [`dirty`] has KVM's dirty log and dirty rings, with or without paging.
//!
//! # Where to read on
//! `vcpu.rs` has the loop, on one screen.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod access;
mod areas;
mod choose;
pub mod dirty;
mod error;
mod exit;
mod fetch;
mod machine_check;
mod pending;
pub mod probe;
mod registers;
#[allow(unsafe_code)]
mod signals;
mod slots;
mod stats;
#[allow(unsafe_code)]
mod sys;
#[allow(unsafe_code)]
mod vcpu;
mod vm;

pub use areas::AREA_REGISTERS;
pub use choose::{Hints, VcpuDelivery, choose};
pub use error::{KvmError, RunError};
pub use signals::SignalSet;
pub use slots::{Place, Slot, Slots};
pub use stats::{ExitTimes, VcpuStats};
pub use vcpu::{Exit, VcpuPager};
pub use vm::{KvmAreas, MemoryErrors, OnWrite, VmPager, VmPagerOptions};
