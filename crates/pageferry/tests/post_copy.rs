//! A guest whose memory comes from a peer while it runs, and whose peers are lost, or lie.

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::*;
use pageferry::{
    memory::{Backing, Layout},
    migrate::{
        Endpoint, MemoryStore, PageServer, PeerOptions, PeerReader, PeerSource, ServerOptions,
        core::{
            Channel, DataHeader, Decoder, Encoder, Frame, Item, ProtocolError, Refusal,
            RefusalCode, RegionInfo, Terms, WireSpan,
        },
    },
    paging::{Completion, Delivery, PageSource, Pager, Prefetch, Status},
};

const PAGES: u64 = 4096;
const GUESTS: u64 = 8;
const DELIVERIES: [Delivery; 3] = [Delivery::Queue, Delivery::ByCpu(2), Delivery::Signal];

/// One page in so many is zero at the source.
const ZERO_EVERY: u64 = 7;

fn expected(offset: u64) -> u64 {
    if (offset / PAGE).is_multiple_of(ZERO_EVERY) { 0 } else { word(offset) }
}

/// The memory that is moved, in the process that has it.
fn source_memory() -> Arc<Layout> {
    let layout = layout(Backing::Anonymous, PAGES * PAGE);
    let view = layout.get(REGION).unwrap().guest_view();
    for number in (0..PAGES).filter(|number| !number.is_multiple_of(ZERO_EVERY)) {
        view.write_at(number * PAGE, &page(number)).unwrap();
    }
    Arc::new(layout)
}

fn serve(memory: &Arc<Layout>, at: &Endpoint, delay: Duration) -> PageServer {
    let mut options = ServerOptions::default();
    options.delay = delay;
    PageServer::bind(at, Arc::new(MemoryStore::new(Arc::clone(memory))), options).unwrap()
}

fn connect(endpoint: &Endpoint) -> Arc<dyn PageSource> {
    Arc::new(PeerSource::connect(endpoint, PeerOptions::default()).unwrap())
}

/// An address of each transport, never the same twice.
fn transports(folder: &Path) -> [Endpoint; 2] {
    static SOCKETS: AtomicU64 = AtomicU64::new(0);
    let socket = folder.join(SOCKETS.fetch_add(1, SeqCst).to_string());
    ["127.0.0.1:0".parse().unwrap(), Endpoint::Unix(socket)]
}

fn pager(source: Arc<dyn PageSource>, delivery: Delivery, prefetch: Prefetch) -> Pager {
    let memory = layout(Backing::Memfd, PAGES * PAGE);
    Pager::builder(memory).delivery(delivery).prefetch(prefetch).start(source).unwrap()
}

/// Every guest thread reads some words of every page in an order of its own, and checks them;
/// meanwhile the rest of the test happens.
fn while_guests_run(pager: &Pager, seen: &AtomicU64, test: impl FnOnce()) {
    thread::scope(|scope| {
        for guest in 0..GUESTS {
            scope.spawn(move || {
                for number in shuffled(PAGES, guest) {
                    for offset in [0, 1032, 4088].map(|within| number * PAGE + within) {
                        let got = peek(pager.layout(), offset);
                        assert_eq!(got, expected(offset), "page {number}");
                    }
                    seen.fetch_add(1, SeqCst);
                }
            });
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(test)) {
            // The guests wait for pages that nobody brings now: their end cannot be awaited.
            let text = panic.downcast_ref::<String>().map(String::as_str);
            fail(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic"));
        }
    });
    assert_eq!(seen.load(SeqCst), GUESTS * PAGES, "every guest has read every page");
}

fn verify_all(layout: &Layout) {
    for offset in (0..PAGES * PAGE).step_by(8) {
        assert_eq!(peek(layout, offset), expected(offset), "{offset:#x}");
    }
}

/// Waits until the source counts as lost; returns why.
fn stalled(pager: &Pager, case: &str) -> String {
    let mut reason = None;
    wait_for(&format!("{case}: the loss of the source"), || {
        match pager.status() {
            Status::Stalled { why } => reason = Some(why),
            Status::Running => {}
            other => panic!("{case}: {other:?}"),
        }
        reason.is_some()
    });
    reason.unwrap()
}

/// The guest makes no progress any more, and is not told anything wrong: it waits.
fn expect_standstill(pager: &Pager, seen: &AtomicU64) {
    // What was there already may still be read.
    let mut last = seen.load(SeqCst);
    wait_for("the guest to stand still", || {
        thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut last, seen.load(SeqCst)) == seen.load(SeqCst)
    });
    assert!(seen.load(SeqCst) < GUESTS * PAGES, "the guest cannot have read everything");
    assert!(pager.remaining() > 0);
    assert!(matches!(pager.status(), Status::Stalled { .. }));
}

