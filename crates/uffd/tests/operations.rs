//! Every operation on every kind of memory, as a kernel really does it.

mod common;

use std::sync::Arc;

use common::{
    BACKINGS, Backing, Memory, contents, next_fault, open, open_full, run, wait_readable,
};
use pageferry_uffd::{
    CopyMode, Errno, EventBuffer, FaultKind, Features, HostAddress, Ioctls, Mapped, MoveMode,
    Operation, Outcome, RegisterError, RegisterMode, Registration, UffdError, Userfaultfd, Wake,
};

type Registered = Registration<Arc<Memory>>;

fn register(
    userfaultfd: &Arc<Userfaultfd>,
    memory: &Arc<Memory>,
    mode: RegisterMode,
) -> Registered {
    userfaultfd.register(Arc::clone(memory), memory.range(), mode).unwrap()
}

/// Runs `test` on every backing the host has.
fn on_every_backing(
    features: Features,
    mode: RegisterMode,
    pages: u64,
    test: impl Fn(&Backing, &Arc<Memory>, &Registered),
) {
    for backing in BACKINGS {
        let Some(userfaultfd) = open(features) else { return };
        let Some(memory) = Memory::new(backing, pages) else { continue };
        println!("on {backing:?}");
        let registration = register(&userfaultfd, &memory, mode);
        assert!(registration.ioctls().contains(Ioctls::WAKE));
        test(&backing, &memory, &registration);
    }
}

#[test]
fn copy_answers_a_missing_fault() {
    on_every_backing(Features::empty(), RegisterMode::MISSING, 2, |_, memory, registration| {
        let bytes = contents(memory.page_size(), [0x5a]);
        for write in [false, true] {
            let page = u64::from(write);
            let toucher = Arc::clone(memory);
            let thread = run(move || {
                if write {
                    toucher.write(page, 1);
                }
                toucher.read(page)
            });
            let fault = next_fault(registration.uffd(), FaultKind::Missing, memory.page(page));
            assert_eq!(fault.write, write);
            let outcome =
                registration.uffd().copy(memory.page(page).start(), &bytes, CopyMode::WAKE);
            assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.page_size() }));
            assert_eq!(thread.finish(), if write { 1 } else { 0x5a });
        }
    });
}

#[test]
fn copy_without_waking_leaves_the_thread_waiting() {
    on_every_backing(Features::empty(), RegisterMode::MISSING, 1, |_, memory, registration| {
        let bytes = contents(memory.page_size(), [0x5a]);
        let userfaultfd = registration.uffd();
        let toucher = Arc::clone(memory);
        let thread = run(move || toucher.read(0));
        next_fault(userfaultfd, FaultKind::Missing, memory.page(0));
        let outcome = userfaultfd.copy(memory.page(0).start(), &bytes, CopyMode::NO_WAKE);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.page_size() }));
        assert!(!thread.ends_soon());
        userfaultfd.wake(memory.page(0)).unwrap();
        assert_eq!(thread.finish(), 0x5a);
    });
}

#[test]
fn progress_of_a_copy_that_meets_a_present_page_is_kept() {
    on_every_backing(Features::empty(), RegisterMode::MISSING, 8, |_, memory, registration| {
        let (userfaultfd, page) = (registration.uffd(), memory.page_size());
        let fifth = contents(page, [99]);
        let outcome = userfaultfd.copy(memory.page(5).start(), &fifth, CopyMode::WAKE).unwrap();
        assert!(outcome.is_complete());

        let bytes = contents(page, 1..=8);
        let copy = |first: u64| {
            let source = &bytes[(first * page) as usize..];
            userfaultfd.copy(memory.page(first).start(), source, CopyMode::WAKE)
        };
        assert_eq!(copy(0), Ok(Outcome::Retry { done: 5 * page }));
        assert_eq!(copy(5), Ok(Outcome::AlreadyPresent { done: 0 }));
        assert_eq!(copy(6), Ok(Outcome::Installed { bytes: 2 * page }));
        let found: Vec<_> = (0..8).map(|index| memory.read(index)).collect();
        assert_eq!(found, [1, 2, 3, 4, 5, 99, 7, 8]);
    });
}

