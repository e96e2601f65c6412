//! What is seen of another process without stopping it.

mod common;

use std::thread;

use common::{Held as _, Target, end_with_parent, listen, tell};
use pageferry_process::{
    Detail, Mapping, MappingFlags, MappingName, NotTaken, Pid, Process, ProcessError,
};
use pageferry_testing::{child, wait_for};
use pageferry_uffd::HostAddress;

#[test]
fn what_is_no_other_process() {
    let this = rustix::process::getpid();
    let open = |pid| Process::open(pid).unwrap_err();
    assert!(matches!(open(this), ProcessError::Own { .. }));
    assert!(matches!(open(Pid::from_raw(i32::MAX).unwrap()), ProcessError::None { .. }));
    let thread = thread::spawn(|| {
        let tid = rustix::thread::gettid();
        (tid, Process::open(tid).unwrap_err())
    });
    let (tid, error) = thread.join().unwrap();
    assert!(matches!(error, ProcessError::NotProcess { pid } if pid == tid), "{error}");

    let mut command = common::nothing().spawn().unwrap();
    let pid = Pid::from_child(&command);
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    wait_for("it to end", || stat().contains(") Z "));
    assert!(matches!(open(pid), ProcessError::Ended { .. }), "{}", open(pid));
    command.wait().unwrap();
    assert!(matches!(open(pid), ProcessError::None { .. }));

    let kernel = Pid::from_raw(2).unwrap();
    let name = std::fs::read_to_string("/proc/2/comm");
    if name.is_ok_and(|name| name.trim() == "kthreadd") {
        assert!(matches!(open(kernel), ProcessError::Memoryless { .. }), "{}", open(kernel));
    } else {
        println!("skipped: needs to see the kernel's threads");
    }
}

