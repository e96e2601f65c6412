//! What a fault costs, by queue and by exit, in a tiny virtual machine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::*},
    },
    thread,
    time::{Duration, Instant},
};

use kvm_ioctls::Kvm;
use pageferry_memory::{HostRange, Mapping};
use pageferry_uffd::{
    CopyMode, Event, EventBuffer, Features, Options, Outcome, RegisterMode, Registration,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    thread::{CpuSet, sched_getcpu, sched_setaffinity},
};

use super::{
    doing,
    machine::{self, DATA, Machine, PAGE, Ran, on_a_thread},
};

/// Faults of a round; the fastest of the rounds is taken, as whatever else runs here only adds.
const PAGES: u64 = 64;
const ROUNDS: usize = 5;

/// What a fault costs on this host: the time from the guest's access to its going on, with a page
/// whose contents are there already. The fastest of some rounds of many faults each.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Measured {
    /// Delivered by queue: one userfaultfd, one thread that reads it, on whichever CPU.
    pub queue: Duration,
    /// The same with vCPU and reader on one CPU: nothing is idle meanwhile, as where there are more
    /// vCPUs than CPUs.
    pub queue_on_one_cpu: Duration,
    /// Delivered by exit: KVM_RUN ends, the vCPU's thread installs the page.
    pub exit: Duration,
    /// How many faults of each.
    pub faults: u32,
}

/// Measures, some hundred faults each.
///
/// # Errors
/// What is missing, or went wrong.
pub fn measure() -> Result<Measured, String> {
    let kvm = Kvm::new().map_err(doing("/dev/kvm"))?;
    // Once without timing, for whatever is slow the first time.
    by_exit(&kvm, 1)?;
    by_queue(&kvm, 1, None)?;
    let cpu = sched_getcpu();
    let mut best = [Duration::MAX; 3];
    // Twice, for what changes meanwhile.
    for _ in 0..2 {
        let exit = by_exit(&kvm, ROUNDS)?;
        let [queue, on_one] = [by_queue(&kvm, ROUNDS, None)?, by_queue(&kvm, ROUNDS, Some(cpu))?];
        best = [best[0].min(exit), best[1].min(queue), best[2].min(on_one)];
    }
    let [exit, queue, queue_on_one_cpu] = best;
    Ok(Measured { queue, queue_on_one_cpu, exit, faults: 2 * PAGES as u32 * ROUNDS as u32 })
}

/// Rounds of faults, each prepared by `prepare` and then counted by `faults`.
fn rounds(
    machine: &mut Machine,
    rounds: usize,
    mut prepare: impl FnMut() -> Result<(), String>,
    mut faults: impl FnMut(&mut Machine) -> Result<(), String>,
) -> Result<Duration, String> {
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        prepare()?;
        machine.start(DATA, PAGES)?;
        let start = Instant::now();
        faults(machine)?;
        times.push(start.elapsed() / PAGES as u32);
    }
    times.into_iter().min().ok_or_else(|| "no rounds".to_owned())
}

fn by_exit(kvm: &Kvm, count: usize) -> Result<Duration, String> {
    let machine = Machine::touching(kvm, PAGES)?;
    let data = machine.pages(DATA, PAGES);
    let registration = machine::marked(&machine, data)?;
    on_a_thread(machine, move |machine| {
        let page = [0x5a; PAGE as usize];
        rounds(
            machine,
            count,
            || machine::mark(&registration, data),
            |machine| {
                loop {
                    match machine.run()? {
                        Ran::Marker(address) if data.contains(address) => {
                            let page_of = HostRange::new(address.align_down(PAGE), PAGE);
                            machine.install(registration.uffd(), page_of, &page)?;
                        }
                        Ran::Out(0x5a) => return Ok(()),
                        other => return Err(format!("a fault by exit: {other:?}")),
                    }
                }
            },
        )
    })
}

/// Keeps the calling thread on this CPU, to its end.
fn stay_on(cpu: Option<usize>) -> Result<(), String> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(doing("sched_setaffinity"))
}

/// With `cpu`, both threads stay on that one.
fn by_queue(kvm: &Kvm, count: usize, cpu: Option<usize>) -> Result<Duration, String> {
    let machine = Machine::touching(kvm, PAGES)?;
    let data = machine.pages(DATA, PAGES);
    let uffd = Options::new()
        .required(Features::empty())
        .nonblocking(true)
        .open()
        .map_err(|error| error.to_string())?;
    if uffd.user_mode_only() {
        return Err("a userfaultfd for faults of the kernel cannot be opened".to_owned());
    }
    let registration = Arc::new(uffd)
        .register(Arc::clone(machine.memory()), data, RegisterMode::MISSING)
        .map_err(|error| error.to_string())?;
    let registration = Arc::new(registration);
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (registration, stop) = (Arc::clone(&registration), Arc::clone(&stop));
        thread::Builder::new()
            .name("pf-probe-reader".into())
            .spawn(move || {
                stay_on(cpu)?;
                read(&registration, &stop)
            })
            .map_err(doing("starting a reader"))?
    };
    let took = on_a_thread(machine, move |machine| {
        stay_on(cpu)?;
        rounds(
            machine,
            count,
            || machine::discard(&registration, data),
            |machine| match machine.run()? {
                Ran::Out(0x5a) => Ok(()),
                other => Err(format!("a fault by queue: {other:?}")),
            },
        )
    });
    stop.store(true, Release);
    let read = reader.join().map_err(|_| "the reader panicked".to_owned())?;
    // Why the reader failed is why the guest hung.
    read.and(took)
}

/// Answers faults until it is told to stop.
fn read(registration: &Registration<Arc<Mapping>>, stop: &AtomicBool) -> Result<(), String> {
    let uffd = registration.uffd();
    let mut events = EventBuffer::new(16);
    let tick = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !stop.load(Acquire) {
        let mut fds = [PollFd::new(uffd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&tick)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(format!("poll: {errno}")),
        }
        uffd.read_events(&mut events).map_err(|error| error.to_string())?;
        for event in events.drain() {
            let Event::Fault(fault) = event.map_err(|error| error.to_string())? else { continue };
            let page = fault.address.align_down(PAGE);
            let outcome = uffd.copy(page, &[0x5a; PAGE as usize], CopyMode::WAKE);
            match outcome.map_err(|error| error.to_string())? {
                Outcome::Installed { .. } | Outcome::AlreadyPresent { .. } => {}
                other => return Err(format!("COPY: {other:?}")),
            }
        }
    }
    Ok(())
}
