//! What the kernel's part of a fault costs by itself: `cargo bench -p pageferry-paging`. No engine
//! can be faster than this; how near Pageferry comes is what `pageferry bench faults` shows.
//!
//! * A signal's round trip: an access that raises SIGBUS, a handler that does nothing but step over
//!   the access, and the way back. Nothing is installed.
//! * The installs alone, one page or sixteen a call, with nobody waiting.
//! * Both together: the access, a handler that installs the page, and the access again.
//!
//! Times are for a page.
#![allow(missing_docs, reason = "criterion's macros generate undocumented functions")]

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicPtr, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use pageferry_memory::{
    Advice, Backing, GranuleIndex, GranuleRange, HostRange, Mapping, Region, RegionConfig,
};
use pageferry_uffd::{CopyMode, Features, Options, RegisterMode, Registration, Userfaultfd};

const PAGE: u64 = 4096;
const PAGES: u64 = 8192;

/// Memory that raises SIGBUS where it is absent.
struct Memory {
    region: Region,
    _registered: Registration<Arc<Mapping>>,
    uffd: Arc<Userfaultfd>,
}

impl Memory {
    fn new(backing: Backing, mode: RegisterMode) -> Self {
        let features = Features::SIGBUS | Features::MISSING_SHMEM | Features::MINOR_SHMEM;
        let uffd = Arc::new(Options::new().required(features).open().expect("a userfaultfd"));
        let region = Region::new(&RegionConfig::new(PAGES * PAGE, backing)).unwrap();
        if let Some(fill) = region.fill_view() {
            fill.advise(fill.range(), Advice::PopulateWrite).unwrap();
        }
        let view = region.guest_view();
        let registered = uffd.register(Arc::clone(view), view.range(), mode).unwrap();
        let memory = Self { region, _registered: registered, uffd };
        // The page tables are there.
        memory.each_install(1, 1);
        memory.clear();
        memory
    }

    fn missing() -> Self {
        Self::new(Backing::Anonymous, RegisterMode::MISSING)
    }

    fn minor() -> Self {
        Self::new(Backing::Memfd, RegisterMode::MINOR)
    }

    fn clear(&self) {
        let view = self.region.guest_view();
        view.advise(view.range(), Advice::DontNeed).unwrap();
    }

    fn page(&self, index: u64, count: u64) -> HostRange {
        self.region.host_range(GranuleRange::new(GranuleIndex::new(index), count))
    }

    fn install(&self, at: HostRange, bytes: &[u8]) {
        let installed = if self.region.fill_view().is_some() {
            self.uffd.continue_range(at, CopyMode::NO_WAKE)
        } else {
            self.uffd.copy(at.start(), &bytes[..at.len() as usize], CopyMode::NO_WAKE)
        };
        assert!(installed.unwrap().is_complete());
    }

    /// Installs every page, `count` a call, in steps of `stride` calls.
    fn each_install(&self, count: u64, stride: u64) -> Duration {
        let bytes = vec![0x5a; (count * PAGE) as usize];
        let calls = PAGES / count;
        let begun = Instant::now();
        for call in 0..calls {
            self.install(self.page(call * stride % calls * count, count), &bytes);
        }
        begun.elapsed()
    }

    fn touch_every_page(&self, stride: u64) -> Duration {
        let start = self.region.guest_view().range().start();
        let begun = Instant::now();
        for index in 0..PAGES {
            let at = start.get() + index * stride % PAGES * PAGE;
            // SAFETY: loads one byte of the mapping. An absent page raises SIGBUS, whose handler
            // steps over the two bytes of this very instruction, or brings the page.
            unsafe {
                std::arch::asm!(
                    ".byte 0x8a, 0x00", // mov al, [rax]
                    inout("rax") at => _,
                    options(nostack, readonly)
                );
            }
        }
        begun.elapsed()
    }
}

/// What the installing handler works on.
static MEMORY: AtomicPtr<Memory> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn step_over(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the third argument of an SA_SIGINFO handler is the interrupted context, to be
    // changed at will; the interrupted instruction has two bytes.
    unsafe {
        (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
    }
}

extern "C" fn install(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    static PAGE_OF_BYTES: [u8; PAGE as usize] = [0x5a; PAGE as usize];
    // SAFETY: set while pages are touched, and alive as long; SIGBUS has an address.
    let (memory, address) = unsafe { (&*MEMORY.load(Relaxed), (*info).si_addr() as u64) };
    let start = memory.region.guest_view().range().start().get();
    memory.install(memory.page((address - start) / PAGE, 1), &PAGE_OF_BYTES);
}

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

fn on_sigbus(handler: Handler) {
    // SAFETY: an all-zero sigaction is valid, and the handlers above do only what is
    // async-signal-safe: system calls and loads.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
}

/// No common divisor with the number of pages: each is visited once, in no order that the kernel
/// or the processor would foresee.
const SCATTERED: u64 = 2731;

fn floor(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a page");
    group.sample_size(20).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    let per_page = |total: Duration, rounds: u64| total.mul_f64(1.0 / (rounds * PAGES) as f64);
    let mut bench = |name: &str, memory: Memory, round: &dyn Fn(&Memory) -> Duration| {
        let memory = Box::new(memory);
        MEMORY.store(std::ptr::from_ref(&*memory).cast_mut(), Relaxed);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let rounds = iterations.div_ceil(PAGES).max(1);
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    total += round(black_box(&memory));
                    memory.clear();
                }
                per_page(total, rounds).mul_f64(iterations as f64)
            });
        });
    };
    on_sigbus(step_over);
    bench("SIGBUS and back, nothing done", Memory::minor(), &|m| m.touch_every_page(SCATTERED));
    bench("CONTINUE of 1", Memory::minor(), &|m| m.each_install(1, SCATTERED));
    bench("CONTINUE of 16", Memory::minor(), &|m| m.each_install(16, 1));
    bench("COPY of 1", Memory::missing(), &|m| m.each_install(1, SCATTERED));
    bench("COPY of 16", Memory::missing(), &|m| m.each_install(16, 1));
    on_sigbus(install);
    bench("SIGBUS and CONTINUE of 1", Memory::minor(), &|m| m.touch_every_page(SCATTERED));
    bench("SIGBUS and COPY of 1", Memory::missing(), &|m| m.touch_every_page(SCATTERED));
    group.finish();
}

criterion_group!(benches, floor);
criterion_main!(benches);
