//! For how long a process stands still: `cargo bench -p pageferry-process`. What is timed is what
//! the process notices, from the moment its first thread may have been stopped until all may go on.
//!
//! The process is this program, run again, with so many threads, of which some compute without end;
//! the others sleep, and wake a thousand times a second.

use std::{
    hint::black_box,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use pageferry_process::{Pid, Process, ProcessError, StopMethod, StopOptions, UserfaultfdRequest};
use pageferry_uffd::{Features, OpenWay};

/// Say to this program that it is the process, how many threads it has, and how many of them compute.
const CROWD: [&str; 2] = ["PAGEFERRY_BENCH_THREADS", "PAGEFERRY_BENCH_COMPUTING"];
/// How many threads the process has, and how many of them compute.
const CROWDS: [(usize, usize); 5] = [(1, 1), (10, 2), (100, 0), (100, 2), (100, 9)];
/// How often each is stopped.
const ROUNDS: usize = 300;
/// For how long the process runs in between.
const BETWEEN: Duration = Duration::from_millis(5);

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

/// Stops a process, and lets it go on.
fn stop(process: &Process) -> Result<Duration, ProcessError> {
    process.stop_with(StopOptions::default().method(StopMethod::Ptrace))?.resume()
}

/// Stops a process for as long as it takes to have a userfaultfd of it.
fn attach(process: &Process) -> Result<Duration, ProcessError> {
    let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
    let mut stopped = process.stop_with(StopOptions::default().method(StopMethod::Ptrace))?;
    let uffd = stopped.open_userfaultfd(&request)?;
    let took = stopped.resume();
    drop(uffd);
    took
}

fn main() {
    let number = |name| std::env::var(name).ok()?.parse::<usize>().ok();
    if let [Some(threads), Some(computing)] = CROWD.map(number) {
        crowd(threads, computing);
    }
    // `cargo test --benches` asks only whether it works.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
    println!("threads  computing  what       p50 ms   p99 ms   max ms   ({rounds} rounds)");
    for (threads, computing) in CROWDS {
        let (_crowd, process) = Crowd::start(threads, computing);
        process.check_syscalls().expect("system calls can be made in its name");
        for (name, what) in [("stop", stop as fn(&Process) -> _), ("attach", attach)] {
            let mut times: Vec<_> = (0..rounds)
                .map(|_| {
                    thread::sleep(BETWEEN);
                    what(&process).expect("it is stopped").as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let at = |percent: usize| times[(rounds * percent).div_ceil(100) - 1];
            println!(
                "{threads:7}  {computing:9}  {name:6}  {:9.2}{:9.2}{:9.2}",
                at(50),
                at(99),
                at(100)
            );
        }
    }
}
