//! No memory is left for what arrives: it is an error for whoever touches it, `last_error` says so,
//! and nothing hangs. Tried with file systems that have room for a few pages: of huge pages, by COPY,
//! and with a second mapping that is written to, by CONTINUE; that one of base pages, too.

mod common;

use std::{
    fs::File,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
};

use common::{child, external::*, *};
use pageferry_memory::{
    Advice, GranuleIndex, GranuleRange, GuestAddress, ImageOffset, Layout, Mapping, PageSize,
    Region,
};
use pageferry_paging::{
    Delivery, Events, InstallMethod, PageSink, PageSource, Pager, Prefetch, SinkError, SourceError,
    Span, Status, Urgency,
};

use pageferry_uffd::{Features, Options};

const HUGE_PAGE: u64 = 2 << 20;
/// In the guest's memory.
const GRANULES: u64 = 6;
/// That there are pages for.
const ROOM: u64 = 4;
/// How a child says that it may not do what it needs to.
const NOT_ALLOWED: i32 = 44;

/// What the guest's memory is made of.
#[derive(Copy, Clone, PartialEq, Eq)]
struct Made {
    page: u64,
    fill_view: bool,
}

const MADE: [(&str, Made); 3] = [
    ("copied", Made { page: HUGE_PAGE, fill_view: false }),
    ("filled", Made { page: HUGE_PAGE, fill_view: true }),
    ("filled-small", Made { page: 4096, fill_view: true }),
];

