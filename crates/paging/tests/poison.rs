//! Memory errors: granules that the source answers as poisoned, and SIGBUS that is none of ours.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    thread,
};

use common::{child, external::read, *};
use pageferry_memory::{Backing, HostAddress};
use pageferry_paging::{Completion, Delivery, Events, Pager, Prefetch, Status};

const GRANULES: u64 = 16;
const BAD: u64 = 5;

fn start(
    delivery: Delivery,
    backing: Backing,
    events: Events,
    answers: Answers,
    prefetch: Prefetch,
) -> (Arc<Ledger>, Pager) {
    let size = if backing == HUGE { 2 << 20 } else { 4096 };
    let (ledger, source) = Ledger::new(GRANULES, answers).with_poisoned(BAD).source();
    let pager = Pager::builder(layout(backing, GRANULES * size))
        .delivery(delivery)
        .events(events)
        .prefetch(prefetch)
        .start(source)
        .unwrap();
    (ledger, pager)
}

fn size_of(pager: &Pager) -> u64 {
    pager.layout().get(REGION).unwrap().granule().bytes()
}

fn read_good_ones(pager: &Pager) {
    let size = size_of(pager);
    for granule in (0..GRANULES).filter(|granule| *granule != BAD) {
        for offset in [granule * size, (granule + 1) * size - 8] {
            assert_eq!(peek(pager.layout(), offset), word(REGION, offset));
        }
    }
}

fn backings() -> Vec<Backing> {
    let mut backings = vec![Backing::Anonymous, Backing::Memfd];
    if huge_pages(GRANULES) {
        backings.push(HUGE);
    }
    backings
}

#[test]
fn what_the_source_poisons_is_counted_and_the_rest_is_right() {
    if !userfaultfd() || !poison() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for backing in backings() {
            for events in [Events::Watch, Events::Ignore] {
                for answers in [Answers::Inline, Answers::Threaded] {
                    let case = format!("{delivery} {backing} {events:?} {answers:?}");
                    let (ledger, pager) =
                        start(delivery, backing, events, answers, Prefetch::SWEEP);
                    read_good_ones(&pager);
                    let agreed =
                        Completion { granules_from_source: GRANULES - 1, granules_poisoned: 1 };
                    let status = pager.wait_complete(PATIENCE);
                    assert_eq!(status, Status::Complete(agreed), "{case}");
                    assert_eq!(*ledger.completed.lock().unwrap(), Some(agreed), "{case}");
                    let counts = pager.statistics().counts;
                    assert_eq!((counts.poisoned, counts.installed), (1, GRANULES - 1), "{case}");
                    assert_eq!(pager.last_error(), None, "{case}");
                    assert!(!pager.resolve(host(&pager, BAD)), "{case}");
                    assert!(pager.resolve(host(&pager, BAD + 1)), "{case}");
                    read_good_ones(&pager);
                    ledger.check_once();
                }
            }
        }
    }
}

fn host(pager: &Pager, granule: u64) -> HostAddress {
    let view = pager.layout().get(REGION).unwrap().guest_view().range();
    view.start().checked_add(granule * size_of(pager)).unwrap()
}

/// When the thread that dies touches what is poisoned.
const MOMENTS: [&str; 3] = ["first", "again", "waiting"];

