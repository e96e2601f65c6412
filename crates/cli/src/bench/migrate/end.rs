//! The two processes of a run: what each does, and how it tells of it. What is to be done comes as
//! JSON on the command line; what is told is JSON, a line each, on standard output.

use std::{
    io::{self, Write as _},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use pageferry::migrate::{
    DestinationMigration, Endpoint, Outcome, ReceiveOptions, SourceMigration,
};
use pageferry_vmm::{
    Arrival, End, Machine, MachineDestination, MachineSource, Report, Vm, WriteTracking,
};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::{
    case::{Case, Workload},
    plain::{self, Plain},
    times::{GuestTimes, Waits},
};
use crate::exit::Exit;

/// Does one side's part of a run of `bench migrate`
#[derive(clap::Args, Debug)]
pub(in crate::bench) struct Args {
    /// The process id of the command that waits for this process.
    parent: i32,
    job: String,
}

/// What a process is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Job {
    /// Have a guest, and send it away.
    Source { case: Case, to: String },
    /// Take the guest.
    Destination { case: Case },
    /// Send bytes.
    PlainSource { plain: Plain, to: String },
    /// Take them.
    PlainDestination { plain: Plain },
}

/// Where a destination waits for its source.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listening {
    pub(super) at: String,
}

/// What a source has to tell.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Sent {
    pub(super) total: Duration,
    pub(super) downtime: Option<Duration>,
    /// Of pages, headers included.
    pub(super) bytes: u64,
    pub(super) rounds: usize,
    /// Of the guest while it ran here.
    pub(super) times: GuestTimes,
}

/// What a destination has to tell.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Received {
    /// As the pager measured them.
    pub(super) waits: Waits,
    /// Of the guest while it ran here, and before.
    pub(super) times: GuestTimes,
}

pub(in crate::bench) fn run(args: &Args) -> anyhow::Result<Exit> {
    // However the command that waits for this process ends, it does not outlive that.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = getppid().map(Pid::as_raw_pid);
    ensure!(parent == Some(args.parent), "the command has gone already");
    let job = serde_json::from_str(&args.job).context("what there is to do")?;
    match job {
        Job::Source { case, to } => tell(&source(&case, &to)?),
        Job::Destination { case } => tell(&destination(&case)?),
        Job::PlainSource { plain, to } => tell(&plain::send(&plain, &to)?),
        Job::PlainDestination { plain } => tell(&plain::receive(&plain)?),
    }?;
    Ok(Exit::Success)
}

/// Tells the command something.
pub(super) fn tell(what: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).context("telling the command")
}

fn source(case: &Case, to: &str) -> anyhow::Result<Sent> {
    let machine = Arc::new(Machine::new(Arc::new(Vm::new(case.machine())?), None));
    machine.vm().fill()?;
    machine.start()?;
    wait_for_touches(&machine)?;
    if case.workload == Workload::Stopped {
        machine.vm().pause();
    }
    let source = Arc::new(MachineSource::new(machine, WriteTracking::Log));
    let to: Endpoint = to.parse()?;
    let migration = SourceMigration::start(Arc::clone(&source) as _, to, case.options())?;
    let outcome = migration.wait()?;
    ensure!(outcome == Outcome::Completed, "the migration was called off");
    let status = migration.status();
    let report = source.take_report().context("the guest was not let go")??;
    check(&report, "source")?;
    Ok(Sent {
        total: status.elapsed,
        downtime: status.downtime,
        bytes: status.counts.bytes,
        rounds: status.rounds.len(),
        times: GuestTimes::of(&report),
    })
}