/// Mounts a file system with room for [`ROOM`] pages, seen by this thread only.
fn small_file_system(at: &Path, page: u64) -> Result<(), std::io::Error> {
    let mount = |kind: &std::ffi::CStr, at: &Path, flags, data: &std::ffi::CStr| {
        let at = std::ffi::CString::new(at.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: all strings end with a zero byte, and a mount name space of our own is changed.
        let result = unsafe {
            libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
        };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: a mount name space of its own changes nothing for the memory of this process.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    mount(c"none", Path::new("/"), libc::MS_REC | libc::MS_PRIVATE, c"")?;
    match page {
        HUGE_PAGE => mount(c"hugetlbfs", at, 0, c"pagesize=2M,size=8M"),
        _ => mount(c"tmpfs", at, 0, c"size=16k,huge=never"),
    }
}

/// A file of so many bytes, nothing of it set aside.
fn file_of(directory: &Path, name: &str, bytes: u64) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file.open(directory.join(name)).unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// Maps a file without setting anything aside.
fn map(file: &File, bytes: u64) -> (Arc<Reservation>, Mapping) {
    let reservation = Reservation::new(bytes + HUGE_PAGE);
    let start = reservation.at(0).get();
    let offset = start.next_multiple_of(HUGE_PAGE) - start;
    let range = reservation.map(offset, bytes, Some(file.as_fd()));
    // SAFETY: the reservation keeps the addresses, and no references into them are made.
    let mapping = unsafe { Mapping::from_raw(range, Arc::clone(&reservation) as _) };
    (reservation, mapping)
}

/// Answers inline, and counts the installs that failed.
#[derive(Default)]
struct Tolerant {
    failures: AtomicU64,
    /// Answers each request at once, instead of one granule after the other.
    whole: bool,
}

impl PageSource for Tolerant {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let page = sink.layout().get(REGION).unwrap().granule().bytes();
        let mut rest = span.granules;
        while !rest.is_empty() {
            let (now, after) = rest.split_at(if self.whole { rest.count() } else { 1 });
            rest = after;
            let mut offset = now.first().get() * page;
            let result = sink.fill(Span { region: REGION, granules: now }, &mut |bytes| {
                fill_pattern(REGION, offset, bytes);
                offset += bytes.len() as u64;
                Ok(())
            });
            match result {
                Ok(()) | Err(SinkError::Stopped) => {}
                Err(SinkError::Install { .. }) => {
                    self.failures.fetch_add(1, SeqCst);
                }
                Err(error) => panic!("{error}"),
            }
        }
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {}
}

fn short_of_memory(delivery: Delivery, made: Made, events: Events, ending: &str) {
    child::end_if_stuck();
    let Made { page, fill_view } = made;
    let directory = tempfile::tempdir().unwrap();
    if let Err(error) = small_file_system(directory.path(), page) {
        println!("{error}");
        std::process::exit(NOT_ALLOWED);
    }
    if ending == "nothing" {
        return;
    }
    let file = file_of(directory.path(), "guest", GRANULES * page);
    let (_reservation, view) = map(&file, GRANULES * page);
    let fill = fill_view.then(|| map(&file, GRANULES * page));
    let (_fill_reservation, fill) = fill.unzip();
    let region = Region::external(
        Arc::new(view),
        fill.map(Arc::new),
        PageSize::try_new(page).unwrap(),
        None,
        GuestAddress::new(0),
        ImageOffset::new(0),
    );
    let swept = ending == "swept";
    let source = Arc::new(Tolerant { whole: swept, ..Tolerant::default() });
    let pager = Pager::builder(Layout::new(vec![Arc::new(region.unwrap())]).unwrap())
        .delivery(delivery)
        .events(events)
        .install(Some(if fill_view { InstallMethod::Continue } else { InstallMethod::Copy }))
        .prefetch(if swept { Prefetch::SWEEP } else { Prefetch::NONE })
        .start(Arc::clone(&source) as _)
        .unwrap();
    if swept {
        // All of it counts as answered, and what there was memory for is there.
        let status = pager.wait_complete(PATIENCE);
        let Status::Complete(agreed) = status else { panic!("{status:?}") };
        assert_eq!((agreed.granules_from_source, agreed.granules_poisoned), (GRANULES, 0));
        let counts = pager.statistics().counts;
        assert_eq!((counts.installed, counts.poisoned), (ROOM, GRANULES - ROOM), "{counts:?}");
        for granule in 0..ROOM {
            assert_eq!(peek(pager.layout(), granule * page), word(REGION, granule * page));
        }
        child::reached();
        return;
    }
    let region = Arc::clone(pager.layout().get(REGION).unwrap());
    let at = |granule: u64| region.host_range(GranuleRange::one(GranuleIndex::new(granule)));
    for granule in 0..ROOM {
        assert_eq!(read(at(granule).start()), word(REGION, granule * page));
    }
    assert_eq!(pager.last_error(), None);
    let out_of_room = || {
        let error = pager.last_error().unwrap_or_default();
        // EEXIST, or on older kernels ENOMEM; behind the fill view it is found out before.
        let copied = error.contains("no huge page is free") || error.contains("no memory,");
        if fill_view { error.contains("behind the fill view") } else { copied }
    };
    match ending {
        "brought in advance" => {
            for granule in ROOM..GRANULES {
                assert!(!pager.resolve(at(granule).start()), "{granule}");
            }
            assert!(out_of_room(), "{:?}", pager.last_error());
            let status = pager.wait_complete(PATIENCE);
            assert!(matches!(status, Status::Complete(_)), "{status:?}");
            let counts = pager.statistics().counts;
            assert_eq!((counts.installed, counts.poisoned), (ROOM, GRANULES - ROOM), "{counts:?}");
            assert_eq!(source.failures.load(SeqCst), GRANULES - ROOM);
            // What is there is not touched by that.
            assert_eq!(read(at(0).start()), word(REGION, 0));
            child::reached();
        }
        "touched" => {
            child::reached();
            let address = at(ROOM).start();
            thread::spawn(move || child::saw(read(address)));
            thread::park_timeout(PATIENCE);
        }
        "removed and touched again" => {
            region.guest_view().advise(at(1), Advice::Remove).unwrap();
            // Somebody else takes the page that the guest gave up.
            let other = file_of(directory.path(), "other", page);
            let (_other_reservation, other) = map(&other, page);
            other.advise(other.range(), Advice::PopulateWrite).unwrap();
            child::reached();
            let address = at(1).start();
            thread::spawn(move || child::saw(read(address)));
            thread::park_timeout(PATIENCE);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn without_memory_for_it_a_granule_is_an_error() {
    const NAME: &str = "without_memory_for_it_a_granule_is_an_error";
    if let Some(case) = child::case() {
        let [delivery, made, events, ending] = case.split('/').collect::<Vec<_>>()[..] else {
            panic!("{case}")
        };
        let (_, made) = MADE.into_iter().find(|(name, _)| *name == made).unwrap();
        let events = if events == "watched" { Events::Watch } else { Events::Ignore };
        return short_of_memory(delivery_named(delivery), made, events, ending);
    }
    if !userfaultfd() {
        return;
    }
    let pages = HugePages::reserve(ROOM);
    let poisons = Options::new().required(Features::POISON).open().is_ok();
    for (name, made) in MADE {
        if made.page == HUGE_PAGE && pages.is_none() {
            continue;
        }
        if made.fill_view && !features(Features::MINOR_SHMEM | Features::MINOR_HUGETLBFS) {
            continue;
        }
        if child::run(NAME, &format!("queue/{name}/watched/nothing")).0 != child::End::Exit(0) {
            println!("skipped: needs the right to mount a file system");
            continue;
        }
        for delivery in DELIVERIES {
            for (events, ending, expected) in [
                ("watched", "brought in advance", child::End::Exit(0)),
                ("watched", "touched", child::SIGBUS),
                ("watched", "removed and touched again", child::SIGBUS),
                ("ignored", "brought in advance", child::End::Exit(0)),
                ("ignored", "touched", child::SIGBUS),
                ("watched", "swept", child::End::Exit(0)),
                ("ignored", "swept", child::End::Exit(0)),
            ] {
                if events == "ignored" && !made.fill_view {
                    continue;
                }
                let case = format!("{delivery}/{name}/{events}/{ending}");
                if expected == child::SIGBUS && !poisons {
                    // Made inaccessible instead, perhaps only after the signal that a thread meets.
                    let (end, printed) = child::run(NAME, &case);
                    let errors = [child::SIGSEGV, child::SIGBUS];
                    assert!(errors.contains(&end), "{case}: {end:?}: {printed}");
                } else {
                    child::expect(NAME, &case, expected);
                }
            }
        }
    }
}
