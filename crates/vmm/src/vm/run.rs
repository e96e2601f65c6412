//! Running the machine: a thread for each vCPU, and what they all came to.

use std::{
    any::Any,
    panic,
    sync::{TryLockError, atomic::Ordering::SeqCst},
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use pageferry_kvm::VmPager;
use pageferry_paging::Pager;

use super::Vm;
use crate::{
    KvmRun, VcpuRunner, VmError,
    control::Control,
    device::Device,
    report::{DeviceReport, End, Report, TouchTimes, VcpuReport},
    vcpu::Run,
};

/// What a run has besides its vCPUs.
#[derive(Default)]
pub struct RunOptions<'a> {
    /// How many device threads go once through all the memory meanwhile, through the guest view.
    /// Where faults are exits, they ask the pager for each page before they touch it.
    pub devices: u16,
    /// Called on a vCPU's thread whenever the vCPU tells of progress, with its number and the units
    /// it has touched. If it panics, that vCPU has [`End::Panicked`].
    pub progress: Option<&'a (dyn Fn(u16, u64) + Sync)>,
}

/// Says that the vCPUs of a run have ended, or will never begin.
struct Ended<'a>(&'a Control);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.vcpus_ended();
    }
}

impl Vm {
    /// Runs all vCPUs from the beginning of the payload, each on a thread of its own, until each
    /// has come to an end; in the first run after [`restore`](Self::restore), from where they
    /// stand. Without `pager`, KVM_RUN is called as it is: for memory that is all there, or whose
    /// faults a pager takes from a queue.
    ///
    /// # Errors
    /// When the machine runs already, or a vCPU could not be made ready. What happens to a vCPU in
    /// the guest is in the report.
    pub fn run(
        &self,
        pager: Option<&VmPager>,
        options: &RunOptions<'_>,
    ) -> Result<Report, VmError> {
        let runner = |_| match pager {
            Some(pager) => Box::new(pager.vcpu()) as Box<dyn VcpuRunner>,
            None => Box::new(KvmRun),
        };
        self.run_with(&runner, pager.map(|pager| &**pager.pager()), options)
    }

    /// As [`run`](Self::run), with whatever `runner` makes for each vCPU's number entering the
    /// guest. All are made on the calling thread before the first vCPU runs, and each is dropped on
    /// its vCPU's thread, or on this one if that thread cannot be had. `pager` is for device
    /// threads.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_with<'r>(
        &self,
        runner: &dyn Fn(u16) -> Box<dyn VcpuRunner + 'r>,
        pager: Option<&Pager>,
        options: &RunOptions<'_>,
    ) -> Result<Report, VmError> {
        self.run_telling(runner, pager, options, &|| ())
    }

    /// As [`run_with`](Self::run_with). `begun` is called as soon as the run cannot be refused any
    /// more because of another, and can be paused.
    pub(crate) fn run_telling<'r>(
        &self,
        runner: &dyn Fn(u16) -> Box<dyn VcpuRunner + 'r>,
        pager: Option<&Pager>,
        options: &RunOptions<'_>,
        begun: &dyn Fn(),
    ) -> Result<Report, VmError> {
        let _running = match self.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(VmError::Running),
        };
        let active = self.control.begin(self.config.vcpus);
        self.started.store(true, SeqCst);
        let from_the_beginning = !self.restored.swap(false, SeqCst);
        begun();
        let runners: Vec<_> = (0..self.config.vcpus).map(runner).collect();
        let pace = self.config.payload.time_between_exits(self.config.vcpus);
        let started = Instant::now();
        let result = thread::scope(|scope| {
            // However this ends: the scope waits for the thread that throttles.
            let ended = Ended(&self.control);
            let throttle = || self.control.throttle(|| self.kick());
            self.spawn(scope, "throttle".to_owned(), throttle)?;
            let mut vcpus = Vec::new();
            for (((number, vcpu), runner), active) in
                self.vcpus.iter().enumerate().zip(runners).zip(active)
            {
                let run = Run {
                    boot: &self.boot,
                    control: &self.control,
                    runner,
                    active,
                    from_the_beginning,
                    rings: self.rings.as_ref(),
                    pace,
                    progress: options.progress,
                };
                vcpus.push(self.spawn(scope, format!("vcpu {number}"), || vcpu.run(run))?);
            }
            let mut devices = Vec::new();
            for number in 0..options.devices {
                let device = Device {
                    memory: &self.memory,
                    plan: &self.plan,
                    pattern: self.config.payload.pattern,
                    marks: &self.marks,
                    pager,
                    control: &self.control,
                    seed: self.config.payload.seed.wrapping_add(number.into()),
                };
                let work = move || device.run();
                devices.push(self.spawn(scope, format!("device {number}"), work)?);
            }
            // All are waited for, whatever became of any.
            let vcpus: Vec<Result<VcpuReport, VmError>> = (0..)
                .zip(vcpus)
                .map(|(number, thread)| {
                    thread.join().unwrap_or_else(|panic| Ok(self.panicked(number, panic)))
                })
                .collect();
            let wall = started.elapsed();
            drop(ended);
            let devices: Vec<DeviceReport> = devices
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
                .collect();
            Ok(Report { vcpus: vcpus.into_iter().collect::<Result<_, _>>()?, devices, wall })
        });
        self.control.run_ended();
        result
    }

    /// Starts a thread of a run. If that fails, the others are stopped.
    fn spawn<'scope, T: Send + 'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        name: String,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> Result<ScopedJoinHandle<'scope, T>, VmError> {
        thread::Builder::new().name(name).spawn_scoped(scope, work).map_err(|source| {
            self.stop();
            VmError::Host { what: "starting a thread", source }
        })
    }

    fn panicked(&self, vcpu: u16, panic: Box<dyn Any + Send>) -> VcpuReport {
        let why = match panic.downcast::<String>() {
            Ok(why) => *why,
            Err(panic) => match panic.downcast::<&'static str>() {
                Ok(why) => (*why).to_owned(),
                Err(_) => "no message".to_owned(),
            },
        };
        let (page, log2) = self.boot.report(vcpu);
        VcpuReport {
            end: End::Panicked(why),
            touches: page.touches,
            mismatches: page.mismatches,
            first_mismatch: None,
            wall: Duration::ZERO,
            times: TouchTimes { log2, ..TouchTimes::default() },
            exits: 0,
            kicks: 0,
            pager: None,
        }
    }
}
