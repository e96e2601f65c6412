//! Where the threads of a program wait that does not end.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// After so long, prints where in the kernel every thread of every program is, once. `lab/run` asks
/// for it shortly before it ends the machine, since nobody can look into that any more then.
pub(crate) fn tell_after(time: Duration, mut output: File) {
    thread::spawn(move || {
        thread::sleep(time);
        // The text is for a person to read; if it cannot be had there is nobody to tell.
        let text = threads().unwrap_or_else(|error| format!("no threads in /proc: {error}\n"));
        let _ = output.write_all(text.as_bytes());
    });
}

fn threads() -> io::Result<String> {
    let mut text = String::from("lab: close to --timeout; where the threads are:\n");
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        let number = process.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
        // Not this process, and no kernel thread, which has no memory of its own.
        let is_program = number.is_some_and(|number| number != 1)
            && fs::read(process.join("maps")).is_ok_and(|maps| !maps.is_empty());
        if !is_program {
            continue;
        }
        let Ok(tasks) = fs::read_dir(process.join("task")) else { continue };
        for task in tasks.flatten() {
            text += &thread_of(&task.path());
        }
    }
    Ok(text)
}

/// A thread that ends meanwhile leaves blanks.
fn thread_of(task: &Path) -> String {
    let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
    let mut text = format!("  {} {}", task.display(), read("comm"));
    // R is running, S asleep, D asleep whatever happens: proc_pid_status(5).
    for line in read("status").lines().filter(|line| line.starts_with("State:")) {
        text += &format!("    {line}\n");
    }
    for line in read("stack").lines() {
        text += &format!("    {}\n", line.trim_start_matches("[<0>] "));
    }
    text
}
