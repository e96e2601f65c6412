//! A process that is tracked, seen from the tracker: it is told what to do, and what its memory
//! contains is known only from what harvests say.
#![allow(dead_code, reason = "each test uses a part of it")]

#[path = "process_child.rs"]
mod process_child;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

use pageferry_dirty::{
    AttachOptions, DirtyError, Method, ProcessHarvest, ProcessTrackError, ProcessTracker,
};
use pageferry_process::{Detail, Mapping, Pid, Process, ProcessError};
use pageferry_testing::PATIENCE;
use pageferry_uffd::{HostAddress, HostRange, Pagemap, PagemapEntry};
pub(crate) use process_child::{MARK, PAGE, serve};

pub(crate) const METHODS: [Method; 3] = [Method::WpAsync, Method::WpBlocking, Method::SoftDirty];

/// A process that obeys. It is killed when this is dropped.
pub(crate) struct Target {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// A command that runs `test` of this binary again, for `case`.
pub(crate) fn again(test: &str, case: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("PAGEFERRY_TEST_CASE", case);
    // The C library would reserve 64 MiB for each thread, which are looked at page by page here.
    command.env("MALLOC_ARENA_MAX", "1");
    command
}

impl Target {
    /// The test binary has a test of this name, which serves.
    #[track_caller]
    pub(crate) fn start() -> Self {
        let target = Self::spawn(&mut again("process_child", "serve"));
        assert_eq!(target.hear(), "here");
        target
    }

