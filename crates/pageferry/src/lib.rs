//! Memory that arrives on demand: what an embedder imports.
//!
//! Each module is one crate of the workspace, re-exported whole:
//!
//! * [`uffd`]: the kernel interfaces (userfaultfd, pagemap, `PAGEMAP_SCAN`, `clear_refs`), typed.
//! * [`memory`]: addresses and sizes, mappings, regions, the page map, dirty bitmaps.
//! * [`paging`]: the engine, and the traits a page source implements.
//! * `kvm` (x86-64; feature `kvm`, on by default): vCPU exits as a delivery, and what the host's KVM
//!   can do.
//! * [`image`]: memory images as page sources.
//! * [`migrate`]: the page-transfer protocol, its client and its server.
//!
//! A guest that runs on a memory image while the image is still on disk:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use pageferry::{
//!     image::RawImage,
//!     memory::{Backing, Layout, Region, RegionConfig},
//!     paging::Pager,
//! };
//!
//! # fn run_guest_on(_: *mut u8) {}
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let region = Arc::new(Region::new(&RegionConfig::new(512 << 20, Backing::Memfd))?);
//! let layout = Layout::new(vec![Arc::clone(&region)])?;
//! let pager = Pager::builder(layout).start(Arc::new(RawImage::open("guest.mem")?))?;
//! println!("faults are delivered by {}: {}", pager.chosen().delivery, pager.chosen().why);
//! run_guest_on(region.guest_view().as_ptr());
//! # Ok(())
//! # }
//! ```
//!
//! With the feature `vm-memory`, `memory::adapter` takes the regions of a `GuestMemoryMmap`.

#![forbid(unsafe_code)]

pub use pageferry_checkpoint as checkpoint;
pub use pageferry_dirty as dirty;
pub use pageferry_image as image;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub use pageferry_kvm as kvm;
pub use pageferry_memory as memory;
pub use pageferry_migrate as migrate;
pub use pageferry_paging as paging;
pub use pageferry_process as process;
pub use pageferry_uffd as uffd;
