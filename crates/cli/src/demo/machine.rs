//! A KVM guest: its vCPUs run bare-metal code that checks what it reads.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use pageferry::{memory::PageSize, paging::Pager};
use pageferry_kvm::{VmPager, VmPagerOptions};
use pageferry_vmm::{
    End, Operation, Order, Report, RunOptions, Setup, Share, Vm, VmConfig, VmError, WRITTEN,
};

use super::{
    args::Args,
    guest::{Left, Seen},
    pattern::{OF_ADDRESSES, PAGE},
    threads::Workload,
};
use crate::exit::Failure;

/// A vCPU tells of its progress after so many pages: seldom enough not to be felt.
const PROGRESS_EVERY: u64 = 512;

/// How long vCPUs that are told to stop may take. One that waits for a page inside of KVM may be
/// unable to notice; it ends with the process.
const LEAVING: Duration = Duration::from_millis(500);

/// Builds the machine. All of its memory is absent.
pub(super) fn build(
    args: &Args,
    setup: Setup,
    page_size: PageSize,
    bytes: u64,
) -> anyhow::Result<Arc<Vm>> {
    let vcpus = args.threads.get();
    let mut config = VmConfig::new(vcpus, bytes);
    (config.setup, config.page_size) = (setup, page_size);
    let pages = bytes / PAGE;
    let payload = &mut config.payload;
    payload.operation = Operation::ReadModifyWrite;
    payload.pattern = OF_ADDRESSES;
    payload.seed = args.seed;
    payload.progress_every = PROGRESS_EVERY;
    // Twice as many accesses as there are pages, by all vCPUs together.
    if args.workload == Workload::Sequential && pages >= u64::from(vcpus) {
        (payload.order, payload.share, payload.rounds) = (Order::Sequential, Share::Own, 2);
    } else {
        payload.order = match args.workload {
            Workload::Mixed | Workload::Random => Order::Random,
            Workload::Sequential => Order::Sequential,
            Workload::Zipf => Order::Zipf,
        };
        if args.workload == Workload::Mixed {
            payload.order_of_others = Some(Order::Sequential);
        }
        payload.share = Share::All;
        payload.units_per_vcpu = Some((2 * pages).div_ceil(vcpus.into()));
    }
    Vm::new(config).map(Arc::new).map_err(|error| match error {
        VmError::Config { .. } => Failure::usage(error.to_string()).into(),
        error => anyhow::Error::new(error).context("building the KVM guest"),
    })
}

/// A machine that runs. Dropping it stops its vCPUs.
#[derive(Debug)]
pub(super) struct Machine {
    vm: Arc<Vm>,
    /// Until it is joined.
    thread: Option<JoinHandle<Result<Report, VmError>>>,
    touches: Arc<[AtomicU64]>,
}

impl Machine {
    /// Starts the vCPUs, on threads of their own.
    pub(super) fn start(vm: &Arc<Vm>, pager: &Arc<Pager>) -> anyhow::Result<Self> {
        // They are in the machine's boot memory, which is not paged.
        let options =
            VmPagerOptions { guest_page_tables_resident: true, ..VmPagerOptions::default() };
        let pager = VmPager::new(Arc::clone(pager), options)
            .map_err(|error| Failure::missing(error.to_string()))?;
        let touches: Arc<[AtomicU64]> = (0..vm.config().vcpus).map(|_| AtomicU64::new(0)).collect();
        let (running, counted) = (Arc::clone(vm), Arc::clone(&touches));
        let run = move || {
            let progress = |vcpu: u16, touches| counted[usize::from(vcpu)].store(touches, Relaxed);
            let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
            running.run(Some(&pager), &options)
        };
        let thread = std::thread::Builder::new()
            .name("machine".into())
            .spawn(run)
            .context("starting the machine's thread")?;
        Ok(Self { vm: Arc::clone(vm), thread: Some(thread), touches })
    }

    /// Pages touched so far, as far as the vCPUs have told.
    pub(super) fn touches(&self) -> u64 {
        self.touches.iter().map(|touches| touches.load(Relaxed)).sum()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(super) fn join(mut self) -> anyhow::Result<Seen> {
        let report = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(report)) => report.context("running the KVM guest")?,
            Some(Err(_)) | None => anyhow::bail!("the machine's thread panicked"),
        };
        for (number, vcpu) in report.vcpus.iter().enumerate() {
            if vcpu.end != End::Finished {
                anyhow::bail!("vCPU {number} did not finish: {}", vcpu.end);
            }
        }
        Ok(Seen {
            accesses: report.touches(),
            writes: None,
            wrong: report.mismatches(),
            latency: None,
            left: Left::Turned(WRITTEN),
            vcpus: Some(report.vcpus),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.vm.stop();
        let deadline = Instant::now() + LEAVING;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