#[test]
fn memory_is_read_as_far_as_it_goes() {
    const ME: &str = "memory_is_read_as_far_as_it_goes";
    const PAGE: usize = 4096;
    if child::case().is_some() {
        end_with_parent();
        let memory = pageferry_memory::Mapping::anonymous(4 * PAGE as u64).unwrap();
        for page in 0..3 {
            memory.write_at(page * PAGE as u64, &[page as u8 + 1; PAGE]).unwrap();
        }
        let start = memory.range().start().as_ptr();
        // SAFETY: nobody else uses the mapping.
        unsafe {
            let none = libc::mprotect(start.add(2 * PAGE).cast(), PAGE, libc::PROT_NONE);
            let gone = libc::munmap(start.add(3 * PAGE).cast(), PAGE);
            assert_eq!((none, gone), (0, 0));
        }
        tell(&memory.range().start().get().to_string());
        listen();
        std::process::exit(0);
    }
    let target = Target::start(ME, "run");
    let start = HostAddress::new(target.hear().parse().unwrap());
    let process = target.process();
    for stopping in [false, true] {
        let _stopped = stopping.then(|| process.stop().unwrap());
        let mut bytes = vec![0; 4 * PAGE];
        let page = |page: u64| start.checked_add(page * PAGE as u64).unwrap();
        // Up to what the process itself may not read.
        assert_eq!(process.read_memory(start, &mut bytes).unwrap(), 2 * PAGE);
        assert!(bytes[..PAGE] == [1; PAGE] && bytes[PAGE..2 * PAGE] == [2; PAGE]);
        // That is read too.
        match process.read_memory(page(2), &mut bytes) {
            Ok(length) => {
                assert_eq!(length, PAGE);
                assert!(bytes[..PAGE] == [3; PAGE]);
            }
            Err(error) => {
                println!("skipped: needs a kernel that lets /proc/PID/mem override: {error}");
            }
        }
        let error = process.read_memory(page(3), &mut bytes).unwrap_err();
        let ProcessError::Unreadable { address, .. } = error else { panic!("{error}") };
        assert_eq!(address, page(3));
        let error = process.read_memory_exact(page(1), &mut bytes).unwrap_err();
        assert!(matches!(error, ProcessError::Unreadable { .. }), "{error}");
        let last = HostAddress::new(u64::MAX - 3);
        assert!(process.read_memory(last, &mut bytes).is_err());
        assert_eq!(process.read_memory(page(3), &mut []).unwrap(), 0);
        // Pieces, in one call.
        let piece = |at, length| pageferry_uffd::HostRange::new(at, length);
        let pieces = [piece(page(1), 8), piece(page(0), 8), piece(page(1), 0), piece(page(1), 4)];
        assert_eq!(process.read_scattered(&pieces, &mut bytes).unwrap(), 20);
        assert_eq!(bytes[..20], [2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    }
}

#[test]
fn mappings_are_told_as_they_are() {
    const ME: &str = "mappings_are_told_as_they_are";
    const LENGTH: u64 = 8 << 20;
    if child::case().is_some() {
        end_with_parent();
        let own = pageferry_memory::Mapping::anonymous(LENGTH).unwrap();
        own.write_at(0, &[1; 3 * 4096]).unwrap();
        let file = rustix::fs::memfd_create("of a test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, LENGTH).unwrap();
        // SAFETY: nobody else uses the mappings.
        let shared = unsafe {
            let advice =
                libc::madvise(own.range().start().as_ptr().cast(), 8192, libc::MADV_DONTDUMP);
            assert_eq!(advice, 0);
            rustix::mm::mmap(
                std::ptr::null_mut(),
                4096,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                &file,
                4096,
            )
        };
        let shared = shared.unwrap().addr();
        tell(&format!("{} {shared}", own.range().start().get()));
        listen();
        std::process::exit(0);
    }
    let target = Target::start(ME, "run");
    let [own, shared] = target.hear_numbers()[..] else { panic!("two addresses") };
    let process = target.process();
    let names = process.mappings(Detail::Names).unwrap();
    let full = process.mappings(Detail::Full).unwrap();
    let at = |mappings: &[Mapping], address: u64| {
        let address = HostAddress::new(address);
        mappings.iter().find(|mapping| mapping.range.contains(address)).unwrap().clone()
    };
    assert!(names.iter().all(|mapping| mapping.details.is_none()));
    assert!(names.iter().zip(&full).all(|(a, b)| a.is_part_of_same(b)), "nothing has changed");

    // What differs in its flags is a mapping of its own.
    let kept = at(&full, own);
    assert!(kept.is_anonymous() && !kept.shared);
    assert_eq!(kept.permissions.to_string(), "rw-");
    assert_eq!(kept.range.len(), 8192);
    let details = kept.details.unwrap();
    assert!(details.flags.contains(MappingFlags::NO_DUMP));
    assert_eq!((details.resident, details.anonymous), (8192, 8192));
    assert_eq!(details.page_size, pageferry_memory::PageSize::SIZE_4K);
    assert_eq!(kept.takeable(), Ok(()));
    assert!(!at(&full, own + 8192).details.unwrap().flags.contains(MappingFlags::NO_DUMP));

    let file = at(&full, shared);
    assert!(file.shared && !file.is_anonymous());
    assert_eq!((file.permissions.to_string().as_str(), file.offset), ("r--", 4096));
    let name = MappingName::File { path: b"/memfd:of a test".to_vec(), deleted: true };
    assert_eq!(file.name, name);
    assert_eq!(file.takeable(), Ok(()));

    let kind = |name: &[u8]| {
        let name = MappingName::Kernel(name.to_vec());
        full.iter().find(|mapping| mapping.name == name).cloned()
    };
    assert_eq!(kind(b"[vdso]").unwrap().takeable(), Err(NotTaken::Kernel));
    for name in [MappingName::Heap, MappingName::Stack] {
        let mapping = full.iter().find(|mapping| mapping.name == name).unwrap();
        assert_eq!(mapping.takeable(), Ok(()), "{name:?}");
        // What can be taken can be read, if it can be at all.
        process.read_memory_exact(mapping.range.start(), &mut [0; 16]).unwrap();
    }
}
