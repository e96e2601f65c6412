//! A process to make checkpoints of: this test binary, run again.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

pub mod disk;

use std::{
    io::{BufRead, BufReader, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use pageferry_memory::{Advice, Mapping, MemoryFile, MemoryFileKind};
use pageferry_process::{Pid, Process};
use pageferry_testing::child;
use pageferry_uffd::{HostAddress, HostRange};
use rustix::mm::{MapFlags, ProtFlags};

/// What a target does, by the name of its case.
pub fn run_as_target(case: &str) -> ! {
    match case {
        "writes" => writes(false),
        "maps" => writes(true),
        "discards" => discards(),
        "execs" => execs(),
        "layers" => layers(),
        "waits" => loop {
            std::thread::park();
        },
        other => panic!("{other} is no target"),
    }
}

const MEMORY: u64 = 24 << 20;
const SHARED: u64 = 4 << 20;

/// Threads that write all the time, everywhere: private memory, half of it as huge pages; a memfd,
/// through two mappings.
fn writes(and_maps: bool) -> ! {
    let plain = Arc::new(Mapping::anonymous(MEMORY).unwrap());
    let huge = Arc::new(Mapping::anonymous(MEMORY).unwrap());
    // A kernel without them does not know the advice.
    let _ = huge.advise(huge.range(), Advice::HugePage);
    let file = MemoryFile::create("target", SHARED, MemoryFileKind::Normal).unwrap();
    let one = Arc::new(Mapping::shared(file.fd(), 0, SHARED, None).unwrap());
    let other = Arc::new(Mapping::shared(file.fd(), 0, SHARED, None).unwrap());
    let ready = Arc::new(AtomicU64::new(0));
    for (number, memory) in [plain, huge, one, other].into_iter().enumerate() {
        let ready = Arc::clone(&ready);
        std::thread::spawn(move || {
            let mut random = pageferry_testing::Random::new(number as u64 + 1);
            let pages = memory.range().len() / 4096;
            // The last quarter is never touched, and some pages are written once only.
            let hot = pages * 3 / 4;
            for page in 0..hot {
                memory.write_at(page * 4096, &(page + 1).to_ne_bytes()).unwrap();
            }
            ready.fetch_add(1, Ordering::SeqCst);
            for turn in 0_u64.. {
                let page = random.below(hot / 2);
                let offset = page * 4096 + 8 * random.below(512);
                memory.write_at(offset, &turn.to_ne_bytes()).unwrap();
                if turn % 64 == 0 {
                    std::thread::yield_now();
                }
            }
        });
    }
    if and_maps {
        std::thread::spawn(|| {
            let mut random = pageferry_testing::Random::new(99);
            let mut kept: Vec<Mapping> = Vec::new();
            loop {
                let memory = Mapping::anonymous((1 + random.below(64)) * 4096).unwrap();
                memory.write_at(0, &[7; 64]).unwrap();
                kept.push(memory);
                if kept.len() > 16 {
                    kept.swap_remove(random.below(16) as usize);
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
    }
    while ready.load(Ordering::SeqCst) < 4 {
        std::thread::yield_now();
    }
    println!("target ready");
    loop {
        std::thread::park();
    }
}

/// Pages that come and go all the time, in a mapping so large that the tracker does not tell of
/// each of them.
fn discards() -> ! {
    let memory = Mapping::anonymous(3 << 30).unwrap();
    // A kernel without huge pages does not know the advice.
    let _ = memory.advise(memory.range(), Advice::NoHugePage);
    let start = memory.range().start().get();
    let mut random = pageferry_testing::Random::new(5);
    println!("target ready");
    for turn in 1_u64.. {
        let page = random.below(512) * 1000;
        memory.write_at(page * 4096, &turn.to_ne_bytes()).unwrap();
        let other = HostAddress::new(start + random.below(512) * 1000 * 4096);
        memory.advise(HostRange::new(other, 4096), Advice::DontNeed).unwrap();
    }
    unreachable!("it ends with its parent")
}

/// Private copies over files without a name, and memory behind the end of one; a shared mapping of
/// such a file is written all the time.
fn layers() -> ! {
    const LEN: u64 = 16 * 4096;
    let map = |file: BorrowedFd<'_>, flags| -> HostAddress {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping somewhere, which stays as long as the process.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), LEN as usize, protection, flags, file, 0)
        };
        HostAddress::from_ptr(at.unwrap())
    };
    let write = |at: HostAddress, page: u64, byte: u8| {
        let to = (at.get() + page * 4096) as *mut u8;
        // SAFETY: a page of one of the mappings above, which nobody has a reference to.
        unsafe { to.write_bytes(byte, 4096) };
    };
    let discard = |at: HostAddress, page: u64, how: rustix::mm::Advice| {
        let at = (at.get() + page * 4096) as *mut std::ffi::c_void;
        // SAFETY: as above.
        unsafe { rustix::mm::madvise(at, 4096, how) }.unwrap();
    };
    // Copies over holes, of which the file never hears.
    let sparse = tempfile::tempfile_in(std::env::current_dir().unwrap()).unwrap();
    sparse.set_len(LEN).unwrap();
    let copies = map(sparse.as_fd(), MapFlags::PRIVATE);
    write(copies, 2, 0xbb);
    let file = MemoryFile::create("layers", LEN, MemoryFileKind::Normal).unwrap();
    let shared = map(file.fd(), MapFlags::SHARED);
    let private = map(file.fd(), MapFlags::PRIVATE);
    for page in 0..8 {
        write(shared, page, 0x11);
    }
    write(private, 1, 0x22);
    let short = MemoryFile::create("short", 4096, MemoryFileKind::Normal).unwrap();
    write(map(short.fd(), MapFlags::SHARED), 0, 0x33);
    println!("target ready");
    for turn in 0_u64.. {
        write(shared, turn % 8, turn as u8);
        write(copies, 9 + turn % 3, turn as u8);
        // Written, and discarded again: holes in the file, and copies that are given up.
        write(shared, 8 + turn % 5, turn as u8);
        discard(shared, 8 + (turn + 3) % 5, rustix::mm::Advice::LinuxRemove);
        write(private, 3 + turn % 7, turn as u8);
        discard(private, 3 + (turn + 2) % 7, rustix::mm::Advice::LinuxDontNeed);
    }
    unreachable!("it ends with its parent")
}

/// Starts another program as soon as it is told to, by its standard input.
fn execs() -> ! {
    let memory = Mapping::anonymous(64 << 20).unwrap();
    memory.advise(memory.range(), Advice::PopulateWrite).unwrap();
    println!("target ready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    // This program once more: there may be no other one.
    let error = Command::new(std::env::current_exe().unwrap())
        .args(["target", "--exact", "--nocapture", "--test-threads=1"])
        .env("PAGEFERRY_TEST_CASE", "waits")
        .exec();
    panic!("{error}")
}

/// A target that runs; killed on drop.
pub struct Target {
    child: Child,
    _out: BufReader<ChildStdout>,
}

impl Target {
    /// Starts one, and waits until it does what it is to do.
    pub fn start(case: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["target", "--exact", "--nocapture", "--test-threads=1"])
            .env("PAGEFERRY_TEST_CASE", case)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("target ready") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "the target ended early");
        }
        Self { child, _out: out }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    pub fn process(&self) -> Process {
        Process::open(self.pid()).unwrap()
    }

    /// Lets it do what it waits for.
    pub fn tell(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it still runs: not ended, not stopped, and its threads get on.
    pub fn assert_runs(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "it has ended");
        let time = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            let fields = stat.rsplit_once(") ").unwrap().1.to_owned();
            let state = fields.as_bytes()[0];
            assert!(matches!(state, b'R' | b'S'), "it is in state {}", state as char);
            fields.split(' ').nth(11).unwrap().parse::<u64>().unwrap()
        };
        let before = time();
        pageferry_testing::wait_for("the target gets on", || time() > before);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a test named `target`: what a child of this binary does.
pub fn target() {
    if let Some(case) = child::case() {
        run_as_target(&case);
    }
}
