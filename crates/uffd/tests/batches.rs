//! Events of every kind come in one read, in one buffer.

mod common;

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use common::{Backing, Memory, PATIENCE, contents, open, run, wait_readable};
use pageferry_uffd::{
    CopyMode, Event, EventBuffer, Fault, FaultKind, Features, Mapped, RegisterMode, Wake,
};

fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

/// Waits until a thread is held by a fault: in the kernel outside of any system call
/// (proc_pid_syscall(5)) and, where the kernel tells, in the function for that.
fn wait_held(thread: u32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let read = |file| fs::read_to_string(format!("/proc/self/task/{thread}/{file}")).unwrap();
        let (call, place) = (read("syscall"), read("wchan"));
        if call.starts_with("-1 ") && ["handle_userfault", "0", ""].contains(&place.trim()) {
            return;
        }
        assert!(Instant::now() < deadline, "thread {thread} is not held: {call:?} {place:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn one_read_takes_events_of_every_kind() {
    let features = Features::EVENT_REMOVE
        | Features::PAGEFAULT_FLAG_WP
        | Features::MINOR_SHMEM
        | Features::THREAD_ID;
    let Some(userfaultfd) = open(features) else { return };
    let anonymous = Memory::new(Backing::Anonymous, 5).unwrap();
    let file = Memory::new(Backing::Memfd, 1).unwrap();
    let page = anonymous.page_size();
    file.write_alias(0, 0x5b);
    let missing = RegisterMode::MISSING | RegisterMode::WP;
    let register = |memory: &Arc<Memory>, mode| {
        userfaultfd.register(Arc::clone(memory), memory.range(), mode).unwrap()
    };
    let _registered = [register(&anonymous, missing), register(&file, RegisterMode::MINOR)];
    // Page 2 is there, and protected; page 3 is there, to be discarded.
    for index in [2, 3] {
        let start = anonymous.page(index).start();
        let outcome = userfaultfd.copy(start, &contents(page, [index as u8]), CopyMode::WAKE);
        assert!(outcome.unwrap().is_complete());
    }
    let protected = userfaultfd.write_protect(anonymous.page(2), true, Wake::Yes);
    assert!(protected.unwrap().is_complete());

    // The discard first: a descriptor with nothing else to say is readable once that is pending.
    let discarder = Arc::clone(&anonymous);
    let discard = run(move || discarder.discard(discarder.page(3)));
    wait_readable(&*userfaultfd);

    type Touch = fn(&Memory, &Memory) -> u8;
    let touches: [(Touch, FaultKind, bool, u8); 4] = [
        (|anonymous, _| anonymous.read(0), FaultKind::Missing, false, 0x5a),
        (
            |anonymous, _| {
                anonymous.write(1, 7);
                anonymous.read(1)
            },
            FaultKind::Missing,
            true,
            7,
        ),
        (
            |anonymous, _| {
                anonymous.write(2, 8);
                anonymous.read(2)
            },
            FaultKind::WriteProtect,
            true,
            8,
        ),
        (|_, file| file.read(0), FaultKind::Minor, false, 0x5b),
    ];
    let mut expected = HashMap::new();
    let mut running = Vec::new();
    for (touch, kind, write, byte) in touches {
        let (anonymous, file) = (Arc::clone(&anonymous), Arc::clone(&file));
        let (sender, receiver) = mpsc::channel();
        running.push((
            run(move || {
                sender.send(thread_id()).unwrap();
                touch(&anonymous, &file)
            }),
            byte,
        ));
        let thread = receiver.recv_timeout(PATIENCE).unwrap();
        wait_held(thread);
        expected.insert(thread, (kind, write));
    }

    let mut buffer = EventBuffer::new(64);
    assert_eq!(userfaultfd.read_events(&mut buffer), Ok(5), "all of them in one read");
    assert_eq!(userfaultfd.read_events(&mut buffer), Ok(0), "none of them twice");
    let (mut removed, mut faults) = (Vec::new(), Vec::new());
    for event in buffer.drain() {
        match event.unwrap() {
            Event::Remove(range) => removed.push(range),
            Event::Fault(fault) => faults.push(fault),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(removed, [anonymous.page(3)]);
    discard.finish();
    for &Fault { address, kind, write, thread } in &faults {
        let thread = thread.expect("asked for");
        assert_eq!(expected.remove(&thread), Some((kind, write)), "at {address}");
        let resolved = match kind {
            FaultKind::Missing => {
                userfaultfd.copy(address, &contents(page, [0x5a]), CopyMode::WAKE)
            }
            FaultKind::Minor => userfaultfd.continue_range(file.page(0), CopyMode::WAKE),
            FaultKind::WriteProtect => {
                userfaultfd.write_protect(anonymous.page(2), false, Wake::Yes)
            }
        };
        assert!(resolved.unwrap().is_complete());
    }
    assert!(expected.is_empty(), "no fault of {expected:?}");
    for (thread, byte) in running {
        assert_eq!(thread.finish(), byte);
    }
}

#[test]
fn a_small_buffer_leaves_the_rest_for_the_next_read() {
    const THREADS: u64 = 6;
    let Some(userfaultfd) = open(Features::empty()) else { return };
    let memory = Memory::new(Backing::Anonymous, THREADS).unwrap();
    let _registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING).unwrap();
    let threads: Vec<_> = (0..THREADS)
        .map(|page| {
            let memory = Arc::clone(&memory);
            let (sender, receiver) = mpsc::channel();
            let thread = run(move || {
                sender.send(thread_id()).unwrap();
                memory.read(page)
            });
            wait_held(receiver.recv_timeout(PATIENCE).unwrap());
            thread
        })
        .collect();
    let mut buffer = EventBuffer::new(4);
    let mut pages = Vec::new();
    for count in [4, 2, 0] {
        assert_eq!(userfaultfd.read_events(&mut buffer), Ok(count));
        pages.extend(buffer.drain().map(|event| match event {
            Ok(Event::Fault(fault)) => fault.address,
            other => panic!("{other:?}"),
        }));
    }
    pages.sort();
    let all: Vec<_> = (0..THREADS).map(|page| memory.page(page).start()).collect();
    assert_eq!(pages, all);
    assert!(userfaultfd.zeropage(memory.range(), Wake::Yes).unwrap().is_complete());
    for thread in threads {
        assert_eq!(thread.finish(), 0);
    }
}