#[test]
fn zeropage_answers_a_missing_fault_except_on_hugetlb() {
    on_every_backing(
        Features::empty(),
        RegisterMode::MISSING,
        1,
        |backing, memory, registration| {
            let userfaultfd = registration.uffd();
            if *backing == Backing::Hugetlb2M {
                assert!(!registration.ioctls().contains(Ioctls::ZEROPAGE));
                let error = userfaultfd.zeropage(memory.page(0), Wake::Yes).unwrap_err();
                assert_eq!(error.errno(), Some(Errno::INVAL));
                return;
            }
            let toucher = Arc::clone(memory);
            let thread = run(move || toucher.read(0));
            next_fault(userfaultfd, FaultKind::Missing, memory.page(0));
            let outcome = userfaultfd.zeropage(memory.page(0), Wake::Yes);
            assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.page_size() }));
            assert_eq!(thread.finish(), 0);
            let again = userfaultfd.zeropage(memory.page(0), Wake::No);
            assert_eq!(again, Ok(Outcome::AlreadyPresent { done: 0 }));
        },
    );
}

#[test]
fn continue_maps_what_the_alias_wrote() {
    let cases =
        [(Backing::Memfd, Features::MINOR_SHMEM), (Backing::Hugetlb2M, Features::MINOR_HUGETLBFS)];
    for (backing, features) in cases {
        let Some(userfaultfd) = open(features) else { return };
        let Some(memory) = Memory::new(backing, 3) else { continue };
        let _registration = register(&userfaultfd, &memory, RegisterMode::MINOR);
        memory.write_alias(0, 0x5a);
        let toucher = Arc::clone(&memory);
        let thread = run(move || toucher.read(0));
        let fault = next_fault(&userfaultfd, FaultKind::Minor, memory.page(0));
        assert!(!fault.write);
        let outcome = userfaultfd.continue_range(memory.page(0), CopyMode::WAKE);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.page_size() }));
        assert_eq!(thread.finish(), 0x5a);

        let again = userfaultfd.continue_range(memory.page(0), CopyMode::NO_WAKE);
        assert_eq!(again, Ok(Outcome::AlreadyPresent { done: 0 }));

        // Page 1 is in the page cache, page 2 is not: progress first, then the reason.
        memory.write_alias(1, 0x5b);
        let partial = userfaultfd.continue_range(memory.pages(1, 2), CopyMode::WAKE);
        assert_eq!(partial, Ok(Outcome::Retry { done: memory.page_size() }));
        assert_eq!(memory.read(1), 0x5b);
        let error = userfaultfd.continue_range(memory.page(2), CopyMode::WAKE).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::FAULT));
        assert!(error.to_string().contains("page cache"), "{error}");
    }
}

#[test]
fn poison_is_an_error_until_a_copy_replaces_it() {
    on_every_backing(Features::POISON, RegisterMode::MISSING, 2, |_, memory, registration| {
        let (userfaultfd, page) = (registration.uffd(), memory.page_size());
        let outcome = userfaultfd.poison(memory.pages(0, 2), Wake::Yes);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: 2 * page }));
        assert_eq!(memory.read_by_kernel(0), Err(Errno::FAULT));

        let bytes = contents(page, [0x5a]);
        let outcome = userfaultfd.copy(memory.page(0).start(), &bytes, CopyMode::WAKE);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: page }));
        assert_eq!(memory.read_by_kernel(0), Ok(0x5a));
        assert_eq!(memory.read_by_kernel(1), Err(Errno::FAULT));

        let outcome = userfaultfd.poison(memory.page(0), Wake::Yes);
        assert_eq!(outcome, Ok(Outcome::AlreadyPresent { done: 0 }));
        assert_eq!(memory.read_by_kernel(0), Ok(0x5a));
    });
}

#[test]
fn poison_wakes_the_thread_that_waits_with_an_error() {
    let Some(userfaultfd) = open_full(Features::POISON) else { return };
    let Some(memory) = Memory::new(Backing::Anonymous, 1) else { return };
    let _registration = register(&userfaultfd, &memory, RegisterMode::MISSING);
    let toucher = Arc::clone(&memory);
    let thread = run(move || toucher.read_by_kernel(0));
    next_fault(&userfaultfd, FaultKind::Missing, memory.page(0));
    assert!(userfaultfd.poison(memory.page(0), Wake::Yes).unwrap().is_complete());
    assert_eq!(thread.finish(), Err(Errno::FAULT));
}

