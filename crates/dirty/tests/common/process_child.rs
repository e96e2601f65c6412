//! The process that is tracked: it does with its memory what it is told, by lines.
//!
//! It is this test binary again, in a test that calls [`serve`].

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::Command,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use pageferry_testing::{Random, child};
use pageferry_uffd::{Features, HostAddress, HostRange, Options, RegisterMode, Userfaultfd, Wake};
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

pub(crate) const MARK: &str = "child: ";
pub(crate) const PAGE: u64 = 4096;

/// In the child: obeys until the parent closes the pipe.
pub(crate) fn serve() {
    if child::case().is_none() {
        return;
    }
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    tell("here");
    let mut state = State::default();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, numbers) = line.split_once(' ').unwrap_or((&line, ""));
        let numbers: Vec<u64> =
            numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
        match state.obey(command, &numbers) {
            Some(answer) => tell(&answer.to_string()),
            None => tell("no"),
        }
    }
    std::process::exit(0)
}

/// In the child: says a line to the parent.
pub(crate) fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{line}").unwrap();
    out.flush().unwrap();
}

#[derive(Default)]
struct State {
    uffd: Option<Userfaultfd>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    rounds: Arc<AtomicU64>,
}

fn at(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(address as usize)
}

fn address(pointer: *mut std::ffi::c_void) -> u64 {
    pointer.expose_provenance() as u64
}

/// Writes a word.
fn poke(address: u64, value: u64) {
    // SAFETY: the parent, or the thread that mapped it, knows that it is mapped and writable, and
    // nobody has a reference to it.
    unsafe { at(address).cast::<u64>().write_volatile(value) }
}

fn peek(address: u64) -> u64 {
    // SAFETY: as in `poke`.
    unsafe { at(address).cast::<u64>().read_volatile() }
}

/// Maps memory; `None` when there is none of that kind.
fn map(place: Option<u64>, len: u64, protection: ProtFlags, flags: MapFlags) -> Option<u64> {
    let fixed = if place.is_some() { MapFlags::FIXED } else { MapFlags::empty() };
    let start = place.map_or(ptr::null_mut(), at);
    // SAFETY: what was at a place that is asked for is memory that only the parent knows of.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(start.cast(), len as usize, protection, flags | fixed)
    };
    mapped.ok().map(address)
}

const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A file of this length with a word in each page, mapped.
fn map_file(len: u64, flags: MapFlags) -> u64 {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..len / PAGE {
        let mut bytes = [0; PAGE as usize];
        bytes[..8].copy_from_slice(&(page + 1).to_ne_bytes());
        file.write_all(&bytes).unwrap();
    }
    // SAFETY: a new mapping, where the kernel finds room.
    let mapped =
        unsafe { rustix::mm::mmap(ptr::null_mut(), len as usize, ACCESS, flags, &file, 0) };
    address(mapped.unwrap())
}

fn unmap(address: u64, len: u64) {
    // SAFETY: nobody uses it any more.
    unsafe { rustix::mm::munmap(at(address).cast(), len as usize) }.unwrap();
}

fn advise(address: u64, len: u64, advice: i32) {
    // SAFETY: nobody has a reference to it.
    assert_eq!(unsafe { libc::madvise(at(address).cast(), len as usize, advice) }, 0);
}

fn protect(address: u64, len: u64, access: MprotectFlags) {
    // SAFETY: nobody has a reference to it.
    unsafe { rustix::mm::mprotect(at(address).cast(), len as usize, access) }.unwrap();
}

fn remap(from: u64, len: u64, new_len: u64, to: Option<u64>) -> Option<u64> {
    let (from, len, new_len) = (at(from).cast(), len as usize, new_len as usize);
    // SAFETY: nobody has a reference to it, nor to what is at the new place.
    let moved = unsafe {
        match to {
            None => rustix::mm::mremap(from, len, new_len, MremapFlags::empty()),
            Some(to) => {
                rustix::mm::mremap_fixed(from, len, new_len, MremapFlags::MAYMOVE, at(to).cast())
            }
        }
    };
    moved.ok().map(address)
}