fn destination(case: &Case) -> anyhow::Result<Received> {
    let arrival = Arrival {
        setup: case.backing.setup(),
        page_size: case.backing.page_size(),
        ..Arrival::default()
    };
    let place = Arc::new(MachineDestination::new(arrival));
    let anywhere: Endpoint = "127.0.0.1:0".parse()?;
    let migration = DestinationMigration::listen(
        Arc::clone(&place) as _,
        &anywhere,
        ReceiveOptions::default(),
    )?;
    let at = migration.endpoint().context("the destination listens nowhere")?.to_string();
    tell(&Listening { at })?;
    migration.wait()?;
    let machine = place.machine().context("the guest is not here")?;
    let waits = match machine.pager() {
        Some(pager) => Waits::of(&pager.pager().statistics().total),
        None => Waits::default(),
    };
    wait_for_touches(&machine)?;
    let report = stop_and_verify(&machine)?;
    Ok(Received { waits, times: GuestTimes::of(&report) })
}

/// Stops a guest that has come, and compares every word of its memory with what it should be.
fn stop_and_verify(machine: &Machine) -> anyhow::Result<Report> {
    let report = machine.stop()?;
    check(&report, "destination")?;
    let verified = machine.vm().verify(false)?;
    if let Some(first) = verified.first {
        bail!("{} words of the guest that has come are wrong, first {first}", verified.mismatches);
    }
    let words = machine.vm().config().memory / 8;
    ensure!(verified.words == words, "of {words} words {} have come", verified.words);
    Ok(report)
}

/// The guest ended because it was stopped, and has seen nothing wrong.
fn check(report: &Report, side: &str) -> anyhow::Result<()> {
    let stopped = report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped);
    ensure!(stopped && report.mismatches() == 0, "the guest at the {side}: {report}");
    Ok(())
}

/// Longer than any vCPU needs to touch something, on a machine however busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until every vCPU has touched something more. Nothing tells of it: it is looked for.
fn wait_for_touches(machine: &Machine) -> anyhow::Result<()> {
    let before = machine.vm().touches();
    let deadline = Instant::now() + PATIENCE;
    while machine.vm().touches().iter().zip(&before).any(|(now, before)| now <= before) {
        ensure!(machine.is_running(), "the guest came to an end by itself: {}", machine.wait()?);
        ensure!(Instant::now() < deadline, "a vCPU touched nothing for {PATIENCE:?}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use kvm_ioctls::Kvm;
    use pageferry_vmm::{Behaviour, expected_word};

    use super::*;
    use crate::bench::migrate::case::{Backing, Compression, Mode};

    fn running(workload: Workload) -> Machine {
        let case = Case {
            mode: Mode::Hybrid,
            workload,
            backing: Backing::Anon,
            memory_bytes: 2 << 20,
            vcpus: 1,
            connections: 1,
            compression: Compression::None,
            downtime: Duration::from_millis(300),
            background: NonZeroU32::new(1),
        };
        let machine = Machine::new(Arc::new(Vm::new(case.machine()).unwrap()), None);
        machine.vm().fill().unwrap();
        machine
    }

    /// One that the guest reads, and one that it does not.
    #[test]
    fn a_wrong_word_fails_the_run() {
        if let Err(error) = Kvm::new() {
            println!("skipped: needs /dev/kvm: {error}");
            return;
        }
        for workload in [Behaviour::RandomRead, Behaviour::RandomWrite { rate: None }] {
            for (offset, noticed) in
                [(None, None), (Some(0), Some("the guest at the")), (Some(16), Some("1 words"))]
            {
                let machine = running(Workload::Runs(workload));
                if let Some(offset) = offset {
                    let layout = machine.vm().layout();
                    let (_, region) = layout.iter().next().unwrap();
                    let word = expected_word(region.guest_base()) ^ 1;
                    region.guest_view().write_at(offset, &word.to_le_bytes()).unwrap();
                }
                machine.start().unwrap();
                // More than once around, at whatever speed.
                let all = machine.vm().config().memory / 4096;
                while machine.vm().touches()[0] <= all {
                    wait_for_touches(&machine).unwrap();
                }
                let error = stop_and_verify(&machine).err().map(|error| error.to_string());
                match (&error, noticed) {
                    (Some(error), Some(noticed)) => assert!(error.contains(noticed), "{error}"),
                    _ => assert_eq!(error.as_deref(), noticed, "{workload}, {offset:?}"),
                }
            }
        }
    }
}
