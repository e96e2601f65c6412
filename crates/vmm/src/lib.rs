//! A small VMM, and the worked example of how one embeds Pageferry: a machine of 1 to 64 vCPUs
//! whose memory arrives on demand, and a guest that checks every word it reads.
//!
//! It is for tests, demonstrations and benchmarks, and no product: the guest is no operating system
//! but one of a few bare-metal [payloads](Payload), and there are no devices but one port.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use pageferry_kvm::{VcpuDelivery, VmPager, VmPagerOptions, choose, probe};
//! use pageferry_vmm::{PatternOptions, PatternSource, RunOptions, Vm, VmConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A machine with 8 vCPUs and 1 GiB, none of which is there yet.
//! let vm = Vm::new(VmConfig::new(8, 1 << 30))?;
//!
//! // The engine: where the pages come from, and how faults are delivered here.
//! let (delivery, why) = choose(VcpuDelivery::Auto, probe::host(), &Default::default())?;
//! println!("faults are delivered by {delivery}: {why}");
//! let source = PatternSource::new(PatternOptions::default());
//! let pager = Arc::new(vm.pager().delivery(delivery).start(source)?);
//!
//! // What wraps KVM_RUN. This machine's page tables are never paged.
//! let options = VmPagerOptions { guest_page_tables_resident: true, ..Default::default() };
//! let vm_pager = VmPager::new(Arc::clone(&pager), options)?;
//!
//! let report = vm.run(Some(&vm_pager), &RunOptions::default())?;
//! assert!(report.is_good());
//! println!("{} pages a second", report.touches_per_second());
//! # Ok(())
//! # }
//! ```
//!
//! # What an embedder does
//! | step | here |
//! |---|---|
//! | make regions: where the guest has them, what they are, their views | `memory.rs` |
//! | give KVM each region's [`kvm_view`](pageferry_memory::Region::kvm_view) as a memslot | `vm.rs` |
//! | start a pager for the [`Layout`](pageferry_memory::Layout), with a source | [`Vm::pager`] |
//! | make a [`VmPager`](pageferry_kvm::VmPager), and from it one pager for each vCPU | [`Vm::run`] |
//! | call its `run` where KVM_RUN was called; EINTR is still the embedder's | `vcpu.rs` |
//! | touch guest memory from other threads: through the guest view, or asking first | [`Vm::guest_memory`], `device.rs` |
//! | tell the `VmPager` of memslots that are moved or removed | [`Vm::move_slot`] |
//! | track writes, and say which ones KVM does not see | [`Vm::tracker`], [`Vm::on_write`] |
//! | save all that is not memory, and restore it before memory is there | [`Vm::save`], [`Vm::restore`], [`state`] |
//! | have the guest moved while it runs | [`MachineSource`], [`MachineDestination`] |
//!
//! # Memory
//! Boot memory is at guest-physical 0 and never paged; paged memory lies on both sides of the hole
//! between 3 and 4 GiB, in one region each: half of it (2 GiB at most) begins at 1 GiB, and the
//! rest at 4 GiB. How it is mapped is the [`Setup`]: (a) to (d). `boot.rs` has the map of the boot
//! memory, and `memory.rs` says who uses which view.
//!
//! # Guest
//! [`Payload`] says what each vCPU does: its order, what it does with each unit, in which ring.
//! `payload.rs` is the code. Every word's first contents follow from its address
//! ([`expected_word`]), so that a page that is zero, stale, half filled or another page is noticed,
//! and [`Vm::verify`] compares all of the memory afterwards. A guest with a [`Behaviour`] runs
//! until it is stopped, in the background ([`Machine`]), and counts in what it writes: whatever is
//! lost or stale after it has been moved, the next round notices.
//!
//! The vCPUs have no interrupt controller, no clock, and nothing else for KVM to write by itself.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![deny(unsafe_code)]

mod behaviour;
mod boot;
mod config;
mod control;
mod device;
mod error;
#[allow(unsafe_code)]
mod immediate_exit;
pub mod linux;
mod machine;
#[allow(unsafe_code)]
mod machine_check;
mod memory;
mod migration;
mod pattern;
#[allow(unsafe_code)]
mod payload;
mod plan;
mod report;
mod runner;
#[allow(unsafe_code)]
mod signal;
mod source;
pub mod state;
mod vcpu;
#[allow(unsafe_code)]
mod vm;

pub use behaviour::Behaviour;
pub use config::{Operation, Order, Payload, Ring, Setup, Share, VmConfig};
pub use error::VmError;
pub use machine::Machine;
pub use memory::{GuestMemory, Verified};
pub use migration::{Arrival, MachineDestination, MachineSource};
pub use pattern::{Pattern, WRITTEN, expected_word};
pub use report::{DeviceReport, End, Mismatch, Report, TouchTimes, VcpuReport};
pub use runner::{KvmRun, VcpuRunner};
pub use source::{PatternOptions, PatternSource};
pub use vm::{RunOptions, Vm, WriteTracking};