#[test]
fn a_whole_migration() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let (folder, memory) = (tempfile::tempdir().unwrap(), source_memory());
    for endpoint in transports(folder.path()) {
        for delivery in DELIVERIES {
            for prefetch in [Prefetch::NONE, Prefetch::SWEEP] {
                let case = format!("{endpoint} {delivery} {prefetch:?}");
                let server = serve(&memory, &endpoint, Duration::ZERO);
                let pager = pager(connect(server.local_endpoint()), delivery, prefetch);
                while_guests_run(&pager, &AtomicU64::new(0), || {});
                let status = pager.wait_complete(PATIENCE);
                let granules_from_source = PAGES;
                let counts = Completion { granules_from_source, granules_poisoned: 0 };
                assert_eq!(status, Status::Complete(counts), "{case}");
                verify_all(pager.layout());
                // Both sides have counted the same, each page once.
                assert_eq!(server.stats().granules(), PAGES, "{case}");
                assert_eq!(server.stats().failed, 0, "{case}");
            }
        }
    }
}

#[test]
fn the_source_is_lost_and_another_one_finishes() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let (folder, memory) = (tempfile::tempdir().unwrap(), source_memory());
    for delivery in DELIVERIES {
        for prefetch in [Prefetch::NONE, Prefetch::SWEEP] {
            let [tcp, unix] = transports(folder.path());
            for (first, second) in [(&tcp, &unix), (&unix, &tcp)] {
                let case = format!("{first} then {second}: {delivery} {prefetch:?}");
                // Slow, so that it cannot be done when it is stopped.
                let server = serve(&memory, first, Duration::from_millis(200));
                let pager = pager(connect(server.local_endpoint()), delivery, prefetch);
                let seen = AtomicU64::new(0);
                while_guests_run(&pager, &seen, || {
                    wait_for(&case, || server.stats().granules() >= 2 * GUESTS);
                    server.stop();
                    stalled(&pager, &case);
                    expect_standstill(&pager, &seen);
                    let left = pager.remaining();
                    assert!(left < PAGES, "{case}: something had come");
                    let server = serve(&memory, second, Duration::ZERO);
                    pager.attach_source(connect(server.local_endpoint())).unwrap();
                    let status = pager.wait_complete(PATIENCE);
                    let Status::Complete(counts) = status else { panic!("{case}: {status:?}") };
                    assert_eq!(counts.granules_poisoned, 0, "{case}");
                    // It brought what was missing, and nothing else.
                    assert_eq!(counts.granules_from_source, left, "{case}");
                    assert_eq!(server.stats().granules(), left, "{case}");
                });
                verify_all(pager.layout());
            }
        }
    }
}

#[test]
fn sources_are_lost_again_and_again() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let memory = source_memory();
    let any: Endpoint = "127.0.0.1:0".parse().unwrap();
    for delivery in DELIVERIES {
        let slow = || serve(&memory, &any, Duration::from_millis(100));
        let mut server = slow();
        let pager = pager(connect(server.local_endpoint()), delivery, Prefetch::SWEEP);
        let seen = AtomicU64::new(0);
        while_guests_run(&pager, &seen, || {
            for _ in 0..4 {
                wait_for("a page", || server.stats().granules() > 0);
                server.stop();
                stalled(&pager, &delivery.to_string());
                server = slow();
                pager.attach_source(connect(server.local_endpoint())).unwrap();
            }
            // Put in the place of one that is not lost.
            let last = serve(&memory, &any, Duration::ZERO);
            pager.attach_source(connect(last.local_endpoint())).unwrap();
            assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{delivery}");
        });
        verify_all(pager.layout());
    }
}

