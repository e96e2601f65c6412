//! No memory is left for what arrives: it is an error for whoever touches it, `last_error` says so,
//! and nothing hangs. Tried with huge pages of a file system that has room for a few.

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
    Delivery, InstallMethod, PageSink, PageSource, Pager, Prefetch, SinkError, SourceError, Span,
    Status, Urgency,
};

const HUGE_PAGE: u64 = 2 << 20;
/// In the guest's memory.
const GRANULES: u64 = 6;
/// That there are pages for.
const ROOM: u64 = 4;
/// How a child says that it may not do what it needs to.
const NOT_ALLOWED: i32 = 44;

/// Mounts a file system of huge pages with room for [`ROOM`], seen by this thread only.
fn small_file_system(at: &Path) -> Result<(), std::io::Error> {
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
    mount(c"hugetlbfs", at, 0, c"pagesize=2M,size=8M")
}

/// A file of this many huge pages, none of them set aside.
fn file_of(directory: &Path, name: &str, pages: u64) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file.open(directory.join(name)).unwrap();
    file.set_len(pages * HUGE_PAGE).unwrap();
    file
}

/// Maps a file of huge pages without setting any aside.
fn map(file: &File, pages: u64) -> (Arc<Reservation>, Mapping) {
    let bytes = pages * HUGE_PAGE;
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
}

impl PageSource for Tolerant {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        for granule in span.granules.iter() {
            let one = Span { region: REGION, granules: GranuleRange::one(granule) };
            let result = sink.fill(one, &mut |bytes| {
                fill_pattern(REGION, granule.get() * HUGE_PAGE, bytes);
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

fn short_of_memory(delivery: Delivery, ending: &str) {
    child::end_if_stuck();
    let directory = tempfile::tempdir().unwrap();
    if let Err(error) = small_file_system(directory.path()) {
        println!("{error}");
        std::process::exit(NOT_ALLOWED);
    }
    if ending == "nothing" {
        return;
    }
    let file = file_of(directory.path(), "guest", GRANULES);
    let (_reservation, view) = map(&file, GRANULES);
    let region = Region::external(
        Arc::new(view),
        None,
        PageSize::SIZE_2M,
        None,
        GuestAddress::new(0),
        ImageOffset::new(0),
    );
    let source = Arc::new(Tolerant::default());
    let pager = Pager::builder(Layout::new(vec![Arc::new(region.unwrap())]).unwrap())
        .delivery(delivery)
        .install(Some(InstallMethod::Copy))
        .prefetch(Prefetch::NONE)
        .start(Arc::clone(&source) as _)
        .unwrap();
    let region = Arc::clone(pager.layout().get(REGION).unwrap());
    let at = |granule: u64| region.host_range(GranuleRange::one(GranuleIndex::new(granule)));
    for granule in 0..ROOM {
        assert_eq!(read(at(granule).start()), word(REGION, granule * HUGE_PAGE));
    }
    assert_eq!(pager.last_error(), None);
    let out_of_room = || {
        let error = pager.last_error().unwrap_or_default();
        // EEXIST, or on older kernels ENOMEM.
        error.contains("no huge page is free") || error.contains("no memory")
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
            let other = file_of(directory.path(), "other", 1);
            let (_other_reservation, other) = map(&other, 1);
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
        let (delivery, ending) = case.split_once('/').unwrap();
        return short_of_memory(delivery_named(delivery), ending);
    }
    if !userfaultfd() || !huge_pages(ROOM) {
        return;
    }
    if child::run(NAME, "queue/nothing").0 != child::End::Exit(0) {
        println!("skipped: needs the right to mount hugetlbfs");
        return;
    }
    for delivery in DELIVERIES {
        for (ending, expected) in [
            ("brought in advance", child::End::Exit(0)),
            ("touched", child::SIGBUS),
            ("removed and touched again", child::SIGBUS),
        ] {
            child::expect(NAME, &format!("{delivery}/{ending}"), expected);
        }
    }
}
