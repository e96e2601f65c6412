//! Registering in every mode on every kind of memory, and how long that lasts.

mod common;

use std::sync::Arc;

use common::{BACKINGS, Backing, Memory, contents, next_fault, open, run};
use pageferry_uffd::{
    CopyMode, Errno, FaultKind, Features, Ioctls, Mapped, RegisterError, RegisterMode,
};

/// All there are, alone and together.
fn modes() -> impl Iterator<Item = RegisterMode> {
    (0..8).map(RegisterMode::from_bits_retain)
}

#[test]
fn every_mode_on_every_memory() {
    let features = Features::PAGEFAULT_FLAG_WP
        | Features::WP_HUGETLBFS_SHMEM
        | Features::MINOR_SHMEM
        | Features::MINOR_HUGETLBFS;
    let Some(userfaultfd) = open(features) else { return };
    for backing in BACKINGS {
        let Some(memory) = Memory::new(backing, 1) else { continue };
        for mode in modes() {
            let registered = userfaultfd.register(&*memory, memory.range(), mode);
            // Minor faults are of pages of a file.
            let fits = !mode.is_empty()
                && (backing != Backing::Anonymous || !mode.contains(RegisterMode::MINOR));
            if !fits {
                match registered {
                    Err(RegisterError::Kernel(error)) => {
                        assert_eq!(error.errno(), Some(Errno::INVAL), "{backing:?} {mode}");
                        assert!(
                            error.to_string().contains("does not support this mode"),
                            "{error}"
                        );
                    }
                    other => panic!("{backing:?} {mode}: {other:?}"),
                }
                continue;
            }
            let registration =
                registered.unwrap_or_else(|error| panic!("{backing:?} {mode}: {error}"));
            let ioctls = registration.ioctls();
            for (needs, offered) in [
                (true, Ioctls::WAKE | Ioctls::COPY),
                (mode.contains(RegisterMode::WP), Ioctls::WRITEPROTECT),
                (mode.contains(RegisterMode::MINOR), Ioctls::CONTINUE),
                (backing != Backing::Hugetlb2M, Ioctls::ZEROPAGE),
            ] {
                assert_eq!(ioctls.contains(offered), needs, "{backing:?} {mode}: {ioctls}");
            }
        }
    }
}

#[test]
fn missing_and_minor_faults_of_one_range() {
    let features = Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS;
    for backing in [Backing::Memfd, Backing::Hugetlb2M] {
        let Some(userfaultfd) = open(features) else { return };
        let Some(memory) = Memory::new(backing, 2) else { continue };
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let _registration =
            userfaultfd.register(Arc::clone(&memory), memory.range(), mode).unwrap();
        memory.write_alias(1, 0x5b);
        let touch = |page| {
            let memory = Arc::clone(&memory);
            run(move || memory.read(page))
        };

        let thread = touch(0);
        next_fault(&userfaultfd, FaultKind::Missing, memory.page(0));
        let bytes = contents(memory.page_size(), [0x5a]);
        let outcome = userfaultfd.copy(memory.page(0).start(), &bytes, CopyMode::WAKE).unwrap();
        assert!(outcome.is_complete());
        assert_eq!(thread.finish(), 0x5a, "{backing:?}");

        let thread = touch(1);
        next_fault(&userfaultfd, FaultKind::Minor, memory.page(1));
        let outcome = userfaultfd.continue_range(memory.page(1), CopyMode::WAKE).unwrap();
        assert!(outcome.is_complete());
        assert_eq!(thread.finish(), 0x5b, "{backing:?}");
    }
}

#[test]
fn a_registration_keeps_its_memory_and_its_descriptor() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, 1).unwrap();
    let range = memory.range();
    let registration = userfaultfd.register(memory, range, RegisterMode::MISSING).unwrap();
    drop(userfaultfd);
    // With the last descriptor gone, the fault would be answered with zeros by the kernel; with
    // the memory gone, the access would end this process.
    let toucher = Arc::clone(registration.mapping());
    let thread = run(move || toucher.read(0));
    next_fault(registration.uffd(), FaultKind::Missing, range);
    let bytes = contents(range.len(), [0x5a]);
    let outcome = registration.uffd().copy(range.start(), &bytes, CopyMode::WAKE).unwrap();
    assert!(outcome.is_complete());
    assert_eq!(thread.finish(), 0x5a);
    let memory = registration.unregister().map_err(|(_, error)| error).unwrap();
    assert_eq!(memory.read(0), 0x5a);
}
