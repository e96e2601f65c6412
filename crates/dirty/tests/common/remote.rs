//! Another process that does with its memory what it is told.
//!
//! It is this test binary again. A test file has a test named `child`, which calls [`serve`].

use std::{
    io::{BufRead, BufReader, Write},
    os::fd::AsRawFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    ptr,
    sync::Arc,
};

use pageferry_dirty::{AlreadyStopped, DirtyError, Freeze, Tracked, Tracker, WpAsync, WpBlocking};
use pageferry_memory::{HostAddress, HostRange, PageSize};
use pageferry_testing::{HugePages, PATIENCE, child};
use pageferry_uffd::{Features, OpenWay, Options, Userfaultfd};
use rustix::{
    mm::{MapFlags, MremapFlags, ProtFlags},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal},
};

use super::{
    field::{Field, Writers},
    memory::{Kind, Memory},
};

const MARK: &str = "> ";

/// In the child: obeys until the parent closes the pipe.
pub(crate) fn serve() {
    let Some(case) = child::case() else { return };
    let (kind, pages) = case.split_once(' ').expect("a kind of memory and a number of pages");
    let say = |text: &str| {
        println!("{MARK}{text}");
        std::io::stdout().flush().unwrap();
    };
    let memory = Memory::reserved(Kind::from_name(kind), pages.parse().unwrap());
    let range = memory.mapping.range();
    say(&format!("{} {}", range.start().get(), range.len()));

    let mut uffd: Option<Userfaultfd> = None;
    let mut writers: Option<Writers> = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let command = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let pages = || memory.pages(numbers[0], numbers[1]);
        let place = || (pages().start().as_ptr().cast(), pages().len() as usize);
        let mut answer = 0;
        match command {
            "write" => memory.write(numbers[0], numbers[1]),
            "read" => answer = memory.read(numbers[0]).into(),
            "discard" => {
                memory.mapping.advise(pages(), pageferry_memory::Advice::DontNeed).unwrap();
            }
            "unmap" => {
                let (start, len) = place();
                // SAFETY: nobody uses this part of the memory any more.
                unsafe { rustix::mm::munmap(start, len) }.unwrap();
            }
            "replace" => {
                let (start, len) = place();
                let (access, flags) =
                    (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
                // SAFETY: nobody has a reference to this part of the memory.
                unsafe { rustix::mm::mmap_anonymous(start, len, access, flags) }.unwrap();
            }
            "move" => {
                let (start, len) = place();
                // SAFETY: nobody uses this part of the memory any more, and what it is moved onto
                // was mapped for that.
                let moved = unsafe {
                    let none = ProtFlags::empty();
                    let flags = MapFlags::PRIVATE;
                    let to = rustix::mm::mmap_anonymous(ptr::null_mut(), len, none, flags).unwrap();
                    rustix::mm::mremap_fixed(start, len, len, MremapFlags::MAYMOVE, to).unwrap()
                };
                // SAFETY: just mapped there, writable.
                unsafe { moved.cast::<u8>().write_volatile(1) };
                answer = HostAddress::from_ptr(moved).get();
            }
            "fork" => {
                // SAFETY: the child does nothing but end.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // SAFETY: it runs nothing that the process would have run at its end.
                    unsafe { libc::_exit(0) };
                }
                let mut status = 0;
                // SAFETY: the status is writable.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(status, 0);
            }
            "open" => {
                let features = Features::from_bits_retain(numbers[0]);
                match Options::new().required(features).open() {
                    Ok(opened) => {
                        use std::os::fd::AsFd;
                        answer = opened.as_fd().as_raw_fd() as u64;
                        uffd = Some(opened);
                    }
                    Err(error) => {
                        say(&format!("skipped: needs {error}"));
                        continue;
                    }
                }
            }
            "close" => uffd = None,
            "start" => {
                let started = Writers::start(&memory.mapping, memory.tracked());
                answer = HostAddress::from_ptr(started.done.as_ptr()).get();
                writers = Some(started);
            }
            "stop" => writers.as_mut().unwrap().stop(),
            "exec" => {
                use std::os::unix::process::CommandExt;
                say("0");
                panic!("{}", Command::new("/proc/self/exe").arg("--exact").arg("idle").exec());
            }
            other => panic!("{other}?"),
        }
        say(&answer.to_string());
    }
    drop(uffd);
}

/// The other process, seen from here. It is killed when this is dropped.
pub(crate) struct Remote {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) tracked: Tracked,
    _huge: Option<HugePages>,
}