#[test]
fn a_source_with_other_memory_is_refused_and_the_guest_waits_on() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let memory = source_memory();
    let any: Endpoint = "127.0.0.1:0".parse().unwrap();
    let server = serve(&memory, &any, Duration::from_millis(200));
    let pager = pager(connect(server.local_endpoint()), Delivery::Queue, Prefetch::NONE);
    let seen = AtomicU64::new(0);
    while_guests_run(&pager, &seen, || {
        server.stop();
        stalled(&pager, "stopped");
        let smaller = Arc::new(layout(Backing::Anonymous, PAGES * PAGE / 2));
        let smaller = serve(&smaller, &any, Duration::ZERO);
        let error = pager.attach_source(connect(smaller.local_endpoint())).unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
        assert!(stalled(&pager, "refused").contains("does not fit"));
        expect_standstill(&pager, &seen);
        let right = serve(&memory, &any, Duration::ZERO);
        pager.attach_source(connect(right.local_endpoint())).unwrap();
        assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
    });
}

/// One connection to a source that follows a script instead of the protocol.
struct Raw {
    stream: TcpStream,
    decoder: Decoder,
    buffered: Vec<u8>,
}

impl Raw {
    fn send(&mut self, bytes: &[u8]) {
        // The destination may have had enough already; what it makes of it is what counts.
        let _ = self.stream.write_all(bytes);
    }

    fn send_frame(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        self.send(&bytes);
    }

