//! No memory is left for anonymous memory, in a memory control group of its own or under
//! RLIMIT_AS: what cannot come is an error and says so, or the kernel kills the process; nothing
//! hangs, and nobody sees zeros.

mod common;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{child, external::read, *};
use pageferry_memory::{Backing, GranuleIndex, GranuleRange, HostAddress};
use pageferry_paging::{
    Delivery, InstallMethod, PageSink, PageSource, Pager, Prefetch, SinkError, SourceError, Span,
    StartError, Status, Urgency,
};

const PAGES: u64 = 4096;
/// What a group may have: a quarter of the guest's memory.
const LIMIT: u64 = PAGES * 4096 / 4;

/// A memory control group with a limit, removed when dropped (cgroup-v1/memory.rst and
/// cgroup-v2.rst in the kernel's admin guide).
struct Group {
    path: PathBuf,
    version: u32,
}

impl Group {
    /// As a child of the group of this process or, as version 2 has no processes beside groups, of
    /// its parent.
    fn new(name: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let name = format!("pageferry-{name}-{}", std::process::id());
        for mount in mounts.lines() {
            let Some((before, after)) = mount.split_once(" - ") else { continue };
            let mut after = after.split(' ');
            let (kind, options) = (after.next(), after.nth(1).unwrap_or_default());
            let (version, limit) = match kind {
                Some("cgroup") if options.split(',').any(|option| option == "memory") => {
                    (1, "memory.limit_in_bytes")
                }
                Some("cgroup2") => (2, "memory.max"),
                _ => continue,
            };
            let Some(mounted) = before.split(' ').nth(4) else { continue };
            let own = own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':');
                let (number, controllers) = (fields.next()?, fields.next()?);
                let ours = match version {
                    1 => controllers.split(',').any(|controller| controller == "memory"),
                    _ => number == "0",
                };
                fields.next().filter(|_| ours)
            });
            let own = Path::new(own.unwrap_or("/"));
            for parent in [Some(own), own.parent()].into_iter().flatten() {
                let parent = parent.strip_prefix("/").unwrap_or(parent);
                let path = Path::new(mounted).join(parent).join(&name);
                if fs::create_dir(&path).is_err() {
                    continue;
                }
                let group = Self { path, version };
                // What does not fit is not to be swapped out. Where nothing can be, there may be
                // no such file.
                let (file, value) = match version {
                    1 => ("memory.swappiness", "0"),
                    _ => ("memory.swap.max", "0"),
                };
                if let Err(error) = group.write(file, value) {
                    println!("{}/{file}: {error}", group.path.display());
                }
                if group.write(limit, &LIMIT.to_string()).is_ok() {
                    return Ok(group);
                }
            }
        }
        Err(io::Error::other("no group can be made, or it has no memory controller"))
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// Has an allocation fail instead of killing somebody; not in version 2.
    fn without_killer(&self) -> bool {
        self.version == 1 && self.write("memory.oom_control", "1").is_ok()
    }

    fn kills(&self) -> u64 {
        let file = if self.version == 1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.path.join(file)).unwrap();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process has ended, but its memory may still be counted for a moment.
        wait_for("the end of a control group", || fs::remove_dir(&self.path).is_ok());
    }
}

/// Populates what the process has (MCL_CURRENT) or will have (MCL_FUTURE), stacks and the memory of
/// allocators, so that the limit is for the guest's memory only.
fn populate(which: libc::c_int) {
    // SAFETY: locks memory, and changes no contents.
    assert_eq!(unsafe { libc::mlockall(which) }, 0, "{}", io::Error::last_os_error());
}

fn install_named(name: &str) -> (Backing, InstallMethod) {
    match name {
        "copy" => (Backing::Anonymous, InstallMethod::Copy),
        "move" => (Backing::Anonymous, InstallMethod::Move),
        "continue" => (Backing::Memfd, InstallMethod::Continue),
        other => panic!("{other}"),
    }
}