impl Remote {
    /// `None`, having said so, when the host lacks what it takes.
    pub(crate) fn new(kind: Kind, pages: u64) -> Option<Self> {
        // By this process: the other one is killed in the end, and could take nothing away.
        let huge = match kind {
            Kind::Hugetlb => Some(HugePages::reserve(pages)?),
            _ => None,
        };
        // Here, so that it ends with this process; and so that those who count see it.
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env("PAGEFERRY_TEST_CASE", format!("{} {pages}", kind.name()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let nothing = HostRange::new(HostAddress::new(0), 0);
        let tracked = Tracked { range: nothing, page: kind.page() };
        let mut remote = Self { child, input, output, tracked, _huge: huge };
        let (start, len) = remote.line();
        remote.tracked.range = HostRange::new(HostAddress::new(start), len);
        Some(remote)
    }

    fn line(&mut self) -> (u64, u64) {
        let text = self.text();
        let (first, second) = text.split_once(' ').unwrap_or((&text, "0"));
        (first.parse().unwrap(), second.parse().unwrap())
    }

    fn text(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the child has ended");
            if let Some((_, text)) = line.trim_end().split_once(MARK) {
                return text.to_owned();
            }
        }
    }

    /// Has it do something; answers what it says.
    #[track_caller]
    pub(crate) fn tell(&mut self, command: &str) -> u64 {
        writeln!(self.input, "{command}").unwrap();
        let text = self.text();
        text.parse().unwrap_or_else(|_| panic!("{command}: {text}"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn pages(&self, first: u64, count: u64) -> HostRange {
        super::pages(self.tracked, first, count)
    }

    /// Has it open a userfaultfd, and takes that away from it.
    fn userfaultfd(&mut self, features: Features) -> Option<Arc<Userfaultfd>> {
        writeln!(self.input, "open {}", features.bits()).unwrap();
        let text = self.text();
        let Ok(number) = text.parse() else {
            println!("{text}");
            return None;
        };
        let pidfd = rustix::process::pidfd_open(self.raw_pid(), PidfdFlags::empty()).unwrap();
        let fd = rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap();
        self.tell("close");
        let uffd = Userfaultfd::from_received_fd(fd, features, OpenWay::DeviceNode).unwrap();
        Some(Arc::new(uffd))
    }

    pub(crate) fn wp_async(&mut self) -> Option<WpAsync> {
        let uffd = self.userfaultfd(WpAsync::FEATURES)?;
        // SAFETY: it was opened by that process.
        Some(unsafe { WpAsync::with_userfaultfd(uffd, self.pid()) }.unwrap())
    }

    pub(crate) fn wp_blocking(&mut self) -> Option<WpBlocking> {
        let uffd = self.userfaultfd(WpBlocking::FEATURES | Features::THREAD_ID)?;
        // SAFETY: it was opened by that process.
        Some(unsafe { WpBlocking::with_userfaultfd(uffd, self.pid()) }.unwrap())
    }

    /// Every method that needs a userfaultfd, by number; `None` when the host has none.
    pub(crate) fn by_userfaultfd(&mut self, method: usize) -> Option<Box<dyn Tracker>> {
        match method {
            0 => Some(Box::new(self.wp_async()?)),
            1 => Some(Box::new(self.wp_blocking()?)),
            _ => panic!("there are two"),
        }
    }

    pub(crate) fn stopper(&self) -> Stopper {
        Stopper(self.raw_pid())
    }

    /// The field of its writers, which are started.
    pub(crate) fn start(&mut self) -> Field {
        let done = HostAddress::new(self.tell("start"));
        Field::new(self.pid(), self.tracked, done)
    }

    pub(crate) fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stops a process by SIGSTOP.
#[derive(Debug)]
pub(crate) struct Stopper(Pid);

impl Freeze for Stopper {
    fn while_frozen(
        &mut self,
        work: &mut dyn FnMut() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        let gone = |_| DirtyError::ProcessGone { pid: self.0.as_raw_pid().cast_unsigned() };
        rustix::process::kill_process(self.0, Signal::STOP).map_err(gone)?;
        let mut stopped = AlreadyStopped { pid: self.0.as_raw_pid().cast_unsigned() };
        let begin = std::time::Instant::now();
        // The signal is under way to some of its threads.
        let result = loop {
            match stopped.while_frozen(work) {
                Err(DirtyError::Running { .. }) if begin.elapsed() < PATIENCE => {
                    std::thread::yield_now();
                }
                result => break result,
            }
        };
        rustix::process::kill_process(self.0, Signal::CONT).map_err(gone)?;
        result
    }
}

/// Memory of base pages.
pub(crate) fn base(range: HostRange) -> Tracked {
    Tracked { range, page: PageSize::base() }
}