    /// The next frame; `None` when the connection has ended.
    fn receive(&mut self) -> Option<Frame> {
        loop {
            let (taken, item) = self.decoder.feed(&self.buffered).unwrap();
            let frame = match item {
                Some(Item::Frame(frame)) => Some(frame),
                Some(Item::Payload(_)) => panic!("a destination sends no pages"),
                None => None,
            };
            self.buffered.drain(..taken);
            if frame.is_some() {
                return frame;
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(n) => self.buffered.extend(&bytes[..n]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Says hello as it should be.
    fn welcome(&mut self) {
        let Some(Frame::Hello(offer)) = self.receive() else { panic!("no hello") };
        self.send_frame(&Frame::Hello(Terms::default().answer(&offer).unwrap()));
        if offer.channel == Channel::Demand {
            let page_size = PAGE;
            let length = PAGES * PAGE;
            let granule = PAGE;
            let info = RegionInfo { id: 0, flags: 0, guest_base: 0, length, granule, page_size };
            self.send_frame(&Frame::Regions(vec![info]));
        }
    }

    /// The next request, past keep-alives and hurries.
    fn request(&mut self) -> WireSpan {
        loop {
            match self.receive() {
                Some(Frame::Request { span, .. }) => return span,
                Some(Frame::Bye) | None => panic!("no request"),
                Some(_) => {}
            }
        }
    }

    /// Answers a request as it should be.
    fn answer(&mut self, span: WireSpan) {
        for first in span.first..span.first + u64::from(span.count) {
            let span = WireSpan { first, count: 1, ..span };
            if expected(first * PAGE) == 0 {
                self.send(&Encoder::zero(span));
            } else {
                let header = DataHeader { span, length: PAGE as u32, fragment: None };
                self.send(&Encoder::data(&header));
                self.send(&page(first));
            }
        }
    }

    /// Sends no more, and reads away what comes: closing with unread bytes would reset the
    /// connection, and what was sent could be lost.
    fn finish(&mut self) {
        // The destination may have ended it already.
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut bin = [0; 4096];
        while self.stream.read(&mut bin).is_ok_and(|n| n > 0) {}
    }
}

/// What a hostile source does on its demand channel, once it has answered some requests.
type Script = fn(&mut Raw, WireSpan);

/// A source that begins well.
fn hostile(script: Script) -> (Endpoint, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap().into();
    let accept = move || Raw {
        stream: listener.accept().unwrap().0,
        decoder: Decoder::new(1 << 20),
        buffered: Vec::new(),
    };
    let thread = thread::spawn(move || {
        let mut demand = accept();
        demand.welcome();
        let mut background = accept();
        background.welcome();
        for _ in 0..3 {
            let span = demand.request();
            demand.answer(span);
        }
        let span = demand.request();
        script(&mut demand, span);
        demand.finish();
        background.finish();
    });
    (endpoint, thread)
}

const LIES: [(&str, Script, &str); 10] = [
    ("garbage", |raw, _| raw.send(&[0x55; 1000]), "not with the frame magic"),
    ("the beginning of a frame", |raw, span| raw.send(&Encoder::zero(span)[..9]), "ended"),
    (
        "a page of the wrong size",
        |raw, span| {
            let header = DataHeader { span, length: 100, fragment: None };
            raw.send(&Encoder::data(&header));
            raw.send(&[1; 100]);
        },
        "payload of 100 bytes",
    ),
    (
        "a page outside of the memory",
        |raw, span| raw.send(&Encoder::zero(WireSpan { first: PAGES, ..span })),
        "outside the region",
    ),
    (
        "a page twice",
        |raw, span| {
            raw.answer(span);
            raw.send(&Encoder::zero(span));
        },
        "not owed",
    ),
    (
        "more than was asked for",
        |raw, span| raw.send(&Encoder::zero(WireSpan { first: 0, count: PAGES as u32, ..span })),
        "not owed",
    ),
    (
        "half a page",
        |raw, span| {
            let span = WireSpan { count: 1, ..span };
            raw.send(&Encoder::data(&DataHeader { span, length: PAGE as u32, fragment: None }));
            raw.send(&[1; 2000]);
        },
        "ended",
    ),
    (
        "a refusal",
        |raw, _| raw.send_frame(&Frame::Error(Refusal::new(RefusalCode::Stopping, "no more"))),
        "no more",
    ),
    ("a goodbye", |raw, _| raw.send(&Encoder::bye()), "left before the memory was complete"),
    ("nothing", |_, _| {}, "closed the connection"),
];

#[test]
fn a_hostile_source_stalls_the_guest_with_a_reason_and_another_one_finishes() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let memory = source_memory();
    let any: Endpoint = "127.0.0.1:0".parse().unwrap();
    for delivery in [Delivery::Queue, Delivery::Signal] {
        for (what, script, reason) in LIES {
            let case = format!("{what}, {delivery}");
            let (endpoint, liar) = hostile(script);
            let pager = pager(connect(&endpoint), delivery, Prefetch::NONE);
            let seen = AtomicU64::new(0);
            while_guests_run(&pager, &seen, || {
                // A request that fails in a signal handler is noticed first, and cannot say why.
                wait_for(&format!("{case}: {reason}"), || stalled(&pager, &case).contains(reason));
                expect_standstill(&pager, &seen);
                let honest = serve(&memory, &any, Duration::ZERO);
                pager.attach_source(connect(honest.local_endpoint())).unwrap();
                let status = pager.wait_complete(PATIENCE);
                assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
            });
            liar.join().unwrap();
        }
    }
}

/// Garbage in place of a hello: there never is a session.
#[test]
fn garbage_instead_of_a_hello_is_an_error_by_name() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap().into();
    let liar = thread::spawn(move || {
        for _ in 0..2 {
            let stream = listener.accept().unwrap().0;
            let mut raw = Raw { stream, decoder: Decoder::new(1 << 20), buffered: Vec::new() };
            raw.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
            raw.finish();
        }
    });
    let errors = [
        PeerSource::connect(&endpoint, PeerOptions::default()).unwrap_err(),
        PeerReader::connect(&endpoint, PeerOptions::default()).unwrap_err(),
    ];
    for error in errors {
        let named = matches!(
            &error,
            pageferry::migrate::MigrateError::Protocol(ProtocolError::BadMagic { .. })
        );
        assert!(named, "{error}");
    }
    liar.join().unwrap();
}
