//! Memory that arrives on demand: what an embedder imports.
//!
//! Each module is one crate of the workspace, re-exported whole:
//!
//! * [`uffd`]: the kernel interfaces (userfaultfd, pagemap, `PAGEMAP_SCAN`, `clear_refs`), typed.
//! * [`memory`]: addresses and sizes, mappings, regions, the page map, dirty bitmaps.
//! * [`paging`]: the engine, and the traits a page source implements.
//! * [`image`]: memory images as page sources.
//! * [`migrate`]: the page-transfer protocol, its client and its server.

#![forbid(unsafe_code)]

pub use pageferry_image as image;
pub use pageferry_memory as memory;
pub use pageferry_migrate as migrate;
pub use pageferry_paging as paging;
pub use pageferry_uffd as uffd;
