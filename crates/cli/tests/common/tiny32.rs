//! A 32-bit program that counts, and nothing else.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::Pid;

use super::common::wait_for;

const BASE: u32 = 0x0804_8000;
/// A page of its own, zero at the start.
const COUNTER: u32 = BASE + 0x1000;
const HEADERS: u32 = 52 + 32;

/// The program's file: one segment with everything (elf(5)).
fn elf() -> Vec<u8> {
    let time = BASE + HEADERS + 22;
    let mut code = vec![0xff, 0x05]; // inc dword [COUNTER]
    code.extend(COUNTER.to_le_bytes());
    code.extend([0xb8, 162, 0, 0, 0]); // mov eax, nanosleep
    code.push(0xbb); // mov ebx, time
    code.extend(time.to_le_bytes());
    code.extend([0x31, 0xc9]); // xor ecx, ecx
    code.extend([0xcd, 0x80]); // int 0x80
    code.extend([0xeb, 0xea]); // jmp to the start
    assert_eq!(code.len(), 22);
    // No seconds, and 100,000 nanoseconds.
    code.extend([0_u32, 100_000].map(u32::to_le_bytes).concat());

    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for i386.
    file.extend([2_u16, 3].map(u16::to_le_bytes).concat());
    // Version, entry, offset of the program headers, no sections, no flags.
    file.extend([1, BASE + HEADERS, 52, 0, 0].map(u32::to_le_bytes).concat());
    // Sizes of this header and of a program header, one of those, no sections.
    file.extend([52_u16, 32, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    let length = HEADERS + code.len() as u32;
    // PT_LOAD from 0 to BASE, twice; its length in the file and in memory; RWX; alignment.
    file.extend([1, 0, BASE, BASE, length, 0x2000, 7, 0x1000].map(u32::to_le_bytes).concat());
    assert_eq!(file.len(), HEADERS as usize);
    file.extend(code);
    file
}

/// The program while it runs; killed on drop.
pub(crate) struct Tiny32 {
    child: Child,
    memory: File,
}

impl Tiny32 {
    /// `None`, having said so, where 32-bit programs do not run.
    pub(crate) fn start(folder: &Path) -> Option<Self> {
        const TEXT_BUSY: i32 = libc::ETXTBSY;
        let path = folder.join("tiny32");
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o755).open(&path);
        file.and_then(|file| file.write_all_at(&elf(), 0)).expect("written");
        // A process that another test forks just now has the file open for writing until it
        // starts its program.
        let started = wait_for("the program can be started", || {
            let started = Command::new(&path).stdin(Stdio::null()).spawn();
            let busy = started.as_ref().is_err_and(|error| error.raw_os_error() == Some(TEXT_BUSY));
            (!busy).then_some(started)
        });
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: needs a kernel that runs 32-bit programs: {error}");
                return None;
            }
        };
        let memory = File::open(format!("/proc/{}/mem", child.id())).expect("its memory");
        let counts = wait_for("it counts", || {
            let ended = child.try_wait().expect("waiting").is_some();
            (ended || count(&memory) > 0).then_some(!ended)
        });
        if !counts {
            println!("skipped: needs a kernel with system calls for 32-bit programs");
            return None;
        }
        Some(Self { child, memory })
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// It goes on, and nothing traces it.
    #[track_caller]
    pub(crate) fn assert_untouched(&self) {
        let before = count(&self.memory);
        wait_for("it counts on", || (count(&self.memory) > before).then_some(()));
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it");
        assert!(status.contains("TracerPid:\t0"), "{status}");
    }
}

/// 0 before the program is there.
fn count(memory: &File) -> u32 {
    let mut bytes = [0; 4];
    match memory.read_exact_at(&mut bytes, COUNTER.into()) {
        Ok(()) => u32::from_le_bytes(bytes),
        Err(_) => 0,
    }
}

impl Drop for Tiny32 {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
