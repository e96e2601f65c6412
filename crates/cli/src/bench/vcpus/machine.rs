//! The machine that a case is run on: made anew for every run, and checked after it.

use std::thread;

use anyhow::{Context as _, bail, ensure};
use pageferry::memory::Advice;
use pageferry_vmm::{Report, RunOptions, VcpuRunner, Vm};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{
    super::case::Kind,
    case::{Case, Measurement},
    start::StartLine,
    times::Times,
};
use crate::{exit::Failure, signals::Signals};

/// A machine for `case`. Without paging every page has its contents and is mapped where KVM looks.
/// Otherwise nothing is mapped there; for minor faults every page is in the page cache, as zeros, and
/// mapped in the fill view, through which it gets its contents.
pub(super) fn build(case: &Case) -> anyhow::Result<Vm> {
    let vm = Vm::new(case.machine())?;
    let paged = case.resolved.served.is_some();
    if !paged {
        vm.fill()?;
    }
    for (_, region) in vm.layout().iter() {
        let view = match region.fill_view() {
            _ if !paged => region.kvm_view(),
            Some(fill) if case.setup.kind() == Kind::Minor => fill,
            _ => continue,
        };
        view.advise(view.range(), Advice::PopulateWrite)
            .with_context(|| format!("populating {}", view.range()))?;
    }
    Ok(vm)
}

/// Runs all vCPUs to their ends, which start together, each entering the guest by what `runner` makes
/// for its number. A signal that asks the command to stop ends it.
pub(super) fn run<'r>(
    vm: &Vm,
    runner: impl Fn(u16) -> Box<dyn VcpuRunner + 'r>,
    signals: &Signals,
) -> anyhow::Result<(Measurement, Report)> {
    let line = StartLine::new(vm.config().vcpus.into());
    let ended = eventfd(0, EventfdFlags::CLOEXEC).context("eventfd for the end of a run")?;
    let report = thread::scope(|scope| {
        thread::Builder::new()
            .name("stopper".into())
            .spawn_scoped(scope, || {
                let mut fds =
                    [PollFd::new(&ended, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
                while rustix::io::retry_on_intr(|| poll(&mut fds, None)).is_ok_and(|n| n == 0) {}
                if fds[0].revents().is_empty() {
                    vm.stop();
                }
            })
            .context("a thread that stops the vCPUs")?;
        let report = vm.run_with(&|vcpu| line.runner(runner(vcpu)), None, &RunOptions::default());
        let told = rustix::io::write(&ended, &1_u64.to_ne_bytes()).context("ending a run");
        report.map_err(anyhow::Error::from).and_then(|report| told.map(|_| report))
    })?;
    if let Some(signal) = signals.caught() {
        return Err(Failure::interrupted(signal).into());
    }
    ensure!(report.is_good(), "the guest did not come to a good end:\n{report}");
    let Some((wall, cpu)) = line.took() else { bail!("a vCPU never started") };
    let measured = Measurement { pages: report.touches(), wall, cpu, times: Times::of(&report) };
    Ok((measured, report))
}

/// Compares every word of all the memory with what it should be. Every page counts as present.
pub(super) fn verify(vm: &Vm, case: &Case, measured: &Measurement) -> anyhow::Result<()> {
    let (pages, touched, timed) = (case.pages, measured.pages, measured.times.count());
    ensure!(touched == pages && timed == pages, "{touched} of {pages} touched, {timed} timed");
    let verified = vm.verify(false)?;
    if let Some(wrong) = verified.first {
        bail!("{} of {} words are wrong, the first {wrong}", verified.mismatches, verified.words);
    }
    ensure!(verified.granules == pages, "{} of {pages} pages are present", verified.granules);
    Ok(())
}
