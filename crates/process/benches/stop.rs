//! For how long a process stands still: `cargo bench -p pageferry-process`. What is timed is what
//! the process notices, from the moment its first thread may have been stopped.
//!
//! The process is this program, run again, with so many threads, of which some compute without end;
//! the others sleep, and wake a thousand times a second.
#![allow(missing_docs, reason = "criterion's macros generate undocumented functions")]

use std::{
    hint::black_box,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use criterion::{Criterion, criterion_group, criterion_main};
use pageferry_process::{Pid, Process, StopMethod, StopOptions, UserfaultfdRequest};
use pageferry_uffd::{Features, OpenWay};

/// Say to this program that it is the process, how many threads it has, and how many of them compute.
const CROWD: [&str; 2] = ["PAGEFERRY_BENCH_THREADS", "PAGEFERRY_BENCH_COMPUTING"];

fn crowd(threads: usize, computing: usize) -> ! {
    for number in 0..threads {
        thread::spawn(move || {
            loop {
                (0..1000).for_each(|n| {
                    black_box(n);
                });
                if number >= computing {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
    }
    println!("ready");
    // Until whoever started it is gone.
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0)
}

/// The process, as long as this lives.
struct Crowd(Child);

impl Crowd {
    fn start(threads: usize, computing: usize) -> (Self, Process) {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .envs(CROWD.into_iter().zip([threads, computing].map(|number| number.to_string())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("that it is ready");
        let process = Process::open(Pid::from_child(&child)).expect("the right to trace it");
        (Self(child), process)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn stops(criterion: &mut Criterion) {
    let number = |name| std::env::var(name).ok()?.parse::<usize>().ok();
    if let [Some(threads), Some(computing)] = CROWD.map(number) {
        crowd(threads, computing);
    }
    let options = StopOptions::default().method(StopMethod::Ptrace);
    for (threads, computing) in [(1, 1), (10, 2), (100, 0), (100, 2), (100, 9)] {
        let (_crowd, process) = Crowd::start(threads, computing);
        process.check_syscalls().expect("system calls can be made in its name");
        let mut group =
            criterion.benchmark_group(format!("{threads} threads, {computing} compute"));
        group.sample_size(20);
        group.bench_function("stop", |bencher| {
            bencher.iter_custom(|rounds| {
                let stop = |_| process.stop_with(options).and_then(|stopped| stopped.resume());
                (0..rounds).map(stop).sum::<Result<Duration, _>>().expect("it is stopped")
            });
        });
        group.bench_function("attach", |bencher| {
            bencher.iter_custom(|rounds| {
                let attach = |_| {
                    let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
                    let mut stopped = process.stop_with(options)?;
                    let uffd = stopped.open_userfaultfd(&request)?;
                    let took = stopped.resume();
                    drop(uffd);
                    took
                };
                (0..rounds).map(attach).sum::<Result<Duration, _>>().expect("it is attached to")
            });
        });
        group.finish();
    }
}

criterion_group!(benches, stops);
criterion_main!(benches);
