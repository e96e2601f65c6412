//! Opening by every way, with and without the privileges for it.

mod common;

use std::{fs::OpenOptions, os::unix::process::CommandExt, process::Command, sync::Arc};

use common::{Backing, Memory, open};
use pageferry_uffd::{
    Errno, Features, Ioctls, Mapped, Obstacle, OpenError, OpenWay, Options, RegisterMode,
    UffdError, Userfaultfd,
};

/// What opening must come to, going by the permissions there are.
fn expected_way() -> OpenWay {
    if OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").is_ok() {
        return OpenWay::DeviceNode;
    }
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    const CAP_SYS_PTRACE: u32 = 19;
    if sysctl.is_ok_and(|value| value.trim() == "1") || effective >> CAP_SYS_PTRACE & 1 == 1 {
        return OpenWay::Syscall;
    }
    OpenWay::SyscallUserModeOnly
}

fn open_default() -> Option<Userfaultfd> {
    match Options::new().open() {
        Ok(userfaultfd) => Some(userfaultfd),
        Err(error) => {
            println!("skipped: needs userfaultfd: {error}");
            None
        }
    }
}

#[test]
fn the_best_way_allowed_is_taken() {
    let Some(userfaultfd) = open_default() else { return };
    let negotiated = userfaultfd.negotiated();
    assert_eq!(negotiated.opened_by, expected_way());
    assert_eq!(negotiated.enabled, Features::empty());
    let basic = Ioctls::API | Ioctls::REGISTER | Ioctls::UNREGISTER;
    assert!(negotiated.ioctls.contains(basic), "{}", negotiated.ioctls);
    let flags = rustix::io::fcntl_getfd(&userfaultfd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn the_order_of_the_ways_is_the_callers() {
    for way in OpenWay::ALL {
        let others = OpenWay::ALL.into_iter().filter(|other| *other != way);
        let ways: Vec<_> = [way].into_iter().chain(others).collect();
        let alone = Options::new().ways([way]).open();
        let Ok(first) = Options::new().ways(ways).open() else {
            println!("skipped: needs userfaultfd");
            return;
        };
        match alone {
            Ok(_) => assert_eq!(first.negotiated().opened_by, way),
            Err(_) => assert_ne!(first.negotiated().opened_by, way),
        }
    }
}

#[test]
fn features_are_required_or_optional() {
    let Some(userfaultfd) = open_default() else { return };
    let available = userfaultfd.negotiated().available;
    let unknown = Features::from_bits_retain(1 << 63);

    let optional = Options::new().optional(Features::THREAD_ID | unknown).open().unwrap();
    assert_eq!(optional.negotiated().enabled, Features::THREAD_ID & available);

    let OpenError::NoWay(attempts) = Options::new().required(unknown).open().unwrap_err() else {
        panic!("not for lack of ways");
    };
    assert_eq!(attempts.len(), 3);
    let lacking = attempts.iter().any(|attempt| attempt.obstacle == Obstacle::Lacks(unknown));
    assert!(lacking, "{attempts:?}");
}

#[test]
fn user_mode_only_does_not_serve_the_kernel() {
    let options = Options::new().ways([OpenWay::SyscallUserModeOnly]);
    let Ok(userfaultfd) = options.open() else {
        println!("skipped: needs userfaultfd for user-mode faults");
        return;
    };
    assert!(userfaultfd.user_mode_only());
    let userfaultfd = Arc::new(userfaultfd);
    let memory = Memory::new(Backing::Anonymous, 1).unwrap();
    let _registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING).unwrap();
    assert_eq!(memory.read_by_kernel(0), Err(Errno::FAULT));
}

#[test]
fn a_fault_can_be_an_error_instead_of_an_event() {
    let Some(userfaultfd) = open(Features::SIGBUS) else { return };
    let memory = Memory::new(Backing::Anonymous, 1).unwrap();
    let _registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING).unwrap();
    assert_eq!(memory.read_by_kernel(0), Err(Errno::FAULT));
}

const CHILD: &str = "PAGEFERRY_TEST_UNPRIVILEGED_CHILD";

/// Runs itself again as a user without any privilege.
#[test]
fn denial_falls_through() {
    if std::env::var_os(CHILD).is_some() {
        unprivileged();
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root, to give it up in a child");
        return;
    }
    // A copy that the other user can surely reach, wherever this program lies.
    let directory = std::env::temp_dir().join(format!("pageferry-uffd-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let program = directory.join("opening");
    std::fs::copy("/proc/self/exe", &program).unwrap();
    for path in [&directory, &program] {
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, readable).unwrap();
    }
    let output = Command::new(&program)
        .args(["denial_falls_through", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .current_dir("/")
        .gid(65534)
        .uid(65534)
        .output();
    std::fs::remove_dir_all(&directory).unwrap();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the child: {}", output.status);
    assert!(text.contains("1 passed"), "the child ran the test");
}

fn unprivileged() {
    assert!(!rustix::process::geteuid().is_root());
    let way = expected_way();
    let userfaultfd = Options::new().open().unwrap();
    assert_eq!(userfaultfd.negotiated().opened_by, way);
    if way != OpenWay::SyscallUserModeOnly {
        println!("skipped: needs a host that denies unprivileged users {way}");
        return;
    }
    assert!(userfaultfd.user_mode_only());

    let ways = [OpenWay::DeviceNode, OpenWay::Syscall];
    let error = Options::new().ways(ways).open().unwrap_err();
    let OpenError::NoWay(attempts) = &error else { panic!("{error}") };
    let tried: Vec<_> = attempts.iter().map(|attempt| attempt.way).collect();
    assert_eq!(tried, ways);
    let denied = |attempt: &pageferry_uffd::Attempt| {
        matches!(attempt.obstacle, Obstacle::Denied(_) | Obstacle::Absent(Errno::NOENT))
    };
    assert!(attempts.iter().all(denied), "{error}");
    assert!(error.to_string().contains("vm.unprivileged_userfaultfd"), "{error}");

    // The privilege for forks is lacking: optional, it is left out; required, it is the reason.
    let both = Features::EVENT_FORK | Features::EVENT_UNMAP;
    let optional = Options::new().optional(both).open().unwrap();
    let available = optional.negotiated().available;
    assert_eq!(optional.negotiated().enabled, Features::EVENT_UNMAP & available);
    let OpenError::NoWay(attempts) = Options::new().required(both).open().unwrap_err() else {
        panic!("not for lack of ways");
    };
    let withheld = Obstacle::Withheld { features: both, errno: Errno::PERM };
    assert_eq!(attempts[2].obstacle, withheld);
}

#[test]
fn a_blocking_descriptor_reads_what_is_there() {
    let Ok(userfaultfd) = Options::new().nonblocking(false).open() else {
        println!("skipped: needs userfaultfd");
        return;
    };
    let userfaultfd = Arc::new(userfaultfd);
    let memory = Memory::new(Backing::Anonymous, 1).unwrap();
    let _registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::MISSING).unwrap();
    let toucher = Arc::clone(&memory);
    let thread = common::run(move || toucher.read(0));
    let reader = Arc::clone(&userfaultfd);
    let read = common::run(move || -> Result<usize, UffdError> {
        reader.read_events(&mut pageferry_uffd::EventBuffer::new(4))
    });
    assert_eq!(read.finish(), Ok(1));
    let outcome = userfaultfd.zeropage(memory.page(0), pageferry_uffd::Wake::Yes).unwrap();
    assert!(outcome.is_complete());
    assert_eq!(thread.finish(), 0);
}
