//! Atomics and a futex, which the model checker loom replaces by its own (`--cfg loom`).

pub(crate) use self::primitive::{
    AtomicU32, AtomicU64, Deadline, Futex, Ordering, fence, spin_loop, zeroed,
};

#[cfg(not(loom))]
mod primitive {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use rustix::io::Errno;
    use rustix::thread::futex;
    use rustix::time::{ClockId, Timespec};

    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    /// Zeros the allocator gets from the kernel, so that the memory of a large map is not touched
    /// before its granules are.
    pub(crate) fn zeroed(len: usize) -> Box<[AtomicU64]> {
        const {
            assert!(size_of::<AtomicU64>() == size_of::<u64>());
            assert!(align_of::<AtomicU64>() == align_of::<u64>());
        }
        let words: Box<[u64]> = vec![0; len].into();
        // SAFETY: both types have the same size, alignment and valid bit patterns, and the box is
        // the only owner.
        unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
    }

    /// When waiting ends without success.
    #[derive(Copy, Clone)]
    pub(crate) struct Deadline(Option<Timespec>);

    impl Deadline {
        /// A point of the monotonic clock; never, if `timeout` is `None` or beyond what the clock
        /// can show.
        pub(crate) fn after(timeout: Option<Duration>) -> Self {
            Self(timeout.and_then(|timeout| {
                let now = rustix::time::clock_gettime(ClockId::Monotonic);
                now.checked_add(Timespec::try_from(timeout).ok()?)
            }))
        }
    }

    /// A word that threads can wait on until another wakes them. Source: `futex(2)`.
    pub(crate) struct Futex(AtomicU32);

    impl Futex {
        pub(crate) fn new(value: u32) -> Self {
            Self(AtomicU32::new(value))
        }

        pub(crate) fn load(&self) -> u32 {
            self.0.load(Ordering::Acquire)
        }

        pub(crate) fn increment(&self) {
            self.0.fetch_add(1, Ordering::Release);
        }

        /// Sleeps if the value is still `expected`, until woken with a mask that has a bit in
        /// common, a signal, or the deadline. Only the latter is told: `false`.
        pub(crate) fn wait(&self, expected: u32, mask: NonZeroU32, deadline: &Deadline) -> bool {
            let answer = futex::wait_bitset(
                &self.0,
                futex::Flags::PRIVATE,
                expected,
                deadline.0.as_ref(),
                mask,
            );
            match answer {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => true,
                Err(Errno::TIMEDOUT) => false,
                // The address is valid and aligned, and the timeout normalized.
                Err(errno) => panic!("waiting on a futex failed: {errno}"),
            }
        }

        /// Wakes every thread that waits with a mask that has a bit in common.
        pub(crate) fn wake(&self, mask: NonZeroU32) {
            if let Err(errno) =
                futex::wake_bitset(&self.0, futex::Flags::PRIVATE, i32::MAX as u32, mask)
            {
                panic!("waking a futex failed: {errno}");
            }
        }
    }
}

#[cfg(loom)]
mod primitive {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use loom::sync::{Condvar, Mutex};

    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    pub(crate) fn zeroed(len: usize) -> Box<[AtomicU64]> {
        (0..len).map(|_| AtomicU64::new(0)).collect()
    }

    /// Loom knows no time: no deadline ever comes.
    #[derive(Copy, Clone)]
    pub(crate) struct Deadline;

    impl Deadline {
        pub(crate) fn after(_: Option<Duration>) -> Self {
            Self
        }
    }

    /// Like the kernel's: comparing and going to sleep are one step for whoever wakes. The masks
    /// are ignored, as every wake-up may be spurious.
    pub(crate) struct Futex {
        value: AtomicU32,
        queue: Mutex<()>,
        woken: Condvar,
    }

    impl Futex {
        pub(crate) fn new(value: u32) -> Self {
            Self { value: AtomicU32::new(value), queue: Mutex::new(()), woken: Condvar::new() }
        }

        pub(crate) fn load(&self) -> u32 {
            self.value.load(Ordering::Acquire)
        }

        pub(crate) fn increment(&self) {
            self.value.fetch_add(1, Ordering::Release);
        }

        pub(crate) fn wait(&self, expected: u32, _: NonZeroU32, _: &Deadline) -> bool {
            let queue = self.queue.lock().unwrap();
            if self.value.load(Ordering::Relaxed) == expected {
                drop(self.woken.wait(queue).unwrap());
            }
            true
        }

        pub(crate) fn wake(&self, _: NonZeroU32) {
            let _queue = self.queue.lock().unwrap();
            self.woken.notify_all();
        }
    }
}
