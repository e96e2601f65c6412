//! Which CPU a thread last ran on.
//!
//! Nothing here allocates: glibc's fork holds the locks of the allocator until the thread that
//! reads the userfaultfd has read the fork's event, and that is the thread which asks here.

use std::{ffi::CStr, io::Write};

use rustix::{
    fs::{Mode, OFlags, open},
    io::{read, retry_on_intr},
};

/// How many faults of a thread are taken to come from the CPU it was last seen on.
const TRUSTED_FOR: u32 = 256;
/// Threads remembered at once. Two that share a slot evict each other, which costs time only.
const SLOTS: usize = 1024;
/// The 39 fields that matter are numbers of 20 digits at most and a name of 64 bytes at most.
const STAT_LEN: usize = 1024;

#[derive(Copy, Clone)]
struct Slot {
    thread: u32,
    cpu: u32,
    /// For how many more faults `cpu` is believed; 0 in a slot that was never used.
    left: u32,
}

/// A cache in front of `/proc/TID/stat`, whose 39th field is the CPU last executed on
/// (proc_pid_stat(5)).
pub(super) struct CpuOf {
    known: [Slot; SLOTS],
}

impl CpuOf {
    pub(super) const fn new() -> Self {
        Self { known: [Slot { thread: 0, cpu: 0, left: 0 }; SLOTS] }
    }

    /// The CPU; the thread's id itself, which is as good a hash, when it cannot be read.
    pub(super) fn get(&mut self, thread: u32) -> u32 {
        // Thread ids are given out in sequence, so that threads started together do not collide.
        let slot = &mut self.known[thread as usize % SLOTS];
        if slot.thread == thread && slot.left > 0 {
            slot.left -= 1;
            return slot.cpu;
        }
        let cpu = read_stat(thread, &mut [0; STAT_LEN]).and_then(processor).unwrap_or(thread);
        *slot = Slot { thread, cpu, left: TRUSTED_FOR };
        cpu
    }
}

impl Default for CpuOf {
    fn default() -> Self {
        Self::new()
    }
}

/// What fits into `buffer` of `/proc/TID/stat`; one read gives all of it or as much as fits.
fn read_stat(thread: u32, buffer: &mut [u8; STAT_LEN]) -> Option<&[u8]> {
    let mut path = [0; 32];
    write!(&mut path[..], "/proc/{thread}/stat").ok()?;
    // The buffer is longer than any such path: what follows the text is zero.
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    let file =
        retry_on_intr(|| open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())).ok()?;
    let len = retry_on_intr(|| read(&file, &mut buffer[..])).ok()?;
    Some(&buffer[..len])
}

fn processor(stat: &[u8]) -> Option<u32> {
    // The second field, the name in parentheses, may itself hold spaces and parentheses.
    let name_ends = stat.iter().rposition(|byte| *byte == b')')?;
    // Behind it comes a space, then the third field.
    let mut fields = stat[name_ends + 1..].split(|byte| *byte == b' ').skip(1);
    let field = fields.nth(39 - 3)?;
    // A field that nothing follows may have been cut short.
    fields.next()?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
#[allow(unsafe_code)] // For the allocator that counts.
mod tests {
    use std::{
        alloc::{GlobalAlloc, Layout, System},
        cell::Cell,
    };

    use super::*;

    thread_local! {
        // Constant initialiser and no destructor: usable within the allocator.
        static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    }

    /// The system's allocator, which also counts by thread.
    struct Counting;

    // SAFETY: every call is passed on to the system's allocator unchanged.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
            // SAFETY: the caller keeps what `alloc` asks for.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
            // SAFETY: the caller keeps what `dealloc` asks for.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;

    fn this_thread() -> u32 {
        rustix::thread::gettid().as_raw_nonzero().get() as u32
    }

    #[test]
    fn the_field_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("1 (a) b (c) {}", fields.join(" "));
        assert_eq!(processor(stat.as_bytes()), Some(39));
        let cut = stat.find("39").unwrap();
        for end in [cut, cut + 1, cut + 2] {
            assert_eq!(processor(&stat.as_bytes()[..end]), None, "{end}");
        }
        for garbage in ["", "garbage", ")", "1 (name)", "1 (name) R 1 2 3"] {
            assert_eq!(processor(garbage.as_bytes()), None, "{garbage:?}");
        }
    }

    #[test]
    fn this_thread_runs_on_the_cpu_it_is_bound_to() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let set = |cpu| {
            let mut one = rustix::thread::CpuSet::new();
            one.set(cpu);
            one
        };
        let most = rustix::thread::CpuSet::MAX_CPU;
        for cpu in (0..most).filter(|cpu| allowed.is_set(*cpu)).take(4) {
            rustix::thread::sched_setaffinity(None, &set(cpu)).unwrap();
            assert_eq!(CpuOf::new().get(this_thread()), cpu as u32);
        }
        rustix::thread::sched_setaffinity(None, &allowed).unwrap();
    }

    #[test]
    fn what_cannot_be_read_is_the_thread_itself() {
        // Above the largest id that the kernel ever gives out.
        for thread in [0, (1 << 22) + 1, u32::MAX] {
            assert_eq!(CpuOf::new().get(thread), thread);
        }
    }

    #[test]
    fn threads_that_share_a_slot_are_not_mistaken_for_each_other() {
        let (one, other) = ((1 << 22) + 7, (1 << 22) + 7 + SLOTS as u32);
        let mut cpus = CpuOf::new();
        for thread in [one, one, other, other, one, other] {
            assert_eq!(cpus.get(thread), thread);
        }
    }

    #[test]
    fn nothing_is_allocated() {
        let thread = this_thread();
        let mut cpus = CpuOf::new();
        let before = ALLOCATIONS.get();
        drop(Box::new([0_u8; 100]));
        assert!(ALLOCATIONS.get() > before, "the allocator counts");
        let before = ALLOCATIONS.get();
        for round in 0..4 * TRUSTED_FOR {
            cpus.get(thread);
            cpus.get(round);
        }
        assert_eq!(ALLOCATIONS.get(), before);
    }
}
