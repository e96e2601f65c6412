//! What the tests of Pageferry's crates share. No crate but a test uses it, and it is not
//! published.
//!
//! * [`userfaultfd`], [`features`], [`huge_pages`] and [`HugePages::reserve`] say whether the host has what a
//!   test needs. If not, they print `skipped: needs …`, and the test returns.
//! * [`word`], [`fill_pattern`] and [`page`] are what memory is expected to contain; [`Random`]
//!   and [`shuffled`] are the same in every run.
//! * [`layout`] and [`layout_of`] make memory, [`peek`] and [`poke`] access it as a guest does;
//!   [`OwnMemory`] is an image that cannot be read everywhere.
//! * [`Effort`] is how often a test repeats what it is about.
//! * [`wait_for`], [`watch`] and [`fail`] end a process in which a thread waits in vain for a page.
//!   [`child`] runs a test in a process of its own, which is to die; [`target`] in one that is to be
//!   looked at.
//!
//! It knows the crates `uffd` and `memory` and none that uses them, so that every other one can use
//! it. Its functions panic where a test has to fail: that is all their errors.
#![deny(unsafe_code)]

pub mod child;
mod contents;
mod effort;
#[allow(unsafe_code)]
mod guest;
mod host;
#[allow(unsafe_code)]
mod own_memory;
mod patience;
mod random;
#[allow(unsafe_code)]
pub mod target;

pub use contents::{fill_pattern, page, verify_all, word};
pub use effort::Effort;
pub use guest::{HUGE, PAGE, REGION, RegionShape, layout, layout_of, peek, poke};
pub use host::{HugePages, features, huge_pages, userfaultfd};
pub use own_memory::OwnMemory;
pub use patience::{PATIENCE, Watch, fail, wait_for, watch};
pub use random::{Random, shuffled};
