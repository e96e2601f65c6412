//! A vCPU: KVM_RUN, again and again, until it ends for a reason that is not paging.

use std::{fmt, sync::Arc, time::Instant};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{Error, VcpuExit, VcpuFd};
use pageferry_memory::{GuestAddress, HostAddress, State};
use pageferry_paging::Resolved;

use crate::{
    KvmError, MemoryErrors, Place, RunError, SignalSet, VcpuStats,
    access::Access,
    areas,
    exit::ExitKind,
    fetch::Fetch,
    machine_check,
    pending::{Pending, What},
    registers::Write,
    signals::{Blocked, Sigbus},
    slots::Snapshot,
    stats::Counters,
    sys::{self, ImmediateExit},
    vm::{KvmAreas, Shared},
};

/// Why a vCPU stopped running.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Whatever KVM_RUN ended with, untouched.
    Kvm(VcpuExit<'a>),
    /// The guest touched memory that can never come. If the vCPU runs on as it is, it touches it
    /// again; a device-like access (of an instruction that KVM emulates) then reads ones, or writes
    /// nowhere, and a register that is to name an area there is not set: the guest gets an exception.
    MemoryError {
        /// Where the guest has it, if a slot shows it.
        guest: Option<GuestAddress>,
        /// Where KVM has it.
        host: HostAddress,
    },
}

/// Runs one vCPU, from its first run to its last, on whichever thread.
///
/// A vCPU belongs to its pager: run directly by [`VcpuFd::run`] while memory is missing it would
/// not leave KVM_RUN for a marker, or be killed by it. Its signal mask (KVM_SET_SIGNAL_MASK) is the
/// pager's, too.
pub struct VcpuPager {
    pub(crate) vm: Arc<Shared>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) slots: Snapshot,
    /// The mask that KVM has for this vCPU.
    kvm_mask: Option<SignalSet>,
    /// The one the embedder would have there.
    embedders_mask: Option<SignalSet>,
    prepared: bool,
    /// The guest's current instruction waits for this.
    pub(crate) pending: Option<Pending>,
    pub(crate) fetch: Fetch,
    /// The guest address of the last exit, if that was KVM_EXIT_MEMORY_FAULT.
    last_fault: Option<GuestAddress>,
    /// A foreign SIGBUS that the embedder blocks has ended a run.
    left_for_foreign: bool,
}

/// What follows an exit.
pub(crate) enum Next {
    /// KVM_RUN.
    Enter,
    /// Leaving because of a signal, `immediate_exit`, or something else that is no exit.
    Leave(RunError),
    /// The exit, untouched.
    Untouched,
    /// Memory that can never come.
    MemoryError { guest: Option<GuestAddress>, host: HostAddress },
}

impl VcpuPager {
    pub(crate) fn new(vm: Arc<Shared>, counters: Arc<Counters>) -> Self {
        Self {
            slots: vm.slots.snapshot(),
            vm,
            counters,
            kvm_mask: None,
            embedders_mask: None,
            prepared: false,
            pending: None,
            fetch: Fetch::default(),
            last_fault: None,
            left_for_foreign: false,
        }
    }