fn touch_poisoned(delivery: Delivery, backing: Backing, moment: &str) {
    child::end_if_stuck();
    let (ledger, pager) =
        start(delivery, backing, Events::Watch, Answers::Threaded, Prefetch::NONE);
    let address = host(&pager, BAD);
    match moment {
        "first" => {
            read_good_ones(&pager);
            child::reached();
            child::saw(read(address));
        }
        "again" => {
            assert!(!pager.resolve(address));
            read_good_ones(&pager);
            child::reached();
            child::saw(read(address));
        }
        "waiting" => {
            ledger.hold();
            thread::spawn(move || child::saw(read(address)));
            wait_for("a request", || ledger.asked_of(BAD) == 1);
            child::reached();
            ledger.release();
            thread::park_timeout(PATIENCE);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn touching_a_poisoned_granule_is_a_memory_error() {
    const NAME: &str = "touching_a_poisoned_granule_is_a_memory_error";
    if let Some(case) = child::case() {
        let parts: Vec<&str> = case.split('/').collect();
        let backing =
            [Backing::Anonymous, Backing::Memfd, HUGE][parts[1].parse::<usize>().unwrap()];
        return touch_poisoned(delivery_named(parts[0]), backing, parts[2]);
    }
    if !userfaultfd() || !poison() {
        return;
    }
    for delivery in DELIVERIES {
        for backing in 0..backings().len() {
            for moment in MOMENTS {
                child::expect(NAME, &format!("{delivery}/{backing}/{moment}"), child::SIGBUS);
            }
        }
    }
}

/// What the handler of [`a_handler_that_was_there_before_is_called`] saw.
static CALLS: AtomicU32 = AtomicU32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static MAKE_PRESENT: AtomicU64 = AtomicU64::new(0);

/// An embedder's handler: notes the address, and puts a page there so that the access succeeds.
extern "C" fn embedders_handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let address = unsafe { (*info).si_addr() } as u64;
    ADDRESS.store(address, SeqCst);
    CALLS.fetch_add(1, SeqCst);
    let page = (address & !4095) as *mut libc::c_void;
    // SAFETY: the test touches only memory of its own, which may be replaced.
    let mapped = unsafe {
        libc::mmap(
            page,
            MAKE_PRESENT.load(SeqCst) as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped != page {
        // SAFETY: async-signal-safe.
        unsafe { libc::_exit(99) };
    }
}

static PLAIN_CALLS: AtomicU32 = AtomicU32::new(0);

/// The same for a handler of the old kind, which is not told where.
extern "C" fn embedders_plain_handler(_: libc::c_int) {
    PLAIN_CALLS.fetch_add(1, SeqCst);
    let page = MAKE_PRESENT.load(SeqCst) as *mut libc::c_void;
    // SAFETY: as above.
    let mapped = unsafe {
        libc::mmap(
            page,
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped != page {
        // SAFETY: async-signal-safe.
        unsafe { libc::_exit(99) };
    }
}

fn set_handler(handler: usize, flags: libc::c_int) {
    // SAFETY: a zeroed sigaction is valid; the handlers are async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
}

/// A mapping that reaches beyond the end of its file: touching that is SIGBUS.
fn beyond_the_end_of_a_file() -> HostAddress {
    use std::os::fd::AsRawFd;
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    HostAddress::from_ptr(start).checked_add(4096).unwrap()
}

fn chained(kind: &str) {
    child::end_if_stuck();
    let (_, pager) = match kind {
        "full" => {
            set_handler(embedders_handler as *const () as usize, libc::SA_SIGINFO);
            start(
                Delivery::Signal,
                Backing::Anonymous,
                Events::Watch,
                Answers::Inline,
                Prefetch::NONE,
            )
        }
        "plain" => {
            set_handler(embedders_plain_handler as *const () as usize, 0);
            start(
                Delivery::Signal,
                Backing::Anonymous,
                Events::Watch,
                Answers::Inline,
                Prefetch::NONE,
            )
        }
        other => panic!("{other}"),
    };
    read_good_ones(&pager);
    assert_eq!(CALLS.load(SeqCst) + PLAIN_CALLS.load(SeqCst), 0, "our own faults are ours alone");
    // Somebody else's memory error, in two threads in turn.
    for calls in 1..=2 {
        let foreign = beyond_the_end_of_a_file();
        MAKE_PRESENT.store(if kind == "full" { 4096 } else { foreign.get() }, SeqCst);
        assert_eq!(thread::spawn(move || read(foreign)).join().unwrap(), 0);
        if kind == "full" {
            assert_eq!((CALLS.load(SeqCst), ADDRESS.load(SeqCst)), (calls, foreign.get()));
        } else {
            assert_eq!(PLAIN_CALLS.load(SeqCst), calls);
        }
    }
    // Sent by a process, without an address.
    let before = CALLS.load(SeqCst);
    if kind == "plain" {
        // SAFETY: sends this thread a signal that is handled.
        unsafe { libc::raise(libc::SIGBUS) };
        assert_eq!(PLAIN_CALLS.load(SeqCst), 3);
    }
    assert_eq!(CALLS.load(SeqCst), before);
    // A poisoned granule of ours is the embedder's business too.
    let address = host(&pager, BAD);
    MAKE_PRESENT.store(if kind == "full" { 4096 } else { address.get() }, SeqCst);
    child::reached();
    assert_eq!(read(address), 0, "what the embedder put there");
    if kind == "full" {
        assert_eq!((CALLS.load(SeqCst), ADDRESS.load(SeqCst)), (3, address.get()));
    } else {
        assert_eq!(PLAIN_CALLS.load(SeqCst), 4);
    }
}

#[test]
fn a_handler_that_was_there_before_is_called() {
    const NAME: &str = "a_handler_that_was_there_before_is_called";
    if let Some(kind) = child::case() {
        return chained(&kind);
    }
    if userfaultfd() && poison() {
        for kind in ["full", "plain"] {
            child::expect(NAME, kind, child::End::Exit(0));
        }
    }
}

/// With nobody there before, somebody else's memory error ends the process as ever.
#[test]
fn foreign_memory_errors_stay_fatal() {
    const NAME: &str = "foreign_memory_errors_stay_fatal";
    if let Some(case) = child::case() {
        child::end_if_stuck();
        let ignored = case.starts_with("ignored");
        set_handler(if ignored { libc::SIG_IGN } else { libc::SIG_DFL }, 0);
        let (_, pager) = start(
            Delivery::Signal,
            Backing::Anonymous,
            Events::Watch,
            Answers::Inline,
            Prefetch::NONE,
        );
        read_good_ones(&pager);
        child::reached();
        match &*case {
            "sent" | "ignored and sent" => {
                // SAFETY: sends this thread a signal.
                unsafe { libc::raise(libc::SIGBUS) };
                read_good_ones(&pager);
            }
            _ => child::saw(read(beyond_the_end_of_a_file())),
        }
        return;
    }
    if userfaultfd() {
        for case in ["default", "ignored", "sent"] {
            child::expect(NAME, case, child::SIGBUS);
        }
        child::expect(NAME, "ignored and sent", child::End::Exit(0));
    }
}
