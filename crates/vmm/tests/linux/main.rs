//! Linux in a guest: booted, used, saved and restored. It needs a kernel and KVM that runs it natively,
//! which `lab/run --suite --package pageferry-vmm` has.

#![allow(unreachable_pub)] // Modules of one program.

mod guest;
mod initramfs;
mod machine;
mod moving;
mod refusals;

use std::{
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use guest::Workload;
use machine::{Console, Memory, guest_kernel, machine, type_line};
use moving::migrated;
use pageferry_dirty::{DirtySet, Tracked, Tracker};
use pageferry_kvm::{KvmAreas, VmPager, VmPagerOptions, dirty::KvmTracker};
use pageferry_migrate::Mode;
use pageferry_paging::Delivery;
use pageferry_vmm::{
    Setup,
    linux::{Disk, LinuxConfig, LinuxEnd, LinuxVm},
    state::MachineState,
};

/// For the whole of a boot in an emulated machine that others slow down.
const BOOT: Duration = Duration::from_secs(600);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(120);
const MEMORY: u64 = 256 << 20;

/// The workload notices what it is there to notice. In a guest this is its first process.
#[test]
fn workload() {
    if guest::is_guest() {
        guest::main();
    }
    let mut workload = Workload::new(64 << 10);
    let sums: Vec<u64> = (0..3).map(|_| workload.next().unwrap()).collect();
    assert!(sums[0] != sums[1] && sums[1] != sums[2], "{sums:x?}");
    assert_eq!(workload.check(), Ok(sums[2]));
    workload.damage(77);
    assert_eq!(workload.next().unwrap_err().find("word 77 of round 3"), Some(0));
}

struct Files {
    initramfs: tempfile::NamedTempFile,
    disk: tempfile::NamedTempFile,
    kernel: std::path::PathBuf,
}

impl Files {
    fn new() -> Option<Self> {
        let directory = guest_kernel()?;
        let mut initramfs = tempfile::NamedTempFile::new().unwrap();
        initramfs::write(&directory, initramfs.as_file_mut());
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(8 << 20).unwrap();
        Some(Self { initramfs, disk, kernel: directory.join("vmlinuz") })
    }

    fn config(&self) -> LinuxConfig {
        let mut config = LinuxConfig::new(&self.kernel, MEMORY);
        config.initramfs = Some(self.initramfs.path().to_owned());
        let disk = |read_only| Disk { path: self.disk.path().to_owned(), read_only };
        config.disks = vec![disk(false), disk(true)];
        // The first process is this program, told to run what it does in a guest.
        config.command_line = format!(
            "{} loglevel=4 {}=1 -- workload --exact --nocapture --test-threads=1",
            LinuxConfig::COMMAND_LINE,
            guest::IN_GUEST,
        );
        config
    }
}

/// What the guest says of its clock, in nanoseconds.
fn clock(vm: &LinuxVm, console: &Console) -> u64 {
    type_line(vm, "clock");
    let said = console.expect(vm, "clock ", ANSWER);
    // An echo of the command has no number.
    let said = if said.is_empty() { console.expect(vm, "clock ", ANSWER) } else { said };
    said.split(' ').next().unwrap().parse().unwrap()
}

/// The number of a round, and the guest's time of it.
fn round(vm: &LinuxVm, console: &Console) -> (u64, u64) {
    let said = console.expect(vm, "round ", ANSWER);
    let words: Vec<&str> = said.split(' ').collect();
    (words[0].parse().unwrap(), words[4].parse().unwrap())
}

/// Types a command, and waits for its answer.
fn ask(vm: &LinuxVm, console: &Console, command: &str, answer: &str) -> String {
    type_line(vm, command);
    console.expect(vm, answer, ANSWER)
}

/// The console goes on in a machine that was restored, the workload's checks pass, and its clock does
/// not jump back, nor ahead by more than the time since.
fn goes_on(vm: &LinuxVm, console: &Console, before: (u64, u64), at_most: Duration) {
    let mut last = before;
    for _ in 0..2 {
        let next = round(vm, console);
        assert!(next.0 > last.0 && next.1 > last.1, "{last:?}, then {next:?}");
        last = next;
    }
    let now = clock(vm, console);
    assert!(now > last.1, "{last:?}, then {now}");
    let passed = Duration::from_nanos(now - before.1);
    assert!(passed < at_most, "{passed:?} in the guest, and {at_most:?} outside");
    ask(vm, console, "random", "random from virtio_rng.0");
    ask(vm, console, "disk", "disk ok");
    ask(vm, console, "echo gnihtemos", "something");
}

/// Copies what the tracker says was written since it was asked last. Returns how many bytes.
fn copy_dirty(tracker: &mut KvmTracker, ranges: &[Tracked], from: &LinuxVm, to: &LinuxVm) -> u64 {
    let dirty = DirtySet::new(ranges).unwrap();
    let harvested = tracker.harvest(&dirty).unwrap();
    assert!(harvested.whole.is_empty(), "{harvested:?}");
    let mut copied = 0;
    for run in dirty.take() {
        let slots = from.tracked_slots();
        let slot = slots.iter().find(|slot| slot.view.contains(run.start())).unwrap();
        let offset = run.start().get() - slot.view.start().get();
        let view = |vm: &LinuxVm| {
            let layout = vm.layout();
            let (_, region) = layout.iter().nth(slot.slot as usize).unwrap();
            Arc::clone(region.guest_view())
        };
        let mut bytes = vec![0; run.len() as usize];
        view(from).read_at(offset, &mut bytes).unwrap();
        view(to).write_at(offset, &bytes).unwrap();
        copied += run.len();
    }
    copied
}

/// Two vCPUs at work while their memory is copied, in rounds; what is written meanwhile, by them and by
/// devices, is copied again.
#[test]
fn linux_moves_while_it_works() {
    let Some(files) = Files::new() else { return };
    let console = Console::default();
    let mut config = files.config();
    config.vcpus = 2;
    config.setup = Setup::MinorOwnView;
    let started = Instant::now();
    let vm = Arc::new(machine(&config, &console));
    vm.boot().unwrap();
    vm.start(None).unwrap();
    console.expect(&vm, guest::PROMPT, BOOT);
    ask(&vm, &console, "cpus", "cpus 0-1");
    println!("{:?} to a prompt", started.elapsed());
    ask(&vm, &console, "work twice", "working");
    round(&vm, &console);

    let mut tracker = vm.tracker().unwrap();
    let ranges: Vec<_> = vm.tracked_slots().iter().map(|slot| Tracked::base(slot.view)).collect();
    tracker.arm(&ranges).unwrap();
    let other = machine(&config, &console);
    let memory = Memory(Arc::clone(&vm));
    memory.copy_to(&other);
    let mut before = round(&vm, &console);
    for _ in 0..2 {
        ask(&vm, &console, "disk", "disk ok");
        before = round(&vm, &console);
        let copied = copy_dirty(&mut tracker, &ranges, &vm, &other);
        assert!(copied > 0, "the workload writes");
        println!("{:?}: {copied} bytes in a round", started.elapsed());
    }
    let saved_at = Instant::now();
    vm.pause();
    let state = vm.save().unwrap().encode();
    let copied = copy_dirty(&mut tracker, &ranges, &vm, &other);
    println!("{:?}: {copied} bytes at last", started.elapsed());
    assert_eq!(memory.first_difference(&other), None, "a write was missed");
    tracker.disarm().unwrap();
    vm.stop();

    other.restore(&MachineState::decode(&state).unwrap()).unwrap();
    other.start(None).unwrap();
    goes_on(&other, &console, before, saved_at.elapsed() + ANSWER);

    // And again by the protocol, in each of its ways, to memory of each kind.
    let mut vm = Arc::new(other);
    for (mode, setup) in [
        (Mode::PreCopy, Setup::Missing),
        (Mode::PostCopy, Setup::Minor),
        (Mode::Hybrid, Setup::MinorOwnView),
    ] {
        let before = round(&vm, &console);
        let moved_at = Instant::now();
        config.setup = setup;
        let there = migrated(&vm, &config, Box::new(console.clone()), mode);
        assert_eq!(vm.wait(Duration::ZERO), Some(LinuxEnd::Stopped));
        vm = there;
        println!("{:?}: migrated in mode {mode:?}", started.elapsed());
        goes_on(&vm, &console, before, moved_at.elapsed() + ANSWER);
    }
    type_line(&vm, "stop");
    for _ in 0..2 {
        let rounds = console.expect(&vm, "stopped after ", ANSWER);
        assert!(!rounds.starts_with("0 "), "{rounds}");
    }
    type_line(&vm, "reboot");
    assert_eq!(vm.wait(ANSWER), Some(LinuxEnd::Reboot));
    println!("{:?} in all", started.elapsed());
}

fn restored(config: &LinuxConfig, state: &[u8], console: &Console) -> LinuxVm {
    let vm = machine(config, console);
    vm.restore(&MachineState::decode(state).unwrap()).unwrap();
    vm
}

#[test]
fn linux_boots_works_and_goes_on_in_other_machines() {
    let Some(files) = Files::new() else { return };
    let console = Console::default();
    let config = files.config();
    let started = Instant::now();
    let vm = Arc::new(machine(&config, &console));
    vm.boot().unwrap();
    vm.start(None).unwrap();
    let version = console.expect(&vm, guest::PROMPT, BOOT);
    println!("{:?} to a prompt{version}", started.elapsed());
    assert!(version.contains("Linux version"), "{version}");

    assert_eq!(ask(&vm, &console, "cpus", "cpus 0"), "");
    println!("{}", ask(&vm, &console, "clocksource", "clocksource kvm-clock"));
    ask(&vm, &console, "random", "random from virtio_rng.0");
    ask(&vm, &console, "disk", "disk ok");
    ask(&vm, &console, "read-only", "refused");
    let expected: Vec<u8> = (0..guest::DISK_BYTES).map(guest::disk_byte).collect();
    let mut found = vec![0; guest::DISK_BYTES];
    files.disk.as_file().read_exact_at(&mut found, guest::DISK_OFFSET).unwrap();
    assert!(found == expected, "what the guest wrote is on the disk");

    ask(&vm, &console, "work", "working");
    round(&vm, &console);
    let before = round(&vm, &console);
    let saved_at = Instant::now();
    vm.pause();
    let state = vm.save().unwrap().encode();
    println!("{} bytes of state", state.len());
    assert!(vm.wait(Duration::ZERO).is_none(), "it is not over");
    vm.stop();

    // From the same state, with the memory copied and with memory that arrives as it is touched.
    let first = Memory(Arc::clone(&vm));
    {
        let vm = restored(&config, &state, &console);
        first.copy_to(&vm);
        vm.start(None).unwrap();
        goes_on(&vm, &console, before, saved_at.elapsed() + ANSWER);
        println!("{:?}: gone on with memory that was copied", started.elapsed());
    }
    for (setup, delivery) in [(Setup::Minor, Delivery::Queue), (Setup::NoQueue, Delivery::Exit)] {
        let mut config = config.clone();
        config.setup = setup;
        let vm = restored(&config, &state, &console);
        let source = Arc::new(Memory(Arc::clone(&first.0)));
        let pager = Arc::new(vm.pager().delivery(delivery).start(source).unwrap());
        let options = VmPagerOptions { kvm_areas: KvmAreas::Follow, ..Default::default() };
        let vm_pager = VmPager::new(Arc::clone(&pager), options).unwrap();
        vm.start(Some(&vm_pager)).unwrap();
        goes_on(&vm, &console, before, saved_at.elapsed() + ANSWER);
        println!("{:?}: gone on with {delivery}, {} left", started.elapsed(), pager.remaining());
        if setup == Setup::NoQueue {
            type_line(&vm, "stop");
            console.expect(&vm, "stopped after", ANSWER);
            type_line(&vm, "off");
            assert_eq!(vm.wait(ANSWER), Some(LinuxEnd::PowerOff));
        }
    }
    println!("{:?} in all", started.elapsed());
}