    /// Runs the vCPU until it exits for a reason that is not paging. While it waits for a page, and
    /// when it returns, the rules for signals are those of KVM_RUN: a signal that the calling
    /// thread does not block, and `immediate_exit`, end it with EINTR.
    ///
    /// # Errors
    /// [`RunError::Kvm`] is KVM_RUN's own error.
    pub fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        let vcpu: *mut VcpuFd = vcpu;
        if self.pending.is_none() && !self.vm.may_exit() {
            // SAFETY: as in `run_blocked`.
            if let Some(exit) = self.run_directly(unsafe { &mut *vcpu })? {
                return Ok(exit);
            }
        }
        // SAFETY: as in `run_blocked`: nothing has been returned.
        let vcpu: &'a mut VcpuFd = unsafe { &mut *vcpu };
        let mut blocked = Blocked::new();
        let mask = self.embedders_mask.unwrap_or(blocked.before());
        if self.kvm_mask != Some(mask.without(libc::SIGBUS)) {
            self.set_kvm_mask(vcpu, Some(mask.without(libc::SIGBUS))).map_err(RunError::Paging)?;
        }
        let mut thread = Thread {
            blocked: &mut blocked,
            mask,
            immediate_exit: ImmediateExit::of(vcpu),
            waited: false,
            paging: false,
        };
        self.slots.renew(&self.vm.slots);
        match self.prepare(vcpu, &mut thread)? {
            Next::Enter => self.run_blocked(vcpu, &mut thread),
            Next::MemoryError { guest, host } => Ok(Exit::MemoryError { guest, host }),
            Next::Leave(error) => Err(error),
            Next::Untouched => unreachable!("there was no exit yet"),
        }
    }

    /// KVM_RUN and nothing else, as there is nothing to be paged. `None`: for the one exit that
    /// remains to be taken care of, which is pending now.
    fn run_directly<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Option<Exit<'a>>, RunError> {
        if self.kvm_mask != self.embedders_mask {
            self.set_kvm_mask(vcpu, self.embedders_mask).map_err(RunError::Paging)?;
        }
        let vcpu: *mut VcpuFd = vcpu;
        loop {
            // SAFETY: as in `run_blocked`.
            match unsafe { &mut *vcpu }.run() {
                Ok(VcpuExit::X86Wrmsr(exit)) if self.vm.follows_areas() => {
                    let Some(write) = Write::of(&exit) else {
                        return Ok(Some(Exit::Kvm(VcpuExit::X86Wrmsr(exit))));
                    };
                    Counters::count(&self.counters.register_writes);
                    self.pending = Some(Pending::new(What::Register(write)));
                    return Ok(None);
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL))
                    if self.ring_full().map_err(RunError::Paging)? => {}
                result => return result.map(|exit| Some(Exit::Kvm(exit))).map_err(RunError::Kvm),
            }
        }
    }

    /// The vCPU's dirty ring is full: whether it has been emptied.
    fn ring_full(&self) -> Result<bool, KvmError> {
        let Some(collector) = self.vm.collector() else { return Ok(false) };
        collector.collect()?;
        Counters::count(&self.counters.rings_full);
        Ok(true)
    }

    fn run_blocked<'a>(
        &mut self,
        vcpu: &'a mut VcpuFd,
        thread: &mut Thread<'_>,
    ) -> Result<Exit<'a>, RunError> {
        let vcpu: *mut VcpuFd = vcpu;
        loop {
            // SAFETY: the reference is exclusive for 'a, and each round's result is gone before the
            // next round, or returned. (The borrow checker takes it to be borrowed for 'a in every
            // round, since it is in the last.)
            let result: Result<VcpuExit<'a>, Error> = unsafe { &mut *vcpu }.run();
            let left = Instant::now();
            self.slots.renew(&self.vm.slots);
            let kind = ExitKind::of(&result, &self.slots, self.vm.follows_areas());
            self.forget_others(kind);
            if kind == ExitKind::Other {
                return result.map(Exit::Kvm).map_err(RunError::Kvm);
            }
            // What this exit was, in case that it turns out to be none of ours.
            let untouched = match result {
                Ok(VcpuExit::InternalError) => Ok(VcpuExit::InternalError),
                Ok(VcpuExit::IrqWindowOpen) => Ok(VcpuExit::IrqWindowOpen),
                Ok(VcpuExit::Unsupported(reason)) => Ok(VcpuExit::Unsupported(reason)),
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    Ok(VcpuExit::MemoryFault { flags, gpa, size })
                }
                // Every access that is found in a slot is made, and every register set.
                Ok(_) => Ok(VcpuExit::Unknown),
                Err(error) => Err(error),
            };
            // SAFETY: as above; the result that borrowed from it has just been consumed.
            let next = self.handle(kind, unsafe { &mut *vcpu }, thread);
            if std::mem::take(&mut thread.paging) {
                self.counters.time(left.elapsed());
            }
            if std::mem::take(&mut thread.waited) {
                Counters::count(&self.counters.waited);
            }
            match next {
                Next::Enter => {}
                Next::Leave(error) => return Err(error),
                Next::Untouched => return untouched.map(Exit::Kvm).map_err(RunError::Kvm),
                Next::MemoryError { guest, host } => {
                    return Ok(Exit::MemoryError { guest, host });
                }
            }
        }
    }

    fn handle(&mut self, kind: ExitKind, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Next {
        match kind {
            ExitKind::Signal => self.signal(vcpu, thread),
            ExitKind::PerhapsSignal => match self.signal(vcpu, thread) {
                // The page is there, and the embedder has its exit; or there was no signal.
                Next::Enter | Next::Leave(_) => Next::Untouched,
                next => next,
            },
            ExitKind::Access { guest, write } => {
                let counters = &self.counters;
                Counters::count(if write { &counters.mmio_writes } else { &counters.mmio_reads });
                self.pending = Some(Pending::new(What::Access(Access::new(guest, write))));
                self.finish(vcpu, thread)
            }
            ExitKind::RegisterWrite(write) => {
                Counters::count(&self.counters.register_writes);
                thread.paging = true;
                self.pending = Some(Pending::new(What::Register(write)));
                self.finish(vcpu, thread)
            }
            ExitKind::InternalError => self.fetch(vcpu, thread),
            ExitKind::MemoryFault { place, guest } => {
                if self.last_fault.replace(guest) == Some(guest) && self.is_present(place) {
                    // It is not for want of the page.
                    self.last_fault = None;
                    return Next::Untouched;
                }
                Counters::count(&self.counters.memory_faults);
                self.bring(place.host, vcpu, thread)
            }
            ExitKind::RingFull => match self.ring_full() {
                Ok(true) => Next::Enter,
                // It is looked for before signals are, too.
                Ok(false) => self.handle(ExitKind::PerhapsSignal, vcpu, thread),
                Err(error) => Next::Leave(RunError::Paging(error)),
            },
            ExitKind::Other => Next::Untouched,
        }
    }

    /// Only exits in a row are the same one again.
    fn forget_others(&mut self, kind: ExitKind) {
        if !matches!(kind, ExitKind::MemoryFault { .. }) {
            self.last_fault = None;
        }
        if kind != ExitKind::InternalError {
            self.fetch = Fetch::default();
        }
    }

    /// A signal ended KVM_RUN.
    fn signal(&mut self, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Next {
        let Some(sigbus) = thread.blocked.take_sigbus() else {
            return Next::Leave(RunError::interrupted());
        };
        let Some(page) = sigbus.page() else { return self.foreign(sigbus, thread) };
        match self.resolve(page, thread) {
            Resolved::NotOurs => self.foreign(sigbus, thread),
            resolved => {
                Counters::count(&self.counters.poison);
                self.resolved(resolved, page, vcpu)
            }
        }
    }

    /// Somebody else's SIGBUS: they get it, with the thread's mask as they left it.
    fn foreign(&mut self, sigbus: Sigbus, thread: &mut Thread<'_>) -> Next {
        thread.paging = false;
        Counters::count(&self.counters.foreign_signals);
        tracing::debug!("passing on a SIGBUS with code {}", sigbus.code());
        let blocked = thread.blocked.before().contains(libc::SIGBUS);
        thread.blocked.put_back(sigbus);
        // One who blocks it may not look for it before the next run, which is not to end for it
        // again, and so on for ever: it is kept back until that run is over.
        if blocked && std::mem::replace(&mut self.left_for_foreign, true) {
            return Next::Enter;
        }
        Next::Leave(RunError::interrupted())
    }

    /// Brings a page that KVM_RUN ended for.
    pub(crate) fn bring(
        &mut self,
        host: HostAddress,
        vcpu: &VcpuFd,
        thread: &mut Thread<'_>,
    ) -> Next {
        let resolved = self.resolve(host, thread);
        self.resolved(resolved, host, vcpu)
    }

    pub(crate) fn resolve(&self, host: HostAddress, thread: &mut Thread<'_>) -> Resolved {
        thread.paging = true;
        self.vm.pager.resolve_exit(host, &mut || thread.interrupted())
    }

    fn resolved(&self, resolved: Resolved, host: HostAddress, vcpu: &VcpuFd) -> Next {
        match resolved {
            Resolved::Present => Next::Enter,
            Resolved::Poisoned => self.memory_error(host, vcpu, true),
            Resolved::NotOurs => Next::Untouched,
            Resolved::Interrupted => self.interrupted(),
        }
    }

    pub(crate) fn interrupted(&self) -> Next {
        Counters::count(&self.counters.interrupted);
        Next::Leave(RunError::interrupted())
    }

    /// The guest touched memory that can never come. `restartable`: the instruction that did has
    /// not been executed in part.
    pub(crate) fn memory_error(&self, host: HostAddress, vcpu: &VcpuFd, restartable: bool) -> Next {
        Counters::count(&self.counters.memory_errors);
        let guest = self.slots.guest_address(host);
        if let (MemoryErrors::Mce, Some(guest)) = (self.vm.options.memory_errors, guest) {
            match machine_check::raise(vcpu, guest, restartable) {
                Ok(()) => {
                    Counters::count(&self.counters.machine_checks);
                    return Next::Enter;
                }
                Err(why) => tracing::warn!("no machine check for {guest}: {why}"),
            }
        }
        Next::MemoryError { guest, host }
    }

    /// What has to be done before KVM_RUN: once, and for an instruction that was interrupted.
    fn prepare(&mut self, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Result<Next, RunError> {
        if !self.prepared {
            if self.vm.options.memory_errors == MemoryErrors::Mce {
                machine_check::set_up(vcpu).map_err(RunError::Paging)?;
            }
            // A delivery by queue holds KVM up until they have come.
            if self.vm.by_exits && self.vm.options.kvm_areas != KvmAreas::Leave {
                match areas::bring(self, vcpu, thread) {
                    Ok(()) => {}
                    Err(KvmError::Interrupted { .. }) => return Ok(self.interrupted()),
                    Err(error) => return Err(RunError::Paging(error)),
                }
            }
            self.prepared = true;
        }
        Ok(self.finish(vcpu, thread))
    }

    /// Brings the areas of guest memory that KVM writes by itself, as the vCPU's registers name
    /// them: kvmclock, stolen time, asynchronous page faults, paravirtual end of interrupt, and the
    /// pages of Hyper-V. The first [`run`](Self::run) does so unless the options say otherwise;
    /// again it is needed where an embedder sets such registers later, and, unless the options say
    /// [`KvmAreas::Follow`], where the guest does.
    ///
    /// It waits, whatever signals come.
    ///
    /// # Errors
    /// [`KvmError::AreaPoisoned`].
    pub fn make_kvm_areas_present(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        areas::bring_all(self, vcpu)
    }

    /// What is to be blocked inside KVM_RUN, instead of what the thread blocks: what an embedder
    /// would give to KVM_SET_SIGNAL_MASK, which it must not call itself.
    pub fn set_signal_mask(&mut self, mask: Option<SignalSet>) {
        self.embedders_mask = mask;
    }

    /// Whether an instruction that KVM emulates waits for memory, or one that sets a register for the
    /// area that it names: [`run`](Self::run) was interrupted in the middle of it. The vCPU's
    /// registers are then those of neither before nor after it; to save them, run on with
    /// `immediate_exit` set until this is false.
    pub fn is_mid_instruction(&self) -> bool {
        self.pending.is_some()
    }

    /// What the paging exits were so far.
    pub fn stats(&self) -> VcpuStats {
        self.counters.snapshot()
    }

    fn set_kvm_mask(&mut self, vcpu: &VcpuFd, mask: Option<SignalSet>) -> Result<(), KvmError> {
        sys::set_signal_mask(vcpu, mask).map_err(KvmError::ioctl("KVM_SET_SIGNAL_MASK"))?;
        self.kvm_mask = mask;
        Ok(())
    }

    /// Whether the granule has come.
    pub(crate) fn is_present(&self, place: Place) -> bool {
        let region = self.vm.pager.layout().get(place.region);
        region.is_some_and(|region| region.page_map().state(place.granule) == State::Present)
    }
}

impl fmt::Debug for VcpuPager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuPager").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The calling thread, while it is in [`VcpuPager::run`].
pub(crate) struct Thread<'b> {
    blocked: &'b mut Blocked,
    /// What is blocked inside KVM_RUN as far as the embedder is concerned.
    mask: SignalSet,
    immediate_exit: ImmediateExit,
    /// Whether it had to wait for somebody.
    waited: bool,
    /// Whether the last exit was for memory.
    paging: bool,
}

impl Thread<'_> {
    /// Whether KVM_RUN would end at once.
    pub(crate) fn interrupted(&mut self) -> bool {
        self.waited = true;
        // SAFETY: the vCPU is lent to the call of `run` that made this.
        let immediately = unsafe { self.immediate_exit.is_set() };
        immediately || self.blocked.waits_beyond(self.mask)
    }
}
