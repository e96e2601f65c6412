//! A VMM that is killed with SIGKILL while faults of its guest are in flight: it ends soon, whatever its
//! threads wait for, it leaves nothing behind, and the other side, which has the pages, notices.
//!
//! The test binary runs itself as the VMM; this process serves the pages.

mod common;

use std::{
    env, fs, io,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_kvm::{VmPager, VmPagerOptions};
use pageferry_memory::{HugePagePool, Layout, PageSize, Region};
use pageferry_migrate::{
    Endpoint, MemoryStore, PageKind, PageServer, PageStore, PeerOptions, PeerSource, Placement,
    ServerOptions,
    core::{RegionInfo, WireSpan},
};
use pageferry_testing::Random;
use pageferry_vmm::{Order, RunOptions, Share, Vm, VmConfig};

const TEST: &str = "a_vmm_killed_in_mid_fault";
/// How often a VMM is killed.
const KILLS: usize = 50;
/// How long one may take to end. A hang takes for ever, and an emulated machine its time.
const SOON: Duration = Duration::from_secs(10);
/// For the process that is to be killed: where pages come from, and which of [`all_cases`] it is.
const SERVER: &str = "PAGEFERRY_TEST_SERVER";
const NUMBER: &str = "PAGEFERRY_TEST_NUMBER";
/// How long the source takes to look at what it is asked for.
const DELAY: Duration = Duration::from_millis(1);

/// Those of huge pages are the last.
fn all_cases() -> Vec<Case> {
    cases(SMALL).chain(cases(HUGE)).collect()
}

fn machine(page_size: PageSize) -> VmConfig {
    let memory = if page_size == HUGE { HUGE_MEMORY } else { 512 << 12 };
    let mut config = VmConfig::new(2, memory);
    (config.payload.order, config.payload.share) = (Order::Random, Share::All);
    config
}

/// The VMM: one machine after the other, with 2 vCPUs and a device.
fn run_machines(endpoint: &str, case: Case) -> ! {
    // Whatever becomes of the test, it is not outlived.
    // SAFETY: a plain system call, with numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }, 0);
    let endpoint: Endpoint = endpoint.parse().unwrap();
    let mut config = machine(case.page_size);
    (config.setup, config.page_size) = (case.setup, case.page_size);
    loop {
        let vm = Vm::new(config.clone()).unwrap();
        let source = Arc::new(PeerSource::connect(&endpoint, PeerOptions::default()).unwrap());
        let pager = Arc::new(vm.pager().delivery(case.delivery).start(source).unwrap());
        let options =
            VmPagerOptions { guest_page_tables_resident: true, ..VmPagerOptions::default() };
        let vm_pager = VmPager::new(pager, options).unwrap();
        let options = RunOptions { devices: 1, ..RunOptions::default() };
        let report = vm.run(Some(&vm_pager), &options).unwrap();
        assert!(report.is_good(), "{case}: {report}");
    }
}

/// Takes its time, and tells when it is at it: then a fault is in flight.
struct Slow {
    store: MemoryStore,
    begun: AtomicU64,
    ended: AtomicU64,
}

impl PageStore for Slow {
    fn regions(&self) -> &[RegionInfo] {
        self.store.regions()
    }

    fn load<'a>(
        &'a self,
        span: WireSpan,
        buffer: &mut Vec<u8>,
        kinds: &mut Vec<PageKind>,
    ) -> Placement<'a> {
        self.begun.fetch_add(1, SeqCst);
        thread::sleep(DELAY);
        let placement = self.store.load(span, buffer, kinds);
        self.ended.fetch_add(1, SeqCst);
        placement
    }

    fn probe(&self, region: u16, granule: u64) -> PageKind {
        self.store.probe(region, granule)
    }

    fn load_part<'a>(
        &'a self,
        region: u16,
        granule: u64,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Option<Placement<'a>> {
        self.store.load_part(region, granule, offset, length, buffer)
    }
}

/// The side that has the pages of such machines.
struct Source {
    server: PageServer,
    store: Arc<Slow>,
}

