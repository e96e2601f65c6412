//! A guest's memory, and what it contains.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

pub use pageferry_testing::{
    HUGE, HugePages, OwnMemory, PAGE, PATIENCE, REGION, child, fail, layout, page, peek, shuffled,
    userfaultfd, wait_for, watch,
};

use pageferry::memory::Layout;

/// The eight bytes at `offset` of the guest's only region; never zero.
pub fn word(offset: u64) -> u64 {
    pageferry_testing::word(REGION, offset)
}

/// In a child: makes the access that it is to die of. It survives this only if there is a bug.
pub fn touch_and_die(layout: &Layout, offset: u64) -> ! {
    child::reached();
    child::saw(peek(layout, offset))
}