#[test]
fn continue_replaces_poison() {
    let Some(userfaultfd) = open(Features::POISON | Features::MINOR_SHMEM) else { return };
    let Some(memory) = Memory::new(Backing::Memfd, 1) else { return };
    let _registration = register(&userfaultfd, &memory, RegisterMode::MINOR);
    assert!(userfaultfd.poison(memory.page(0), Wake::Yes).unwrap().is_complete());
    assert_eq!(memory.read_by_kernel(0), Err(Errno::FAULT));
    memory.write_alias(0, 0x5a);
    assert!(userfaultfd.continue_range(memory.page(0), CopyMode::WAKE).unwrap().is_complete());
    assert_eq!(memory.read_by_kernel(0), Ok(0x5a));
}

#[test]
fn move_takes_the_pages_away_from_the_source() {
    let Some(userfaultfd) = open(Features::MOVE) else { return };
    let memory = Memory::new(Backing::Anonymous, 4).unwrap();
    let pool = Memory::new(Backing::Anonymous, 4).unwrap();
    let page = memory.page_size();
    let registration = register(&userfaultfd, &memory, RegisterMode::MISSING);
    assert!(registration.ioctls().contains(Ioctls::MOVE));
    let move_pages = |to: u64, from: u64, count: u64, mode: MoveMode| {
        let (to, from) = (memory.page(to).start(), pool.pages(from, count));
        // The kernel may be busy with a page for a moment; that is a retry with nothing done.
        loop {
            // SAFETY: nothing relies on the contents of the pool.
            match unsafe { userfaultfd.move_pages(to, from, mode) } {
                Ok(Outcome::Retry { done: 0 }) => std::thread::yield_now(),
                other => break other,
            }
        }
    };
    let (plain, holes) =
        (MoveMode::default(), MoveMode { allow_src_holes: true, ..MoveMode::default() });

    pool.write(0, 0x5a);
    pool.write(2, 0x5b);
    let toucher = Arc::clone(&memory);
    let thread = run(move || toucher.read(0));
    next_fault(&userfaultfd, FaultKind::Missing, memory.page(0));
    assert_eq!(move_pages(0, 0, 1, plain), Ok(Outcome::Installed { bytes: page }));
    assert_eq!(thread.finish(), 0x5a);
    assert_eq!(pool.read(0), 0, "the source is left absent, and reads as zeros");

    assert_eq!(move_pages(0, 2, 1, plain), Ok(Outcome::AlreadyPresent { done: 0 }));
    assert_eq!(pool.read(2), 0x5b, "what was not moved is still there");
    assert_eq!(move_pages(1, 3, 1, plain), Ok(Outcome::RangeGone { done: 0 }));
    assert_eq!(move_pages(1, 1, 3, holes), Ok(Outcome::Installed { bytes: 3 * page }));
    assert_eq!(memory.read(2), 0x5b);
    assert!(userfaultfd.zeropage(memory.page(1), Wake::No).unwrap().is_complete());
}

#[test]
fn move_refuses_what_is_not_private_anonymous() {
    let Some(userfaultfd) = open(Features::MOVE) else { return };
    let Some(memory) = Memory::new(Backing::Memfd, 1) else { return };
    let pool = Memory::new(Backing::Anonymous, 1).unwrap();
    let registration = register(&userfaultfd, &memory, RegisterMode::MISSING);
    pool.write(0, 1);
    let (to, from) = (memory.page(0).start(), pool.page(0));
    // SAFETY: nothing relies on the contents of the pool.
    let error =
        unsafe { registration.uffd().move_pages(to, from, MoveMode::default()) }.unwrap_err();
    assert_eq!(
        error,
        UffdError::Ioctl {
            what: Operation::Move { from: from.start() },
            range: memory.page(0),
            errno: Errno::INVAL,
        }
    );
}

