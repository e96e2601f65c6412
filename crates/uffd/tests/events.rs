//! Events, as a kernel really sends them. Those of moving and unmapping are in `moving.rs`.

mod common;

use std::sync::Arc;

use common::{
    Backing, Memory, contents, next_event, next_event_in, next_fault, open, run, wait_readable,
};
use pageferry_uffd::{
    CopyMode, Event, EventBuffer, FaultKind, Features, Mapped, OpenWay, Outcome, RegisterMode,
    UffdError, Userfaultfd, Wake,
};

#[test]
fn remove_is_reported_and_holds_up_installs_until_read() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let Some(userfaultfd) = open(Features::EVENT_REMOVE) else { return };
        let memory = Memory::new(backing, 4).unwrap();
        let page = memory.page_size();
        let registration = userfaultfd
            .register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING)
            .unwrap();
        let bytes = contents(page, [1, 2, 3, 4]);
        let start = memory.range().start();
        assert!(userfaultfd.copy(start, &bytes[..2 * page as usize], CopyMode::WAKE).is_ok());

        let discarder = Arc::clone(&memory);
        let discard = run(move || discarder.discard(discarder.pages(0, 2)));
        wait_readable(&*userfaultfd);
        // The event is queued and unread: the address space is changing.
        let third = memory.page(2).start();
        let source = &bytes[2 * page as usize..][..page as usize];
        let mut outcomes = vec![
            userfaultfd.copy(third, source, CopyMode::WAKE),
            userfaultfd.zeropage(memory.page(2), Wake::Yes),
        ];
        if userfaultfd.negotiated().available.contains(Features::POISON) {
            outcomes.push(userfaultfd.poison(memory.page(2), Wake::Yes));
        }
        for outcome in outcomes {
            assert_eq!(outcome, Ok(Outcome::Retry { done: 0 }));
        }

        match next_event(&userfaultfd) {
            Event::Remove(range) => assert_eq!(range, memory.pages(0, 2)),
            other => panic!("{other:?}"),
        }
        discard.finish();
        let outcome = userfaultfd.copy(third, source, CopyMode::WAKE);
        assert_eq!(outcome, Ok(Outcome::Installed { bytes: page }));

        // Discarded anonymous pages fault again; those of a file are still in the page cache.
        if backing == Backing::Anonymous {
            let toucher = Arc::clone(&memory);
            let thread = run(move || toucher.read(0));
            next_fault(&userfaultfd, FaultKind::Missing, memory.page(0));
            assert!(userfaultfd.zeropage(memory.page(0), Wake::Yes).unwrap().is_complete());
            assert_eq!(thread.finish(), 0);
        } else {
            assert_eq!(memory.read(0), 1);
        }
        drop(registration);
    }
}

#[test]
fn a_fork_brings_a_userfaultfd_of_the_child() {
    let Some(userfaultfd) = open(Features::EVENT_FORK) else { return };
    let memory = Memory::new(Backing::Anonymous, 2).unwrap();
    let page = memory.page_size();
    let registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING).unwrap();

    let parent = Arc::clone(&memory);
    let (go, start_forking) = rustix::pipe::pipe().unwrap();
    let mut buffer = EventBuffer::new(1);
    let fork = run(move || {
        assert_eq!(rustix::io::read(&go, &mut [0_u8]), Ok(1));
        // SAFETY: the child touches memory that is mapped and exits, and calls nothing that takes
        // a lock another thread may have held.
        match unsafe { libc::fork() } {
            0 => {
                let byte = parent.read(0);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(i32::from(byte)) }
            }
            pid => pid,
        }
    });
    // From here until the event is read, nothing here may allocate or free: the C library's fork
    // holds the locks of its allocator, and returns only when the event has been read.
    assert_eq!(rustix::io::write(&start_forking, &[1]), Ok(1));
    let child = match next_event_in(&mut buffer, &userfaultfd) {
        Event::Fork { uffd } => uffd,
        other => panic!("{other:?}"),
    };
    let enabled = userfaultfd.negotiated().enabled;
    let child = Userfaultfd::from_received_fd(child, enabled, OpenWay::Syscall).unwrap();
    let child = Arc::new(child);
    let pid = fork.finish();
    assert!(pid > 0);

    next_fault(&child, FaultKind::Missing, memory.page(0));
    let start = memory.page(0).start();
    let bytes = contents(page, [0x5a]);
    let outcome = child.copy(start, &bytes, CopyMode::WAKE);
    assert_eq!(outcome, Ok(Outcome::Installed { bytes: page }));
    let mut status = 0;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status));
    assert_eq!(libc::WEXITSTATUS(status), 0x5a);

    let outcome = child.copy(memory.page(1).start(), &bytes, CopyMode::WAKE);
    assert_eq!(outcome, Ok(Outcome::ProcessGone { done: 0 }));
    let error = child.register(&*memory, memory.range(), RegisterMode::MISSING).unwrap_err();
    assert!(error.to_string().contains("received"), "{error}");

    // The parent's memory is as absent as before.
    let outcome = registration.uffd().zeropage(memory.page(0), Wake::Yes);
    assert_eq!(outcome, Ok(Outcome::Installed { bytes: page }));
}

#[test]
fn faults_name_thread_and_address_only_if_asked() {
    let both = Features::THREAD_ID | Features::EXACT_ADDRESS;
    for features in [Features::empty(), both] {
        let Some(userfaultfd) = open(features) else { return };
        let memory = Memory::new(Backing::Anonymous, 1).unwrap();
        let _registration = userfaultfd
            .register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING)
            .unwrap();
        let address = memory.range().skip(0x123).start();
        let thread = run(move || {
            // SAFETY: within the memory of the test.
            unsafe { address.as_ptr().read_volatile() };
            rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
        });
        let fault = next_fault(&userfaultfd, FaultKind::Missing, memory.page(0));
        assert!(userfaultfd.zeropage(memory.page(0), Wake::Yes).unwrap().is_complete());
        let thread = thread.finish();
        if features == both {
            assert_eq!((fault.thread, fault.address), (Some(thread), address));
        } else {
            assert_eq!((fault.thread, fault.address), (None, memory.range().start()));
        }
    }
}

#[test]
fn reading_when_nothing_is_pending_does_not_wait() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    assert_eq!(userfaultfd.read_events(&mut EventBuffer::new(1)), Ok(0));
}

#[test]
fn only_a_userfaultfd_can_be_taken_for_one() {
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let take = |fd| Userfaultfd::from_received_fd(fd, Features::MOVE, OpenWay::DeviceNode);

    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    match take(reader) {
        Err(UffdError::NotUserfaultfd { found, .. }) => {
            assert!(found.starts_with("pipe:"), "{found}");
        }
        other => panic!("{other:?}"),
    }

    let duplicate = rustix::io::dup(&*userfaultfd).unwrap();
    let received = take(duplicate).unwrap();
    assert!(received.is_received() && !received.user_mode_only());
    assert_eq!(received.negotiated().enabled, Features::MOVE);
    let flags = rustix::io::fcntl_getfd(&received).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}
