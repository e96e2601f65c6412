//! A machine that boots Linux: a bzImage with an initramfs, made from rust-vmm's parts.
//!
//! It has what Debian's cloud kernel needs and no more: interrupt controllers, timer and clock of
//! KVM's, a serial console, virtio disks and random numbers, ACPI tables that tell of them, and a way
//! to power off. All of its memory is paged: it can be made absent and arrive on demand.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use pageferry_vmm::linux::{LinuxConfig, LinuxVm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = LinuxConfig::new("vmlinuz", 1 << 30);
//! config.initramfs = Some("initramfs".into());
//! let vm = LinuxVm::new(config.clone(), Box::new(std::io::stdout()))?;
//! vm.boot()?;
//! vm.start(None)?;
//! vm.input(b"echo hello\n");
//! vm.wait(Duration::from_secs(10));
//! // What it was goes on in another one.
//! vm.pause();
//! let state = vm.save()?;
//! let other = LinuxVm::new(config, Box::new(std::io::stdout()))?;
//! other.restore(&state)?;
//! // ... its memory: copied, or brought by a pager for `other.layout()` ...
//! other.start(None)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Where things are
//! | file | subject |
//! |---|---|
//! | `vm.rs` | the machine: made, booted, started, paused, saved, restored |
//! | `run.rs` | its vCPUs' threads, and what becomes of their exits |
//! | `devices.rs` | its devices and who answers which port or address |
//! | `load.rs`, `acpi.rs`, `cpu.rs`, `layout.rs` | what a boot loader and firmware would do |
//! | `console.rs`, `ports.rs`, `virtio/` | the devices |
//! | `memory.rs` | guest memory as devices access it |
//! | `migration.rs` | moved to another host |
//! | `native.rs` | whether this host can run a kernel at all |
//!
//! # Devices and memory that is absent
//! Devices work on the thread of the vCPU that told them to, through the guest view, where absent
//! memory arrives as it does for vCPUs; where faults are exits they ask first. Memory that can never
//! come is an error of the request, and the device asks to be reset. What they write is in the
//! marks of [`tracked_slots`](LinuxVm::tracked_slots). When all vCPUs are paused, no device works.
//!
//! # What comes from the guest
//! Registers, addresses, lengths and rings are checked, and a request that makes no sense is answered
//! with an error or with the wish to be reset; nothing of it panics.

mod acpi;
mod codec;
mod config;
mod console;
mod cpu;
mod devices;
mod error;
mod layout;
mod load;
mod memory;
mod migration;
#[allow(unsafe_code)]
mod native;
mod ports;
mod run;
mod virtio;
#[allow(unsafe_code)]
mod vm;

pub use config::LinuxConfig;
pub use console::ConsoleOut;
pub use error::LinuxError;
pub use migration::{LinuxDestination, LinuxSource};
pub use native::{Native, native};
pub use run::LinuxEnd;
pub use virtio::Disk;
pub use vm::LinuxVm;