#[test]
fn a_write_to_protected_memory_waits() {
    let features = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    on_every_backing(features, RegisterMode::WP, 2, |_, memory, registration| {
        let userfaultfd = registration.uffd();
        memory.write(0, 1);
        let outcome = userfaultfd.write_protect(memory.range(), true, Wake::Yes);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.range().len() }));
        assert_eq!(memory.read(0), 1, "reading goes on");

        let writer = Arc::clone(memory);
        let thread = run(move || writer.write(0, 2));
        let fault = next_fault(userfaultfd, FaultKind::WriteProtect, memory.page(0));
        assert!(fault.write);
        assert_eq!(memory.read(0), 1, "the write has not happened");
        let outcome = userfaultfd.write_protect(memory.page(0), false, Wake::No);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: memory.page_size() }));
        userfaultfd.wake(memory.page(0)).unwrap();
        thread.finish();
        assert_eq!(memory.read(0), 2);
    });
}

#[test]
fn pages_can_be_installed_write_protected() {
    let features = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    on_every_backing(features, mode, 1, |_, memory, registration| {
        let userfaultfd = registration.uffd();
        let bytes = contents(memory.page_size(), [0x5a]);
        let mode = CopyMode::WAKE.write_protected();
        assert!(userfaultfd.copy(memory.page(0).start(), &bytes, mode).unwrap().is_complete());
        assert_eq!(memory.read(0), 0x5a);
        let writer = Arc::clone(memory);
        let thread = run(move || writer.write(0, 1));
        next_fault(userfaultfd, FaultKind::WriteProtect, memory.page(0));
        let lifted = userfaultfd.write_protect(memory.page(0), false, Wake::Yes).unwrap();
        assert!(lifted.is_complete());
        thread.finish();
        assert_eq!(memory.read(0), 1);
    });
}

#[test]
fn continued_pages_can_be_write_protected() {
    let features = Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM;
    let Some(userfaultfd) = open(features) else { return };
    let Some(memory) = Memory::new(Backing::Memfd, 1) else { return };
    let _registration = register(&userfaultfd, &memory, RegisterMode::MINOR | RegisterMode::WP);
    memory.write_alias(0, 0x5a);
    let mode = CopyMode::WAKE.write_protected();
    match userfaultfd.continue_range(memory.page(0), mode) {
        // No feature tells: it came with Linux 6.4.
        Err(error) if error.errno() == Some(Errno::INVAL) => {
            println!("skipped: needs CONTINUE with write protection (Linux 6.4): {error}");
            return;
        }
        outcome => assert!(outcome.unwrap().is_complete()),
    }
    let writer = Arc::clone(&memory);
    let thread = run(move || writer.write(0, 1));
    next_fault(&userfaultfd, FaultKind::WriteProtect, memory.page(0));
    assert!(userfaultfd.write_protect(memory.page(0), false, Wake::Yes).unwrap().is_complete());
    thread.finish();
}

#[test]
fn a_range_that_is_not_registered_is_gone() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, 1).unwrap();
    let bytes = contents(memory.page_size(), [1]);
    let outcome = userfaultfd.copy(memory.page(0).start(), &bytes, CopyMode::WAKE);
    assert_eq!(outcome, Ok(Outcome::RangeGone { done: 0 }));
    assert_eq!(memory.read(0), 0);
}

#[test]
fn what_the_kernel_refuses_says_what_was_asked() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, 2).unwrap();
    let _registration = register(&userfaultfd, &memory, RegisterMode::MISSING);
    let odd = memory.range().skip(1).take(memory.page_size());
    let empty = memory.page(0).take(0);
    let start = memory.page(0).start();
    let cases = [
        (userfaultfd.zeropage(odd, Wake::Yes).map(drop), Operation::ZeroPage),
        (userfaultfd.zeropage(empty, Wake::Yes).map(drop), Operation::ZeroPage),
        (userfaultfd.wake(odd), Operation::Wake),
        (userfaultfd.wake(empty), Operation::Wake),
        (userfaultfd.unregister_raw(odd), Operation::Unregister),
        (userfaultfd.copy(start, &[0; 1], CopyMode::WAKE).map(drop), Operation::Copy),
    ];
    for (result, operation) in cases {
        match result {
            Err(UffdError::Ioctl { what, errno: Errno::INVAL, .. }) => assert_eq!(what, operation),
            other => panic!("{operation:?} of something impossible: {other:?}"),
        }
    }
    let top = HostAddress::new(u64::MAX);
    let wraps = userfaultfd.copy(top, &[0; 2], CopyMode::WAKE);
    assert_eq!(wraps, Err(UffdError::Wraps { what: Operation::Copy, start: top, len: 2 }));
}

