//! Machines whose memory is paged, and what must be true of them after a run.

use std::{fmt, sync::Arc};

use pageferry_kvm::{MemoryErrors, VcpuStats, VmPager, VmPagerOptions};
use pageferry_memory::PageSize;
use pageferry_paging::{Delivery, Pager, Prefetch, Statistics};
use pageferry_testing::wait_for;
use pageferry_vmm::{
    Operation, Order, PatternOptions, PatternSource, Payload, Report, Ring, RunOptions, Setup,
    Share, Verified, Vm, VmConfig,
};

/// A delivery in a set-up, with memory of pages of some size.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Case {
    pub delivery: Delivery,
    pub setup: Setup,
    pub page_size: PageSize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delivery, setup, page_size } = self;
        write!(f, "{delivery} on {setup}, pages of {page_size}")
    }
}

/// Every delivery on every set-up that can have it.
pub fn cases(page_size: PageSize) -> impl Iterator<Item = Case> {
    let deliveries = [Delivery::Queue, Delivery::QueueN(3), Delivery::Exit, Delivery::Hybrid(2)];
    Setup::ALL.into_iter().flat_map(move |setup| {
        deliveries
            .into_iter()
            .filter(move |delivery| setup != Setup::NoQueue || *delivery == Delivery::Exit)
            .map(move |delivery| Case { delivery, setup, page_size })
    })
}

/// Memory for tests with pages of 2 MiB.
pub const HUGE_MEMORY: u64 = 8 << 20;

/// What distinguishes a machine from others.
pub fn name(case: Case, config: &VmConfig) -> String {
    let Payload { order, operation, ring, share, seed, .. } = config.payload;
    let VmConfig { vcpus, memory, .. } = config;
    format!(
        "{case}, {memory:#x} bytes, {vcpus} vCPUs: {order:?} {operation:?}, ring {ring:?}, \
         {share:?}, seed {seed}"
    )
}

/// A machine, its pager, and the source.
// Dropped in this order: a pager stops before the machine's memory goes.
pub struct Paged {
    pub vm_pager: VmPager,
    pub pager: Arc<Pager>,
    pub source: Arc<PatternSource>,
    pub vm: Vm,
    pub case: Case,
    /// For messages.
    pub name: String,
}

impl Paged {
    pub fn new(case: Case, config: VmConfig, source: PatternOptions) -> Self {
        Self::with(case, config, source, Prefetch::NONE, MemoryErrors::Exit)
    }

    pub fn with(
        case: Case,
        mut config: VmConfig,
        mut source: PatternOptions,
        prefetch: Prefetch,
        memory_errors: MemoryErrors,
    ) -> Self {
        (config.setup, config.page_size) = (case.setup, case.page_size);
        source.pattern = config.payload.pattern;
        let name = name(case, &config);
        let vm = Vm::new(config).unwrap_or_else(|error| panic!("{case}: {error}"));
        let source = PatternSource::new(source);
        let pager = vm.pager().delivery(case.delivery).prefetch(prefetch);
        let pager = pager.start(Arc::clone(&source) as _);
        let pager = Arc::new(pager.unwrap_or_else(|error| panic!("{case}: {error}")));
        let options = VmPagerOptions {
            guest_page_tables_resident: true,
            memory_errors,
            ..VmPagerOptions::default()
        };
        let vm_pager = VmPager::new(Arc::clone(&pager), options)
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        Self { vm_pager, pager, source, vm, case, name }
    }

    pub fn run(&self, options: &RunOptions<'_>) -> Report {
        self.vm.run(Some(&self.vm_pager), options).unwrap()
    }