/// Forks; the child writes to every page of a range a few times, and ends well if it could.
fn fork(start: u64, len: u64) -> bool {
    // SAFETY: the child writes to memory, and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        for round in 1..4 {
            for page in (start..start + len).step_by(PAGE as usize) {
                poke(page + 16, round);
            }
        }
        let all = (start..start + len).step_by(PAGE as usize).all(|page| peek(page + 16) == 3);
        // SAFETY: it runs nothing that the process would have run at its end.
        unsafe { libc::_exit(i32::from(!all)) };
    }
    assert!(pid > 0, "cannot fork");
    let mut status = -1;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status == 0
}

impl State {
    fn obey(&mut self, command: &str, numbers: &[u64]) -> Option<u64> {
        let huge = MapFlags::HUGETLB | MapFlags::PRIVATE;
        let mut answer = 0;
        match (command, numbers) {
            ("anonymous", &[len]) => return map(None, len, ACCESS, MapFlags::PRIVATE),
            ("reserve", &[len]) => {
                return map(None, len, ACCESS, MapFlags::PRIVATE | MapFlags::NORESERVE);
            }
            ("shared", &[len]) => return map(None, len, ACCESS, MapFlags::SHARED),
            ("huge", &[len]) => return map(None, len, ACCESS, huge),
            ("huge-shared", &[len]) => {
                return map(None, len, ACCESS, MapFlags::HUGETLB | MapFlags::SHARED);
            }
            ("file", &[len]) => answer = map_file(len, MapFlags::PRIVATE),
            ("replace", &[place, len]) => {
                return map(Some(place), len, ACCESS, MapFlags::PRIVATE);
            }
            // Places of other mappings are kept free of memory.
            ("hole", &[len]) => {
                return map(None, len, ProtFlags::empty(), MapFlags::PRIVATE);
            }
            ("write", &[address, value]) => poke(address, value),
            ("fill", &[address, len, value]) => {
                for page in (address..address + len).step_by(PAGE as usize) {
                    poke(page, value);
                }
            }
            ("read", &[address]) => answer = peek(address),
            ("unmap", &[address, len]) => unmap(address, len),
            ("discard", &[address, len]) => advise(address, len, libc::MADV_DONTNEED),
            ("huge-advice", &[address, len]) => advise(address, len, libc::MADV_HUGEPAGE),
            ("no-huge-advice", &[address, len]) => advise(address, len, libc::MADV_NOHUGEPAGE),
            ("read-only", &[address, len]) => {
                protect(address, len, MprotectFlags::READ);
            }
            ("writable", &[address, len]) => {
                let access = MprotectFlags::READ | MprotectFlags::WRITE;
                protect(address, len, access);
            }
            ("move", &[from, len, to]) => return remap(from, len, len, Some(to)),
            ("grow", &[address, len, new_len]) => return remap(address, len, new_len, None),
            ("fork", &[address, len]) => answer = fork(address, len).into(),
            ("own-userfaultfd", &[start, len]) => {
                let uffd = Options::new().required(Features::WP_ASYNC).open().unwrap();
                let range = HostRange::new(HostAddress::new(start), len);
                // SAFETY: memory that only the parent knows of.
                unsafe { uffd.register_raw(range, RegisterMode::WP) }.unwrap();
                let protected = uffd.write_protect(range, true, Wake::No).unwrap();
                assert!(protected.is_complete());
                self.uffd = Some(uffd);
            }
            ("descriptors", &[]) => {
                answer = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
            }
            ("threads", &[count]) => {
                for _ in 0..count {
                    self.threads.push(thread::spawn(thread::park));
                }
            }
            ("writers", &[count, address, len]) => self.writers(count, address, len),
            ("changer", &[seed]) => self.changer(seed),
            ("rounds", &[]) => answer = self.rounds.load(Ordering::Relaxed),
            ("still", &[]) => {
                self.stop.store(true, Ordering::Relaxed);
                self.threads.drain(..).for_each(|thread| thread.join().unwrap());
                self.stop = Arc::default();
            }
            ("confine", &[]) => confine(),
            // The same program again, in memory of its own. It says that it is here.
            ("exec", &[]) => panic!("{}", Command::new("/proc/self/exe").args(again()).exec()),
            ("exit", &[]) => std::process::exit(0),
            other => panic!("{other:?}?"),
        }
        Some(answer)
    }