#[test]
fn a_registration_ends_with_its_value() {
    let (Some(first), Some(second)) = (open(Features::empty()), open(Features::empty())) else {
        return;
    };
    let memory = Memory::new(Backing::Anonymous, 2).unwrap();
    let attempt = || second.register(&*memory, memory.range(), RegisterMode::MISSING);
    let busy = |error: &RegisterError| {
        assert!(
            matches!(error, RegisterError::Kernel(error) if error.errno() == Some(Errno::BUSY)),
            "{error}"
        );
        assert!(error.to_string().contains("another userfaultfd"), "{error}");
    };

    let registration = register(&first, &memory, RegisterMode::MISSING);
    busy(&attempt().unwrap_err());
    drop(registration);
    drop(attempt().unwrap());

    let registration = register(&first, &memory, RegisterMode::MISSING);
    assert!(Arc::ptr_eq(&registration.unregister().unwrap(), &memory));
    drop(attempt().unwrap());

    let registration = register(&first, &memory, RegisterMode::MISSING);
    assert!(Arc::ptr_eq(&registration.into_inner_registered(), &memory));
    busy(&attempt().unwrap_err());
}

#[test]
fn only_part_of_the_mapping_can_be_registered() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, 4).unwrap();
    let outside = memory.range().skip(memory.page_size());
    let outside = pageferry_uffd::HostRange::new(outside.start(), memory.range().len());
    let error = userfaultfd.register(&*memory, outside, RegisterMode::MISSING).unwrap_err();
    assert_eq!(error, RegisterError::OutsideMapping { range: outside, mapping: memory.range() });

    let middle = memory.pages(1, 2);
    let registration =
        userfaultfd.register(Arc::clone(&memory), middle, RegisterMode::MISSING).unwrap();
    assert_eq!((registration.range(), registration.mode()), (middle, RegisterMode::MISSING));
    assert_eq!((memory.read(0), memory.read(3)), (0, 0), "the pages around raise no fault");
    if userfaultfd.negotiated().available.contains(Features::POISON) {
        assert!(userfaultfd.poison(middle, Wake::No).is_ok());
    }
}

#[test]
fn many_faults_come_in_one_read() {
    const THREADS: u64 = 8;
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, THREADS).unwrap();
    let registration = register(&userfaultfd, &memory, RegisterMode::MISSING);
    let threads: Vec<_> = (0..THREADS)
        .map(|page| {
            let toucher = Arc::clone(&memory);
            run(move || toucher.read(page))
        })
        .collect();

    // Events are read as they come, into one buffer, which keeps them until it is drained.
    let mut buffer = EventBuffer::new(THREADS as usize);
    while buffer.len() < buffer.capacity() {
        wait_readable(&*userfaultfd);
        assert!(userfaultfd.read_events(&mut buffer).unwrap() > 0);
    }
    let full = UffdError::BufferFull { pending: buffer.len(), capacity: buffer.capacity() };
    assert_eq!(userfaultfd.read_events(&mut buffer), Err(full));
    let mut pages: Vec<_> = buffer
        .drain()
        .map(|event| match event {
            Ok(pageferry_uffd::Event::Fault(fault)) => fault.address,
            other => panic!("{other:?}"),
        })
        .collect();
    pages.sort();
    let expected: Vec<_> = (0..THREADS).map(|page| memory.page(page).start()).collect();
    assert_eq!(pages, expected);
    assert_eq!(userfaultfd.read_events(&mut buffer), Ok(0), "nothing is pending");

    let bytes = contents(memory.page_size(), 1..=THREADS as u8);
    let start = registration.range().start();
    assert!(userfaultfd.copy(start, &bytes, CopyMode::WAKE).unwrap().is_complete());
    let found: Vec<_> = threads.into_iter().map(|thread| thread.finish()).collect();
    assert_eq!(found, (1..=THREADS as u8).collect::<Vec<_>>());
}
