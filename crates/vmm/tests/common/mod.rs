//! What the tests of this crate share.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

pub use pageferry_testing::{HugePages, PATIENCE, userfaultfd, wait_for, watch};

use pageferry_memory::PageSize;
use pageferry_vmm::{Operation, Order, Ring};

pub const SMALL: PageSize = PageSize::SIZE_4K;
pub const HUGE: PageSize = PageSize::SIZE_2M;

/// Whether there is a KVM that this process may use; says so if not.
pub fn kvm() -> bool {
    let kvm = kvm_ioctls::Kvm::new();
    if let Err(error) = &kvm {
        println!("skipped: needs /dev/kvm: {error}");
    }
    kvm.is_ok()
}

/// Whether the host has what paging a guest needs; says so if not.
pub fn can_page() -> bool {
    kvm() && userfaultfd()
}

/// Runs `test` for every delivery on every set-up that can have it, with pages of 4 KiB, if the host
/// has what that needs. All together works in so many seconds.
#[track_caller]
pub fn each_case(seconds: u64, test: impl FnMut(Case)) {
    if !can_page() {
        return;
    }
    let _watch = watch(seconds);
    cases(SMALL).for_each(test);
}

/// Pages enough for several of each vCPU, and few enough for an emulated ring 0.
pub fn pages(ring: Ring) -> u64 {
    match ring {
        Ring::Zero => 64,
        Ring::Three => 1024,
    }
}

/// Every order, operation and ring.
pub fn payloads() -> impl Iterator<Item = (Order, Operation, Ring)> {
    Ring::ALL.into_iter().flat_map(|ring| {
        Operation::ALL.into_iter().flat_map(move |operation| {
            Order::ALL.into_iter().map(move |order| (order, operation, ring))
        })
    })
}

mod background;
mod giant;
mod paged;

pub use background::{started, stop_and_check, wait_for_progress};
pub use giant::GiantPages;
pub use paged::{Case, HUGE_MEMORY, Paged, cases, config, name};