impl Source {
    fn new(page_size: PageSize) -> Self {
        let vm = Vm::new(machine(page_size)).unwrap();
        vm.fill().unwrap();
        // The same memory, which is of small pages here, in the granules of those that get it.
        let made = vm.layout();
        let regions = made.iter().map(|(_, region)| {
            let view = Arc::clone(region.fill_view().expect("a memory file"));
            let (base, offset) = (region.guest_base(), region.image_offset());
            Region::external(view, None, SMALL, Some(page_size), base, offset).map(Arc::new)
        });
        let layout = Layout::new(regions.collect::<Result<_, _>>().unwrap()).unwrap();
        let store = Arc::new(Slow {
            store: MemoryStore::new(Arc::new(layout)),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        });
        let endpoint = "127.0.0.1:0".parse().unwrap();
        let server =
            PageServer::bind(&endpoint, Arc::clone(&store) as _, ServerOptions::default()).unwrap();
        Self { server, store }
    }

    fn in_flight(&self) -> u64 {
        // In this order: otherwise more may have ended than had begun.
        let ended = self.store.ended.load(SeqCst);
        self.store.begun.load(SeqCst) - ended
    }

    fn spawn(&self, number: usize) -> Child {
        Command::new(env::current_exe().unwrap())
            .args([TEST, "--exact", "--nocapture", "--test-threads=1"])
            .env(SERVER, self.server.local_endpoint().to_string())
            .env(NUMBER, number.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap()
    }

    /// Starts a VMM and kills it after so many faults and a moment more. Returns how long it took
    /// to end.
    fn kill_one(&self, number: usize, case: Case, random: &mut Random) -> Duration {
        let before = self.server.stats();
        let first = self.store.begun.load(SeqCst) + random.below(40);
        let mut child = self.spawn(number);
        wait_for("the faults of a VMM", || {
            assert!(child.try_wait().unwrap().is_none(), "{case}: it ended by itself");
            self.store.begun.load(SeqCst) > first
        });
        thread::sleep(Duration::from_micros(random.below(3_000)));
        wait_for("a fault in flight", || self.in_flight() > 0);

        let killed = Instant::now();
        child.kill().unwrap();
        let status = child.wait().unwrap();
        let took = killed.elapsed();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{case}: {status}");
        assert!(took < SOON, "{case}: it took {took:?} to end");
        wait_for("the source to notice", || {
            let stats = self.server.stats();
            stats.sessions == 0 && stats.failed > before.failed
        });
        // SAFETY: a plain system call, with numbers only; signal 0 does nothing to anybody.
        let others = unsafe { libc::kill(-(child.id() as libc::pid_t), 0) };
        let error = io::Error::last_os_error().raw_os_error();
        assert_eq!((others, error), (-1, Some(libc::ESRCH)), "{case}: processes are left");
        took
    }
}

/// Sockets that this process has open.
fn sockets() -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
        // The directory's own is gone when it is looked at.
        fs::read_link(entry.unwrap().path()).ok()
    });
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

#[test]
fn a_vmm_killed_in_mid_fault() {
    if let (Ok(endpoint), Ok(number)) = (env::var(SERVER), env::var(NUMBER)) {
        run_machines(&endpoint, all_cases()[number.parse::<usize>().unwrap()]);
    }
    if !can_page() {
        return;
    }
    let _watch = watch(300);
    let huge_pages = HugePages::reserve(HUGE_MEMORY / HUGE.bytes());
    let free = || HugePagePool::read(HUGE).map_or(0, |pool| pool.available());
    let free_before = free();
    let (small, huge) = (Source::new(SMALL), Source::new(HUGE));
    let sockets_before = sockets();
    let all: Vec<_> = all_cases()
        .into_iter()
        .enumerate()
        .filter(|(_, case)| case.page_size == SMALL || huge_pages.is_some())
        .collect();
    let mut random = Random::new(1);
    let mut longest = Duration::ZERO;
    for &(number, case) in all.iter().cycle().take(KILLS) {
        let source = if case.page_size == SMALL { &small } else { &huge };
        longest = longest.max(source.kill_one(number, case, &mut random));
        // Without pages of its own it would see what others do with theirs.
        wait_for("all huge pages to be free again", || {
            huge_pages.is_none() || free() == free_before
        });
    }
    wait_for("all sockets to be closed", || sockets() == sockets_before);
    println!("{KILLS} VMMs killed, each was gone within {longest:?}");
}