    /// Threads that count up a word in each page of theirs, in no order.
    fn writers(&mut self, count: u64, start: u64, len: u64) {
        let share = len / PAGE / count;
        for writer in 0..count {
            let (stop, rounds) = (Arc::clone(&self.stop), Arc::clone(&self.rounds));
            let mut random = Random::new(writer);
            self.threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..8 {
                        let page = start + (writer * share + random.below(share)) * PAGE;
                        let word = page + 8 * random.below(PAGE / 8);
                        poke(word, peek(word).wrapping_add(1));
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_micros(50));
                }
            }));
        }
    }

    /// A thread that maps, unmaps, moves, protects, discards and forks, in no order.
    fn changer(&mut self, seed: u64) {
        let (stop, rounds) = (Arc::clone(&self.stop), Arc::clone(&self.rounds));
        self.threads.push(thread::spawn(move || {
            let mut random = Random::new(seed);
            let mut areas: Vec<Area> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let index = random.below(12) as usize;
                if index >= areas.len() {
                    let len = PAGE * (1 + random.below(40));
                    let kind = random.below(4);
                    let start = match kind {
                        0 => map(None, len, ACCESS, MapFlags::SHARED).unwrap(),
                        1 => map_file(len, MapFlags::PRIVATE),
                        _ => map(None, len, ACCESS, MapFlags::PRIVATE).unwrap(),
                    };
                    areas.push(Area { start, len, shared: kind == 0, grows: kind > 1 });
                    continue;
                }
                change(&mut random, &mut areas, index);
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(100));
            }
        }));
    }
}

/// The arguments by which this test was started.
fn again() -> impl Iterator<Item = std::ffi::OsString> {
    std::env::args_os().skip(1)
}

struct Area {
    start: u64,
    len: u64,
    shared: bool,
    /// Behind the end of a file there is nothing to be written to.
    grows: bool,
}

fn change(random: &mut Random, areas: &mut Vec<Area>, index: usize) {
    let Area { start, len, shared, grows } = areas[index];
    let pages = len / PAGE;
    let first = random.below(pages);
    let count = 1 + random.below(pages - first);
    let (part, part_len) = (start + first * PAGE, count * PAGE);
    match random.below(40) {
        0..20 => {
            for page in first..first + count {
                poke(start + page * PAGE + 8 * random.below(PAGE / 8), random.next());
            }
        }
        20..26 => advise(part, part_len, libc::MADV_DONTNEED),
        26..28 => {
            unmap(start, len);
            areas.remove(index);
        }
        28..30 => drop(map(Some(part), part_len, ACCESS, MapFlags::PRIVATE).unwrap()),
        30..32 => {
            protect(part, part_len, MprotectFlags::READ);
            let access = MprotectFlags::READ | MprotectFlags::WRITE;
            protect(part, part_len, access);
        }
        32..34 => {
            // It may be of several mappings by now, of which none or some are moved. What is left of
            // either place then is not touched again: parts of it may be another thread's already.
            let to = map(None, len, ProtFlags::empty(), MapFlags::PRIVATE).unwrap();
            if remap(start, len, len, Some(to)).is_some() {
                areas[index].start = to;
            } else {
                areas.remove(index);
            }
        }
        34..36 => {
            if grows && remap(start, len, len + PAGE, None).is_some() {
                areas[index].len = len + PAGE;
            }
        }
        36..39 => drop(map_and_forget(random)),
        // What another process writes to shared memory is not noticed.
        _ if shared => {}
        _ => assert!(fork(start, PAGE)),
    }
}

/// Memory that comes and goes between two harvests.
fn map_and_forget(random: &mut Random) -> u64 {
    let len = PAGE * (1 + random.below(20));
    let start = map(None, len, ACCESS, MapFlags::PRIVATE).unwrap();
    poke(start, random.next());
    unmap(start, len);
    start
}

/// Confines the process by a filter that allows everything.
fn confine() {
    const RET_K: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    let mut allow = libc::sock_filter { code: RET_K, jt: 0, jf: 0, k: ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
    // SAFETY: the program is one valid instruction, which the kernel copies.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_TSYNC,
                &raw const program,
            ) == 0
    };
    assert!(done, "cannot confine itself: {}", std::io::Error::last_os_error());
}