    /// Runs with so many device threads, and checks everything: contents as the vCPUs and
    /// devices saw them, contents afterwards, and that every fault is accounted for.
    #[track_caller]
    pub fn run_and_check(&self, devices: u16) -> Report {
        let options = RunOptions { devices, ..RunOptions::default() };
        let report = self.run(&options);
        assert!(report.is_good(), "{}: {report}", self.name);
        let granules = if devices > 0 {
            self.vm.layout().total_granules()
        } else {
            self.vm.granules_touched()
        };
        self.check_counts(granules);
        self.check_vcpus(&report);
        if self.case.page_size < PageSize::SIZE_1G {
            // Word by word, which takes its time. Only now is every granule sure to be published.
            let verified = self.check_contents(devices > 0);
            let words = granules * self.case.page_size.bytes() / 8;
            assert_eq!((verified.granules, verified.words), (granules, words), "{}", self.name);
        }
        report
    }

    /// No word of what has come is wrong.
    #[track_caller]
    pub fn check_contents(&self, devices: bool) -> Verified {
        let verified = self.vm.verify(devices).unwrap();
        assert_eq!(verified.mismatches, 0, "{}: {verified:?}", self.name);
        verified
    }

    /// Waits until so many granules are counted as installed: with a queue, a vCPU goes on before
    /// those who brought its page have counted it.
    #[track_caller]
    pub fn wait_counted(&self, granules: u64) {
        wait_for("the last page to be counted", || {
            self.pager.statistics().counts.installed >= granules
        });
    }

    /// So many granules were asked for, and each came exactly once. Every one of them is of a fault,
    /// and no fault met what it should not.
    #[track_caller]
    pub fn check_counts(&self, granules: u64) {
        let name = &self.name;
        self.wait_counted(granules);
        wait_for("the last answer to be counted", || self.source.answered() >= granules);
        let Statistics { counts, .. } = self.pager.statistics();
        assert_eq!(self.source.granules(), granules, "{name}: requested; {counts:?}");
        assert_eq!(self.source.answered(), granules, "{name}: answered; {counts:?}");
        assert_eq!(counts.demand, granules, "{name}: demanded; {counts:?}");
        assert_eq!(counts.installed, granules, "{name}: installed; {counts:?}");
        assert!(counts.faults >= counts.demand + counts.stale, "{name}: {counts:?}");
        assert_eq!((counts.stalled, counts.eexist), (0, 0), "{name}: {counts:?}");
        assert_eq!(counts.duplicate, 0, "{name}: {counts:?}");
        assert_eq!(counts.poisoned, 0, "{name}: {counts:?}");
        assert_eq!(counts.panics, 0, "{name}: {counts:?}");
        let present = self.vm.layout().total_granules() - self.pager.remaining();
        assert_eq!(present, granules, "{name}: present");
    }

    /// The vCPUs' own counts agree with each other, and with how faults are delivered.
    #[track_caller]
    pub fn check_vcpus(&self, report: &Report) {
        let name = &self.name;
        let mut all = VcpuStats::default();
        for (vcpu, stats) in report.vcpus.iter().zip(self.vm_pager.stats()) {
            assert_eq!(vcpu.pager.as_ref(), Some(&stats), "{name}");
            assert_eq!(stats.foreign_signals, 0, "{name}: {stats:?}");
            assert_eq!(stats.memory_errors, 0, "{name}: {stats:?}");
            assert!(stats.waited <= stats.exits(), "{name}: {stats:?}");
            all.add(&stats);
        }
        if !self.case.delivery.exits() {
            assert_eq!(all.exits(), 0, "{name}: {all:?}");
            return;
        }
        // Every one left KVM_RUN, and was timed.
        assert!(all.time.count() >= all.exits(), "{name}: {all:?}");
        let from_vcpus = self.pager.statistics().counts.faults;
        assert!(from_vcpus >= all.exits(), "{name}: {from_vcpus} faults, {all:?}");
        if report.devices.is_empty() {
            assert!(all.exits() >= self.vm.granules_touched(), "{name}: {all:?}");
        }
    }
}

/// A payload in a machine.
pub fn config(
    order: Order,
    operation: Operation,
    ring: Ring,
    share: Share,
    vcpus: u16,
    memory: u64,
) -> VmConfig {
    let mut config = VmConfig::new(vcpus, memory);
    config.payload.order = order;
    config.payload.operation = operation;
    config.payload.ring = ring;
    config.payload.share = share;
    config
}
