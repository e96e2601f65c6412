//! The first process of a lab machine.
//!
//! It finds what to do in its initramfs: kernel modules in the order of `/lab/modules`, and the
//! programs of `/lab/programs` with their arguments, one after the other. What they print goes to
//! the second serial port, what became of them to the third, so that the kernel's messages, on the
//! first, never stand in the middle of either. `lab/run` reads all three.

#![deny(unsafe_code)]

mod hang;
mod network;
mod orphans;
mod programs;
mod report;

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

use report::Report;

/// What could not be done, in words, with what the kernel said.
type Error = String;

fn main() -> ! {
    // Should this fail, or panic, the kernel panics because its first process is gone, and
    // `lab/run` shows that.
    mount_all().expect("mounting");
    let mut report = Report::open("/dev/ttyS2").expect("opening /dev/ttyS2");
    match boot(&mut report) {
        Ok(()) => report.line("done"),
        Err(error) => report.line(&format!("failed {error}")),
    }
    rustix::fs::sync();
    let error = reboot(RebootCommand::PowerOff).expect_err("returns only if it failed");
    panic!("powering off: {error}");
}

fn boot(report: &mut Report) -> Result<(), Error> {
    for path in lines("/lab/modules")? {
        load(&path)?;
    }
    network::loopback_up().map_err(|error| format!("bringing up lo: {error}"))?;
    check_huge_pages()?;
    report.line(&format!("ready {}", uptime()?));
    let output =
        report::raw_port("/dev/ttyS1").map_err(|error| format!("opening /dev/ttyS1: {error}"))?;
    // Words of the command line that the kernel does not know are its first process's environment.
    if let Ok(seconds) = env::var("LAB_TELL_AFTER") {
        let seconds = seconds.parse().map_err(|_| format!("LAB_TELL_AFTER={seconds}"))?;
        let output = output.try_clone().map_err(|error| format!("/dev/ttyS1: {error}"))?;
        hang::tell_after(Duration::from_secs(seconds), output);
    }
    for (number, program) in programs::read("/lab/programs")?.iter().enumerate() {
        report.line(&format!("start {number}"));
        let before = uptime()?;
        let end = program.run(&output)?;
        orphans::end_all().map_err(|error| format!("ending what {program} left: {error}"))?;
        report.line(&format!("end {number} {end} {:.1}", uptime()? - before));
    }
    Ok(())
}

fn mount_all() -> Result<(), Error> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, at, flags) in [
        ("proc", "/proc", plain),
        ("sysfs", "/sys", plain),
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("tmpfs", "/tmp", plain),
        ("tmpfs", "/dev/shm", plain),
    ] {
        fs::create_dir_all(at).map_err(|error| format!("creating {at}: {error}"))?;
        mount(kind, at, kind, flags, None).map_err(|error| format!("mounting {at}: {error}"))?;
    }
    Ok(())
}

fn load(path: &str) -> Result<(), Error> {
    let failed = |error: io::Error| format!("loading {path}: {error}");
    let module = File::open(path).map_err(failed)?;
    finit_module(module, c"", 0).map_err(|error| failed(error.into()))
}

/// `/lab/hugepages` says what the kernel's command line asked for: one `KIB PAGES` a line.
fn check_huge_pages() -> Result<(), Error> {
    for line in lines("/lab/hugepages")? {
        let (kib, asked) = line.split_once(' ').ok_or(format!("/lab/hugepages: {line}"))?;
        let file = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages");
        let got = read(&file)?;
        if got.trim() != asked {
            return Err(format!("{asked} huge pages of {kib} KiB asked for, {} got", got.trim()));
        }
    }
    Ok(())
}

/// Seconds since the kernel started.
fn uptime() -> Result<f64, Error> {
    let text = read("/proc/uptime")?;
    let seconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
    seconds.ok_or(format!("/proc/uptime: {text}"))
}

fn lines(path: &str) -> Result<Vec<String>, Error> {
    Ok(read(path)?.lines().map(str::to_owned).collect())
}

fn read(path: impl AsRef<Path>) -> Result<String, Error> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| format!("reading {}: {error}", path.display()))
}