    #[track_caller]
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a child");
        let output = BufReader::new(child.stdout.take().unwrap());
        let (say, lines) = channel();
        thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                // The harness does not end the line in which it names the test.
                if let Some((_, line)) = line.split_once(MARK) {
                    let _ = say.send(line.to_owned());
                }
            }
        });
        Self { input: child.stdin.take(), child, lines }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    #[track_caller]
    pub(crate) fn process(&self) -> Process {
        Process::open(self.pid()).unwrap()
    }

    /// The next line that it says.
    #[track_caller]
    pub(crate) fn hear(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line of the child")
    }

    #[track_caller]
    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Has it do something; answers what it says.
    #[track_caller]
    pub(crate) fn tell(&mut self, command: &str, numbers: &[u64]) -> u64 {
        let answer = self.try_tell(command, numbers);
        answer.unwrap_or_else(|| panic!("it cannot {command} {numbers:?}"))
    }

    /// `None` when it cannot.
    #[track_caller]
    pub(crate) fn try_tell(&mut self, command: &str, numbers: &[u64]) -> Option<u64> {
        let numbers: Vec<_> = numbers.iter().map(u64::to_string).collect();
        self.say(&format!("{command} {}", numbers.join(" ")));
        self.hear().parse().ok()
    }

    /// Has it map memory of a kind.
    #[track_caller]
    pub(crate) fn map(&mut self, kind: &str, len: u64) -> HostRange {
        HostRange::new(HostAddress::new(self.tell(kind, &[len])), len)
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for its end: its status, or minus the number of the signal that ended it.
    #[track_caller]
    pub(crate) fn end(&mut self) -> i32 {
        self.input = None;
        let status = self.child.wait().unwrap();
        status.code().unwrap_or_else(|| -status.signal().unwrap())
    }

    /// Waits until all its threads wait for something.
    #[track_caller]
    pub(crate) fn settle(&self) {
        let waits = |entry: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(entry.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('S')
        };
        let path = format!("/proc/{}/task", self.pid());
        pageferry_testing::wait_for("all threads to wait", || {
            std::fs::read_dir(&path).unwrap().all(waits)
        });
    }

    /// What is to be the same before and after tracking: what is mapped, with its flags; the
    /// descriptors; what its threads are like.
    pub(crate) fn condition(&self) -> String {
        let pid = self.pid();
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let smaps = read("smaps");
        let maps = smaps.lines().filter(|line| {
            line.starts_with("VmFlags") || line.split(' ').next().unwrap().contains('-')
        });
        let status = read("status");
        let status = status.lines().filter(|line| {
            // How many signals its user has waiting, in all processes, is no matter.
            !line.starts_with("SigQ")
                && ["TracerPid", "Threads", "FDSize", "Sig", "Shd", "Seccomp", "Cap", "State"]
                    .iter()
                    .any(|key| line.starts_with(key))
        });
        let mut descriptors: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap())
            .collect();
        descriptors.sort();
        let lines: Vec<_> = maps.chain(status).collect();
        format!("{}\n{descriptors:?}", lines.join("\n"))
    }

    /// Whether any of its memory is registered with a userfaultfd.
    pub(crate) fn is_registered(&self) -> bool {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
        flags.flat_map(str::split_whitespace).any(|flag| ["um", "uw", "ui"].contains(&flag))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have ended, and have been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tracks a process by this method; `None`, having said so, when the host lacks what it takes.
#[track_caller]
pub(crate) fn attach(process: &Process, method: Method) -> Option<ProcessTracker> {
    let options = AttachOptions { method: Some(method), ..AttachOptions::default() };
    match ProcessTracker::attach(process.clone(), &options) {
        Ok(tracker) => {
            assert_eq!((tracker.choice().method, tracker.process().pid()), (method, process.pid()));
            Some(tracker)
        }
        Err(error) => {
            say_skipped(error);
            None
        }
    }
}

/// Says what the host lacks; any other error is a failure.
#[track_caller]
pub(crate) fn say_skipped(error: ProcessTrackError) {
    match error {
        ProcessTrackError::Dirty(DirtyError::Missing { what, .. }) => {
            println!("skipped: needs soft-dirty bits: {what}");
        }
        ProcessTrackError::Process(error @ ProcessError::NoUserfaultfd { .. }) => {
            println!("skipped: needs a userfaultfd: {error}");
        }
        error => panic!("{error}"),
    }
}

/// Harvests, with the process stopped if asked for or needed; answers also whether it was.
#[track_caller]
pub(crate) fn harvest(
    tracker: &mut ProcessTracker,
    process: &Process,
    stopped: bool,
) -> ProcessHarvest {
    let found = if stopped || tracker.needs_stop() {
        let stopped = process.stop().unwrap();
        tracker.harvest(Some(&stopped)).unwrap()
    } else {
        tracker.harvest(None).unwrap()
    };
    check_form(&found);
    found
}

/// Looks at the form of what was found.
#[track_caller]
pub(crate) fn check_form(found: &ProcessHarvest) {
    let apart = |ranges: &[HostRange]| ranges.windows(2).all(|two| two[0].end() <= two[1].start());
    let mappings: Vec<_> = found.mappings.iter().map(|mapping| mapping.range).collect();
    assert!(apart(&mappings) && apart(&found.changed) && apart(&found.wholesale), "{found:?}");
    for range in &found.changed {
        let inside = found
            .mappings
            .iter()
            .any(|mapping| mapping.takeable().is_ok() && mapping.range.contains_range(*range));
        assert!(inside && !range.is_empty(), "{range}");
        assert!(range.start().is_aligned(PAGE) && range.len().is_multiple_of(PAGE), "{range}");
    }
    for range in &found.wholesale {
        assert!(found.changed.iter().any(|changed| changed.contains_range(*range)), "{range}");
    }
}

/// The parts of what changed that are in a range.
pub(crate) fn changed_in(found: &ProcessHarvest, range: HostRange) -> Vec<HostRange> {
    found.changed.iter().filter_map(|changed| changed.intersection(range)).collect()
}

/// So many pages from a first one on.
pub(crate) fn pages(range: HostRange, first: u64, count: u64) -> HostRange {
    range.skip(first * PAGE).take(count * PAGE)
}

/// A copy of the memory of a process, kept up to date by harvests alone.
pub(crate) struct Mirror {
    process: Process,
    pagemap: Pagemap,
    pages: BTreeMap<u64, Vec<u8>>,
    /// Whether the method does not report private pages that come and go between two harvests.
    forgets: bool,
}

impl Mirror {
    /// Takes a copy of all that can be taken.
    #[track_caller]
    pub(crate) fn new(process: &Process, tracker: &ProcessTracker) -> Self {
        let pid = process.pid().as_raw_nonzero().get().unsigned_abs();
        let pagemap = Pagemap::open(pid).unwrap();
        let mut mirror = Self {
            process: process.clone(),
            pagemap,
            pages: BTreeMap::new(),
            forgets: tracker.needs_stop(),
        };
        for mapping in process.mappings(Detail::Full).unwrap() {
            if mapping.takeable().is_ok() {
                mirror.copy(&mapping, mapping.range);
            }
        }
        mirror
    }

    /// Copies again what a harvest has found.
    pub(crate) fn update(&mut self, found: &ProcessHarvest) {
        let taken: Vec<_> = takeable(found).map(|mapping| mapping.range).collect();
        self.pages.retain(|&page, _| {
            let place = taken.partition_point(|range| range.end().get() <= page);
            taken.get(place).is_some_and(|range| range.start().get() <= page)
        });
        for mapping in takeable(found) {
            for range in changed_in(found, mapping.range) {
                self.copy(mapping, range);
            }
            if !mapping.shared && (mapping.inode != 0 || self.forgets) {
                self.forget_absent(mapping);
            }
        }
    }

    /// What is not the process's own is the file's, or zeros, whatever was copied when it was.
    fn forget_absent(&mut self, mapping: &Mapping) {
        let mut not_own = Vec::new();
        self.each_page(mapping, mapping.range, |page, bytes| {
            if bytes.is_none() {
                not_own.push(page);
            }
        });
        for page in not_own {
            self.pages.remove(&page);
        }
    }

    /// Compares it with the process, which is stopped; answers how many pages it looked at.
    #[track_caller]
    pub(crate) fn check(&self, found: &ProcessHarvest, what: &str) -> usize {
        let mut looked = 0;
        for mapping in takeable(found) {
            let file = mapping.inode != 0;
            self.each_page(mapping, mapping.range, |page, bytes| {
                let copy = self.pages.get(&page).map(Vec::as_slice);
                let now = match (bytes, copy) {
                    (Some(bytes), _) => Some(bytes.to_vec()),
                    (None, Some(_)) if file => self.read(page),
                    _ => None,
                };
                let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
                let same = match (now.as_deref(), copy) {
                    (Some(now), Some(copy)) => now == copy,
                    // A page that is not there is as one of zeros.
                    (Some(bytes), None) | (None, Some(bytes)) => zeros(bytes),
                    (None, None) => true,
                };
                looked += 1;
                assert!(
                    same,
                    "{what}: the page at {page:#x} has changed, and was not reported: {:?} in \
                     {mapping:?}",
                    difference(now.as_deref(), copy)
                );
            });
        }
        looked
    }

    fn copy(&mut self, mapping: &Mapping, range: HostRange) {
        let mut copied = Vec::new();
        self.each_page(mapping, range, |page, bytes| {
            copied.push((page, bytes.map(<[u8]>::to_vec)))
        });
        for (page, bytes) in copied {
            match bytes {
                Some(bytes) => drop(self.pages.insert(page, bytes)),
                None => drop(self.pages.remove(&page)),
            }
        }
    }

    fn read(&self, page: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE as usize];
        let read = self.process.read_memory_exact(HostAddress::new(page), &mut bytes);
        read.ok().map(|()| bytes)
    }

    /// Shows every page. `None` is one of a private mapping that is not the process's own, but zeros
    /// or the file's; or one that cannot be read.
    fn each_page(
        &self,
        mapping: &Mapping,
        range: HostRange,
        mut each: impl FnMut(u64, Option<&[u8]>),
    ) {
        const PIECE: u64 = 256;
        let mut buffer = vec![0; (PIECE * PAGE) as usize];
        let mut entries = vec![PagemapEntry::default(); PIECE as usize];
        let mut left = range;
        while !left.is_empty() {
            let piece = left.take(PIECE * PAGE);
            left = left.skip(piece.len());
            let count = (piece.len() / PAGE) as usize;
            entries.fill(PagemapEntry::default());
            // A process that has just gone has no pages.
            let known = self.pagemap.read_entries(piece, &mut entries[..count]).unwrap_or(0);
            let own = |entry: &PagemapEntry| {
                mapping.shared || entry.swapped() || entry.present() && !entry.file()
            };
            let mut done = 0;
            for run in entries[..known].chunk_by(|a, b| own(a) == own(b)) {
                let at = piece.skip(done as u64 * PAGE).start();
                let bytes = &mut buffer[..run.len() * PAGE as usize];
                done += run.len();
                let got = match own(&run[0]) {
                    true => self.process.read_memory(at, bytes).unwrap_or(0),
                    false => 0,
                };
                for (index, page) in bytes.chunks_mut(PAGE as usize).enumerate() {
                    let address = at.get() + index as u64 * PAGE;
                    let mut there = (index + 1) * PAGE as usize <= got;
                    if own(&run[0]) && !there {
                        let at = HostAddress::new(address);
                        there = self.process.read_memory_exact(at, page).is_ok();
                    }
                    each(address, there.then_some(&*page));
                }
            }
            for page in done..count {
                each(piece.skip(page as u64 * PAGE).start().get(), None);
            }
        }
    }
}

/// Whether the pages are there, and where they differ.
fn difference(now: Option<&[u8]>, before: Option<&[u8]>) -> (bool, bool, Option<usize>) {
    let differ = now.zip(before).and_then(|(a, b)| a.iter().zip(b).position(|(a, b)| a != b));
    (now.is_some(), before.is_some(), differ)
}

fn takeable(found: &ProcessHarvest) -> impl Iterator<Item = &Mapping> {
    found.mappings.iter().filter(|mapping| mapping.takeable().is_ok())
}
