//! Every outcome of every operation that a kernel can be brought to, and progress that is kept.
//!
//! Not here: a poisoned page cache (EHWPOISON) takes a page of real memory for good.

mod common;

use std::{
    io::{BufRead as _, BufReader},
    os::fd::AsRawFd as _,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

use common::{Backing, Memory, contents, next_event, next_fault, open, run, wait_readable};
use pageferry_uffd::{
    CopyMode, Errno, Event, EventBuffer, FaultKind, Features, HostAddress, HostRange, Mapped,
    MoveMode, OpenWay, Outcome, RegisterMode, UffdError, Userfaultfd, Wake,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const FEATURES: Features = Features::EVENT_REMOVE
    .union(Features::PAGEFAULT_FLAG_WP)
    .union(Features::MINOR_SHMEM)
    .union(Features::POISON)
    .union(Features::MOVE);

/// Where each operation is tried: a page of its own each.
#[derive(Copy, Clone)]
struct Places {
    copy: HostRange,
    zeropage: HostRange,
    poison: HostRange,
    protect: HostRange,
    moved: HostRange,
    /// Not registered.
    pool: HostRange,
    /// Of a file, and in the page cache.
    continued: HostRange,
}

type Results = [(&'static str, Result<Outcome, UffdError>); 7];

fn try_all(userfaultfd: &Userfaultfd, at: Places) -> Results {
    let bytes = contents(at.copy.len(), [0x5a]);
    let mode = CopyMode::WAKE;
    // SAFETY: nothing relies on the contents of the pool.
    let moved = unsafe { userfaultfd.move_pages(at.moved.start(), at.pool, MoveMode::default()) };
    [
        ("copy", userfaultfd.copy(at.copy.start(), &bytes, mode)),
        ("zeropage", userfaultfd.zeropage(at.zeropage, Wake::Yes)),
        ("poison", userfaultfd.poison(at.poison, Wake::Yes)),
        ("write-protect", userfaultfd.write_protect(at.protect, true, Wake::Yes)),
        ("write-unprotect", userfaultfd.write_protect(at.protect, false, Wake::Yes)),
        ("continue", userfaultfd.continue_range(at.continued, mode)),
        ("move", moved),
    ]
}

#[track_caller]
fn expect_all(results: Results, expected: Outcome) {
    for (name, result) in results {
        assert_eq!(result, Ok(expected), "{name}");
    }
}

/// Memory for all of it; page 0 of the first is for whoever wants to cause an event.
struct Room {
    anonymous: Arc<Memory>,
    file: Arc<Memory>,
    pool: Arc<Memory>,
}

impl Room {
    fn new() -> Self {
        let room = Self {
            anonymous: Memory::new(Backing::Anonymous, 6).unwrap(),
            file: Memory::new(Backing::Memfd, 1).unwrap(),
            pool: Memory::new(Backing::Anonymous, 1).unwrap(),
        };
        room.file.write_alias(0, 0x5b);
        room.pool.write(0, 0x5c);
        room
    }

    fn register(&self, userfaultfd: &Userfaultfd) {
        let missing = RegisterMode::MISSING | RegisterMode::WP;
        // SAFETY: memory of the test, whose contents are nobody's values. It outlives the
        // registration: unmapping ends that.
        unsafe {
            userfaultfd.register_raw(self.anonymous.range(), missing).unwrap();
            userfaultfd.register_raw(self.file.range(), RegisterMode::MINOR).unwrap();
        }
    }

    fn places(&self) -> Places {
        let page = |index| self.anonymous.page(index);
        Places {
            copy: page(1),
            zeropage: page(2),
            poison: page(3),
            protect: page(4),
            moved: page(5),
            pool: self.pool.page(0),
            continued: self.file.page(0),
        }
    }
}

#[test]
fn everything_waits_for_an_event_to_be_read_and_then_goes_on() {
    let Some(userfaultfd) = open(FEATURES) else { return };
    let room = Room::new();
    room.register(&userfaultfd);
    let discarder = Arc::clone(&room.anonymous);
    let discard = run(move || discarder.discard(discarder.page(0)));
    wait_readable(&*userfaultfd);
    expect_all(try_all(&userfaultfd, room.places()), Outcome::Retry { done: 0 });

    assert!(
        matches!(next_event(&userfaultfd), Event::Remove(range) if range == room.anonymous.page(0))
    );
    discard.finish();
    let bytes = room.anonymous.page_size();
    expect_all(try_all(&userfaultfd, room.places()), Outcome::Installed { bytes });
    let read = [room.anonymous.read(1), room.anonymous.read(2), room.anonymous.read(5)];
    assert_eq!((read, room.file.read(0)), ([0x5a, 0, 0x5c], 0x5b));

    // Once more: what is there is there. (A protected range can be protected again.)
    room.pool.write(0, 0x5d);
    for (name, result) in try_all(&userfaultfd, room.places()) {
        let expected = match name {
            "write-protect" | "write-unprotect" => Outcome::Installed { bytes },
            _ => Outcome::AlreadyPresent { done: 0 },
        };
        // POISON's mark may be replaced by a page, but not by another mark.
        assert_eq!(result, Ok(expected), "{name}");
    }
    assert_eq!(room.pool.read(0), 0x5d, "what was not moved is still there");
}

#[test]
fn ranges_that_are_not_registered_are_gone() {
    let Some(userfaultfd) = open(FEATURES) else { return };
    let room = Room::new();
    for (name, result) in try_all(&userfaultfd, room.places()) {
        match (name, result) {
            // The kernel has no other word for a destination that does not fit.
            ("move", Err(error)) => assert_eq!(error.errno(), Some(Errno::INVAL)),
            (_, result) => assert_eq!(result, Ok(Outcome::RangeGone { done: 0 }), "{name}"),
        }
    }
    assert_eq!(room.pool.read(0), 0x5c);
}

#[test]
fn progress_before_a_present_page_is_kept_by_every_operation() {
    let features = Features::POISON | Features::MOVE | Features::MINOR_SHMEM;
    let Some(userfaultfd) = open(features) else { return };
    type Operate = fn(&Userfaultfd, HostRange, HostRange) -> Result<Outcome, UffdError>;
    let cases: [(&str, Backing, RegisterMode, Operate); 4] = [
        ("zeropage", Backing::Anonymous, RegisterMode::MISSING, |userfaultfd, range, _| {
            userfaultfd.zeropage(range, Wake::Yes)
        }),
        ("poison", Backing::Anonymous, RegisterMode::MISSING, |userfaultfd, range, _| {
            userfaultfd.poison(range, Wake::Yes)
        }),
        ("move", Backing::Anonymous, RegisterMode::MISSING, |userfaultfd, range, pool| {
            // SAFETY: nothing relies on the contents of the pool.
            unsafe { userfaultfd.move_pages(range.start(), pool, MoveMode::default()) }
        }),
        ("continue", Backing::Memfd, RegisterMode::MINOR, |userfaultfd, range, _| {
            userfaultfd.continue_range(range, CopyMode::WAKE)
        }),
    ];
    for (name, backing, mode, operate) in cases {
        let memory = Memory::new(backing, 5).unwrap();
        let pool = Memory::new(Backing::Anonymous, 5).unwrap();
        let page = memory.page_size();
        for index in 0..5 {
            pool.write(index, 1);
            if backing == Backing::Memfd {
                memory.write_alias(index, 1);
            }
        }
        let _registration =
            userfaultfd.register(Arc::clone(&memory), memory.range(), mode).unwrap();
        let third = operate(&userfaultfd, memory.page(3), pool.page(3));
        assert_eq!(third, Ok(Outcome::Installed { bytes: page }), "{name}");
        let from = |first| {
            operate(&userfaultfd, memory.pages(first, 5 - first), pool.pages(first, 5 - first))
        };
        assert_eq!(from(0), Ok(Outcome::Retry { done: 3 * page }), "{name}");
        assert_eq!(from(3), Ok(Outcome::AlreadyPresent { done: 0 }), "{name}");
        assert_eq!(from(4), Ok(Outcome::Installed { bytes: page }), "{name}");
    }
}

const CHILD: &str = "PAGEFERRY_TEST_SERVED_CHILD";

/// A process whose memory is served by another one: runs itself again as that process.
#[test]
fn a_process_is_served_by_another_until_it_is_gone() {
    if std::env::var_os(CHILD).is_some() {
        served();
        return;
    }
    if open(FEATURES).is_none() {
        return;
    }
    let mut child = Command::new("/proc/self/exe")
        .args(["a_process_is_served_by_another_until_it_is_gone", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let numbers = said(&mut output, "ready ");
    let numbers: Vec<u64> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
    let [fd, page, anonymous, file, pool] = numbers[..] else { panic!("{numbers:?}") };
    let Some(userfaultfd) = take_over(&mut child, fd as i32) else { return };
    let at = |start: u64, index: u64| HostRange::new(HostAddress::new(start + index * page), page);

    let fault = next_fault(&userfaultfd, FaultKind::Missing, at(anonymous, 0));
    assert!(!fault.write);
    let bytes = contents(page, [0x5a]);
    let outcome = userfaultfd.copy(fault.address, &bytes, CopyMode::WAKE);
    assert_eq!(outcome, Ok(Outcome::Installed { bytes: page }));
    assert_eq!(said(&mut output, "read "), "90");
    // SAFETY: the child does nothing with its pool.
    let moved = unsafe {
        userfaultfd.move_pages(at(anonymous, 5).start(), at(pool, 0), MoveMode::default())
    };
    assert_eq!(moved.unwrap_err().errno(), Some(Errno::INVAL), "not from another process");

    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let places = Places {
        copy: at(anonymous, 1),
        zeropage: at(anonymous, 2),
        poison: at(anonymous, 3),
        protect: at(anonymous, 4),
        moved: at(anonymous, 5),
        pool: at(pool, 0),
        continued: at(file, 0),
    };
    for (name, result) in try_all(&userfaultfd, places) {
        match (name, result) {
            // Pages are moved only by the process whose they are; nobody is asked whether it lives.
            ("move", Err(error)) => assert_eq!(error.errno(), Some(Errno::INVAL)),
            (_, result) => assert_eq!(result, Ok(Outcome::ProcessGone { done: 0 }), "{name}"),
        }
    }
    // Registering has no outcome of its own for it: the kernel says that there is no memory.
    // SAFETY: there is none indeed, and nobody whose it could be.
    let registered = unsafe { userfaultfd.register_raw(places.copy, RegisterMode::MISSING) };
    assert_eq!(registered.unwrap_err().errno(), Some(Errno::NOMEM));
    userfaultfd.wake(places.copy).unwrap();
    assert_eq!(userfaultfd.read_events(&mut EventBuffer::new(4)), Ok(0));
}

fn served() {
    let userfaultfd = open(FEATURES).unwrap();
    let room = Room::new();
    room.register(&userfaultfd);
    let fd = rustix::fd::AsFd::as_fd(&*userfaultfd).as_raw_fd();
    let start = |memory: &Memory| memory.range().start().get();
    let (page, anonymous) = (room.anonymous.page_size(), start(&room.anonymous));
    println!("ready {fd} {page} {anonymous} {} {}", start(&room.file), start(&room.pool));
    println!("read {}", room.anonymous.read(0));
    // Until the other end is closed.
    assert_eq!(rustix::io::read(std::io::stdin(), &mut [0_u8]), Ok(0));
}

/// The rest of the first line in which the child says `word`.
fn said(output: &mut BufReader<ChildStdout>, word: &str) -> String {
    loop {
        let mut line = String::new();
        assert!(output.read_line(&mut line).unwrap() > 0, "the child says {word:?}");
        // The test runner begins a line that it does not end.
        if let Some((_, rest)) = line.split_once(word) {
            return rest.trim_end().to_owned();
        }
    }
}

fn take_over(child: &mut Child, fd: i32) -> Option<Userfaultfd> {
    let pid = Pid::from_child(child);
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    match pidfd_getfd(process, fd, PidfdGetfdFlags::empty()) {
        Ok(fd) => Some(Userfaultfd::from_received_fd(fd, FEATURES, OpenWay::Syscall).unwrap()),
        Err(errno) => {
            println!("skipped: needs the right to take a descriptor of a child: {errno}");
            child.kill().unwrap();
            child.wait().unwrap();
            None
        }
    }
}