/// Runs out of memory in the group at `path`.
fn limited(delivery: Delivery, install: &str, ending: &str, path: &Path) {
    child::end_if_stuck();
    let (backing, install) = install_named(install);
    // Where nothing is killed, but waits until there is memory, that would be for ever. MOVE is
    // only between memory that is locked and memory that is locked, or not and not.
    let all_else = install == InstallMethod::Copy;
    if all_else {
        populate(libc::MCL_CURRENT);
    }
    let layout = layout(backing, PAGES << 12);
    if all_else {
        populate(libc::MCL_FUTURE);
    }
    let pager = Pager::builder(layout)
        .delivery(delivery)
        .install(Some(install))
        .prefetch(Prefetch::NONE)
        .start(Arc::new(Tolerant))
        .unwrap();
    let region = Arc::clone(pager.layout().get(REGION).unwrap());
    let at = |page: u64| -> HostAddress {
        region.host_range(GranuleRange::one(GranuleIndex::new(page))).start()
    };
    // Whoever takes part has done all of it once before the limit holds.
    assert_eq!(read(at(0)), word(REGION, 0));
    assert!(pager.resolve(at(1)));
    // Opened already, as that takes memory too.
    let limit = fs::OpenOptions::new().write(true).open(path.join("memory.limit_in_bytes"));
    // Room for what an error allocates, in the heap of this thread.
    drop(std::hint::black_box(vec![1_u8; 64 << 10]));
    fs::write(path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    if ending == "touched" {
        child::reached();
        for page in 2..PAGES {
            let value = read(at(page));
            if value != word(REGION, page << 12) {
                child::saw(value);
            }
        }
        return;
    }
    assert_eq!(ending, "brought in advance");
    let came = (2..PAGES).find(|page| !pager.resolve(at(*page)));
    // At once, and checked only then: a panic needs memory too.
    limit.unwrap().write_all(b"1G").unwrap();
    let came = came.expect("there is a limit");
    assert!(came > LIMIT / 4096 / 2, "{came} pages came: the limit is for others too");
    let error = pager.last_error().unwrap_or_default();
    assert!(error.contains("no memory"), "{error}");
    assert!(error.contains(&format!("granules {came}+1")), "{error}");
    let counts = pager.statistics().counts;
    assert_eq!((counts.installed, counts.poisoned), (came, 1), "{counts:?}");
    // What is there stays, and with memory to be had again the rest comes.
    for page in 0..came {
        assert_eq!(read(at(page)), word(REGION, page << 12));
    }
    for page in came + 1..PAGES {
        assert_eq!(read(at(page)), word(REGION, page << 12));
    }
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{status:?}");
    let counts = pager.statistics().counts;
    assert_eq!((counts.installed, counts.poisoned), (PAGES - 1, 1), "{counts:?}");
    child::reached();
}

/// Answers inline, page by page, whether or not what came could be installed.
struct Tolerant;

impl PageSource for Tolerant {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let mut offset = span.granules.first().get() << 12;
        let filled = sink.fill(span, &mut |bytes| {
            fill_pattern(REGION, offset, bytes);
            offset += bytes.len() as u64;
            Ok(())
        });
        match filled {
            Ok(()) | Err(SinkError::Stopped | SinkError::Install { .. }) => Ok(()),
            Err(error) => panic!("{error}"),
        }
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {}
}

/// In the child if this is one.
fn is_child() -> bool {
    let Some(case) = child::case() else { return false };
    let mut fields = case.splitn(4, '|');
    let mut field = || fields.next().unwrap();
    let (delivery, install, ending) = (delivery_named(field()), field(), field());
    limited(delivery, install, ending, Path::new(field()));
    true
}

fn in_group(test: &str, group: &Group, case: &str, expected: child::End) {
    child::expect(test, &format!("{case}|{}", group.path.display()), expected);
}

/// `None`, having said so, where there can be none.
fn group(name: &str) -> Option<Group> {
    if !userfaultfd() {
        return None;
    }
    match Group::new(name) {
        Ok(group) => Some(group),
        Err(error) => {
            println!("skipped: needs a memory control group with a limit: {error}");
            None
        }
    }
}

#[test]
fn without_memory_for_it_a_page_is_an_error() {
    const NAME: &str = "without_memory_for_it_a_page_is_an_error";
    if is_child() {
        return;
    }
    let Some(probe) = group("probe") else { return };
    if !probe.without_killer() {
        println!("skipped: needs memory control groups of version 1, where allocations can fail");
        return;
    }
    drop(probe);
    for delivery in DELIVERIES {
        for (ending, expected) in
            [("brought in advance", child::End::Exit(0)), ("touched", child::SIGBUS)]
        {
            let group = group("error").unwrap();
            assert!(group.without_killer());
            in_group(NAME, &group, &format!("{delivery}|copy|{ending}"), expected);
            assert_eq!(group.kills(), 0);
        }
    }
}

#[test]
fn who_is_out_of_memory_is_killed_and_sees_no_zeros_before() {
    const NAME: &str = "who_is_out_of_memory_is_killed_and_sees_no_zeros_before";
    if is_child() {
        return;
    }
    for install in ["copy", "move", "continue"] {
        for delivery in [Delivery::Queue, Delivery::Signal] {
            let Some(group) = group("killed") else { return };
            let killed = child::End::Signal(libc::SIGKILL);
            in_group(NAME, &group, &format!("{delivery}|{install}|touched"), killed);
            assert_eq!(group.kills(), 1, "{install} {delivery}");
        }
    }
}

/// Bytes of addresses that this process has.
fn address_space() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').next().unwrap().parse::<u64>().unwrap() * rustix::param::page_size() as u64
}

#[test]
fn without_addresses_for_staging_a_pager_does_not_start() {
    const NAME: &str = "without_addresses_for_staging_a_pager_does_not_start";
    if child::case().is_none() {
        if userfaultfd() {
            child::expect(NAME, "staging", child::End::Exit(0));
        }
        return;
    }
    // No thread watches over this: what one maps and unmaps when it begins would be counted below.
    // SAFETY: what its signal does by default is to end the process.
    unsafe { libc::alarm(PATIENCE.as_secs() as u32 / 2) };
    let layout = layout(Backing::Anonymous, PAGES << 12);
    let start = || {
        Pager::builder(layout.clone())
            .delivery(Delivery::Queue)
            .install(Some(InstallMethod::Copy))
            .prefetch(Prefetch::NONE)
            .start(Arc::new(Tolerant))
    };
    // So much is not enough for the staging buffers, but for everything else.
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes to the variable given.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) }, 0);
    let short = libc::rlimit { rlim_cur: address_space() + (8 << 20), ..limit };
    // SAFETY: reads the variable given; what there is stays.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const short) }, 0);
    let refused = start().err();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    let error = refused.expect("there is no room for staging buffers");
    assert!(matches!(error, StartError::Staging(_)), "{error}");
    assert!(error.to_string().contains("staging memory"), "{error}");
    // Nothing of the attempt is left, and with room it works.
    let pager = start().unwrap();
    verify_all(pager.layout());
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{status:?}");
    assert_eq!(pager.statistics().counts.installed, PAGES);
    child::reached();
}
