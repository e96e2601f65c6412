//! A machine that runs on threads of its own, until it is stopped.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use pageferry_kvm::VmPager;

use crate::{KvmRun, Report, RunOptions, VcpuRunner, Vm, VmError};

type Run = JoinHandle<Result<Report, VmError>>;

/// A [`Vm`] that runs in the background: started, paused, saved, resumed and stopped from any
/// thread. Dropping it stops it.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use pageferry_vmm::{Behaviour, Machine, Vm, VmConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut config = VmConfig::new(2, 1 << 30);
/// config.payload = Behaviour::RandomWrite { rate: Some(100_000_000) }.into();
/// let machine = Machine::new(Arc::new(Vm::new(config)?), None);
/// machine.vm().fill()?;
/// machine.start()?;
/// machine.vm().pause();
/// let state = machine.vm().save()?.encode();
/// // And all of its memory, to wherever it is restored.
/// machine.vm().resume();
/// println!("{}", machine.stop()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Machine {
    // Dropped before the machine's memory.
    pager: Option<VmPager>,
    vm: Arc<Vm>,
    run: Mutex<Option<Run>>,
}

impl Machine {
    /// One that does not run yet. With `pager`, its memory arrives on demand.
    pub fn new(vm: Arc<Vm>, pager: Option<VmPager>) -> Self {
        Self { pager, vm, run: Mutex::default() }
    }

    /// The machine.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Who brings its memory.
    pub fn pager(&self) -> Option<&VmPager> {
        self.pager.as_ref()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Run>> {
        // A panic cannot leave it half changed.
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs it from the beginning, or, after [`Vm::restore`], from where it stands. If it is
    /// paused, no vCPU enters the guest before it is resumed.
    ///
    /// # Errors
    /// [`VmError::Running`], also when a run has ended and nobody has [asked](Self::wait) for its
    /// report; when a thread cannot be had.
    pub fn start(&self) -> Result<(), VmError> {
        let mut run = self.lock();
        if run.is_some() {
            return Err(VmError::Running);
        }
        let (tell, told) = mpsc::channel();
        let (vm, pager) = (Arc::clone(&self.vm), self.pager.clone());
        let thread = thread::Builder::new().name("machine".to_owned()).spawn(move || {
            let runner = |_| match &pager {
                Some(pager) => Box::new(pager.vcpu()) as Box<dyn VcpuRunner>,
                None => Box::new(KvmRun),
            };
            let pages = pager.as_ref().map(|pager| &**pager.pager());
            // It is waited for below.
            let begun = || {
                let _ = tell.send(());
            };
            vm.run_telling(&runner, pages, &RunOptions::default(), &begun)
        });
        let thread =
            thread.map_err(|source| VmError::Host { what: "starting a thread", source })?;
        // An error: the run was refused, and the channel dropped.
        if told.recv().is_ok() {
            *run = Some(thread);
            return Ok(());
        }
        match thread.join() {
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => Ok(()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Whether it has been started and has not come to an end by itself.
    pub fn is_running(&self) -> bool {
        self.lock().as_ref().is_some_and(|run| !run.is_finished())
    }

    /// Waits for the machine to come to its end, and tells what it was.
    ///
    /// # Errors
    /// [`VmError::NotStarted`]; as [`Vm::run`].
    pub fn wait(&self) -> Result<Report, VmError> {
        let run = self.lock().take().ok_or(VmError::NotStarted)?;
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Stops the machine where it is, also one that is paused, and tells what it was.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn stop(&self) -> Result<Report, VmError> {
        let running = self.lock();
        if running.is_none() {
            return Err(VmError::NotStarted);
        }
        self.vm.stop();
        drop(running);
        let report = self.wait();
        // It may have ended by itself just before.
        self.vm.forget_stop();
        report
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let run = self.lock().take();
        if let Some(run) = run {
            self.vm.stop();
            match run.join() {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::error!("a machine that was dropped: {error}"),
                Err(_) => tracing::error!("a machine that was dropped panicked"),
            }
        }
    }
}
