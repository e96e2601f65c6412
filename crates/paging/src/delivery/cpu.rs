//! Which CPU a thread last ran on.

use std::collections::HashMap;

/// How many faults of a thread are taken to come from the CPU it was last seen on.
const TRUSTED_FOR: u32 = 256;

/// A cache in front of `/proc/TID/stat`, whose 39th field is the CPU last executed on
/// (proc_pid_stat(5)).
#[derive(Default)]
pub(super) struct CpuOf {
    known: HashMap<u32, (u32, u32)>,
}

impl CpuOf {
    /// The CPU; the thread's id itself, which is as good a hash, when it cannot be read.
    pub(super) fn get(&mut self, thread: u32) -> u32 {
        if let Some((cpu, left)) = self.known.get_mut(&thread)
            && *left > 0
        {
            *left -= 1;
            return *cpu;
        }
        let cpu = read(thread).unwrap_or(thread);
        self.known.insert(thread, (cpu, TRUSTED_FOR));
        cpu
    }
}

fn read(thread: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
    processor(&stat)
}

fn processor(stat: &str) -> Option<u32> {
    // The second field, the name in parentheses, may itself hold spaces and parentheses.
    let after_name = &stat[stat.rfind(')')? + 1..];
    after_name.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        assert_eq!(processor(&format!("1 (a) b (c) {}", fields.join(" "))), Some(39));
        assert_eq!(processor("garbage"), None);
    }

    #[test]
    fn this_thread_runs_somewhere() {
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        assert!(read(thread).is_some());
    }
}
