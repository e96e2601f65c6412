//! The command as a user without privileges runs it, and where userfaultfd(2) is denied.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use super::common::{binary, command, host::is_root};

const NOBODY: u32 = 65534;

/// The program, where any user may run it.
pub(crate) struct ForNobody {
    _folder: tempfile::TempDir,
    program: PathBuf,
}

impl ForNobody {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("readable");
        let program = folder.path().join("pageferry");
        // By another process: one that this process forks meanwhile would inherit a descriptor
        // that writes to the copy, and a program that is open for writing cannot be started.
        let copied = Command::new("install")
            .args(["-m", "755"])
            .args([binary(), &program])
            .status()
            .expect("install(1) starts");
        assert!(copied.success(), "copying the program: {copied}");
        Self { _folder: folder, program }
    }

    /// Run by root, as a user without privileges; otherwise by whoever this is.
    pub(crate) fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = command(&self.program, args);
        command.current_dir("/");
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

fn mode_for_others(path: &str) -> Option<u32> {
    Some(Path::new(path).metadata().ok()?.permissions().mode() & 0o007)
}

/// Whether the user that [`ForNobody`] runs as can open this node for reading and writing.
#[allow(dead_code, reason = "each test program uses a part")]
pub(crate) fn nobody_can_open(path: &str) -> bool {
    if is_root() {
        return mode_for_others(path).is_some_and(|mode| mode & 0o006 == 0o006);
    }
    fs::OpenOptions::new().read(true).write(true).open(path).is_ok()
}

/// Makes userfaultfd(2) fail with EPERM in `command`, as containers do (seccomp(2)).
#[allow(dead_code, reason = "each test program uses a part")]
pub(crate) fn without_userfaultfd(command: &mut Command) {
    const fn filter(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    use libc::{
        BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
        SECCOMP_RET_ERRNO,
    };
    // The first word of seccomp_data is the number of the system call.
    static PROGRAM: [libc::sock_filter; 4] = [
        filter(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        filter(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        filter(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | libc::EPERM as u32),
        filter(BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW),
    ];
    let install = || {
        let program =
            libc::sock_fprog { len: PROGRAM.len() as u16, filter: PROGRAM.as_ptr().cast_mut() };
        // SAFETY: prctl(2) reads the program, which is static, and writes nothing.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
                    != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: `install` only makes two system calls: it is async-signal-safe.
    unsafe { command.pre_exec(install) };
}

/// A command that cannot have a userfaultfd by any way; `None`, having said so, where this cannot
/// be brought about.
#[allow(dead_code, reason = "each test program uses a part")]
pub(crate) fn deprived<'a>(
    nobody: &ForNobody,
    args: impl IntoIterator<Item = &'a str>,
) -> Option<Command> {
    if nobody_can_open("/dev/userfaultfd") {
        println!("skipped: needs a user who may not open /dev/userfaultfd");
        return None;
    }
    let mut command = nobody.command(args);
    without_userfaultfd(&mut command);
    Some(command)
}
