//! A client and a server, as they are meant to be used.

mod common;

use std::{
    fs::File,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_image::RawImage;
use pageferry_memory::{GranuleIndex, GranuleRange, Layout};
use pageferry_migrate::{
    Endpoint, ImageStore, MemoryStore, MigrateError, PageServer, PageStore, PeerOptions,
    PeerReader, PeerSource, ServerObserver, ServerOptions, SessionInfo, SessionOutcome,
    core::Counts,
};
use pageferry_paging::{Completion, PageSource, Urgency};

fn serve(endpoint: &Endpoint, layout: &Arc<Layout>, options: ServerOptions) -> PageServer {
    let store = Arc::new(MemoryStore::new(Arc::clone(layout)));
    PageServer::bind(endpoint, store, options).unwrap()
}

fn filled(regions: &[(u64, u64)]) -> Arc<Layout> {
    let layout = layout(regions);
    fill(&layout);
    layout
}

fn attach(server: &PageServer, sink: &Arc<RecordingSink>) -> PeerSource {
    let source = PeerSource::connect(server.local_endpoint(), PeerOptions::default()).unwrap();
    source.attach(Arc::clone(sink) as _).unwrap();
    source
}

fn everything(filled: u64, poisoned: u64) -> Completion {
    Completion { granules_from_source: filled, granules_poisoned: poisoned }
}

#[derive(Default)]
struct Watcher(Mutex<Vec<String>>);

impl ServerObserver for Watcher {
    fn opened(&self, session: &SessionInfo) {
        self.0.lock().unwrap().push(format!("opened {:?}", session.role));
    }
    fn completed(&self, _: &SessionInfo, counts: Counts) {
        self.0.lock().unwrap().push(format!("completed {counts}"));
    }
    fn closed(&self, _: &SessionInfo, outcome: &SessionOutcome) {
        let text = match outcome {
            SessionOutcome::Completed(_) => "closed after completing".to_owned(),
            SessionOutcome::Left => "left".to_owned(),
            other => format!("{other:?}"),
        };
        self.0.lock().unwrap().push(text);
    }
}

#[test]
fn all_of_it_in_both_urgencies() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let from = filled(&[(300, PAGE), (64, 2 * PAGE)]);
        let watcher = Arc::new(Watcher::default());
        let mut options = ServerOptions::default();
        options.observer = Some(Arc::clone(&watcher) as _);
        let server = serve(&endpoint, &from, options);
        let to = layout(&[(300, PAGE), (64, 2 * PAGE)]);
        let sink = RecordingSink::arc(&to);
        let source = attach(&server, &sink);
        assert_eq!(source.regions().len(), 2);
        request(&source, &sink, span(0, 100, 200), Urgency::Prefetch);
        for granule in 0..100 {
            request(&source, &sink, span(0, granule, 1), Urgency::Demand);
        }
        request(&source, &sink, span(1, 0, 64), Urgency::Prefetch);
        sink.wait_answered(364);
        sink.verify();
        source.complete(everything(364, 0)).unwrap();
        assert_eq!(source.answered(), Counts { filled: 364, poisoned: 0 });
        let stats = server.stats();
        assert_eq!((stats.granules(), stats.granules_zero), (364, 60 + 12));
        assert_eq!((stats.requests_demand, stats.requests_background), (100, 2));
        assert_eq!(stats.bytes, 240 * PAGE + 52 * 2 * PAGE);
        source.detach();
        source.detach();
        let mut reader =
            PeerReader::connect(server.local_endpoint(), PeerOptions::default()).unwrap();
        let mut bytes = vec![0; 300 * PAGE as usize];
        reader.read(wire(0, 0, 300), &mut bytes).unwrap();
        assert!(bytes == sink.recorded.lock().unwrap().memory[0]);
        drop(reader);
        let until = Instant::now() + Duration::from_secs(5);
        while server.stats().sessions > 0 && Instant::now() < until {
            thread::yield_now();
        }
        server.stop();
        server.stop();
        if let Endpoint::Unix(path) = &endpoint {
            assert!(!path.exists(), "the socket file stays behind");
        }
        assert_eq!(
            *watcher.0.lock().unwrap(),
            [
                "opened Destination",
                "completed 364 filled and 0 poisoned",
                "closed after completing",
                "opened Reader",
                "left",
            ]
        );
        assert!(sink.recorded.lock().unwrap().lost.is_empty(), "a clean end is no loss");
    }
}

/// A thread may ask for a page to be hurried that arrives before the asking is done; meanwhile the
/// counts are agreed upon, and the source must not hear of it any more.
#[test]
fn hurrying_after_completion() {
    let from = filled(&[(16, PAGE)]);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let source = attach(&server, &sink);
    request(&source, &sink, span(0, 0, 16), Urgency::Prefetch);
    sink.wait_answered(16);
    source.expedite(span(0, 1, 1)).unwrap();
    source.complete(everything(16, 0)).unwrap();
    source.expedite(span(0, 2, 1)).unwrap();
    source.expedite(span(0, 3, 1)).unwrap();
    source.detach();
    let until = Instant::now() + Duration::from_secs(5);
    while server.stats().sessions > 0 && Instant::now() < until {
        thread::yield_now();
    }
    let stats = server.stats();
    assert_eq!((stats.sessions, stats.failed), (0, 0));
}

#[test]
fn poisoned_and_discarded_granules() {
    let from = filled(&[(16, PAGE)]);
    let map = |first, count| GranuleRange::new(GranuleIndex::new(first), count);
    let region = from.iter().next().unwrap().1;
    region.page_map().poison(map(5, 2));
    region.page_map().discard(map(10, 1));
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let source = attach(&server, &sink);
    request(&source, &sink, span(0, 0, 16), Urgency::Demand);
    sink.wait_answered(16);
    {
        let recorded = sink.recorded.lock().unwrap();
        let kinds: Vec<_> = recorded.answers[0].iter().map(|answers| answers[0]).collect();
        use Answer::{Data, Poison, Zero};
        let want = [
            Data, Data, Data, Data, Zero, Poison, Poison, Data, Data, Zero, Zero, Data, Data, Data,
            Zero, Data,
        ];
        assert_eq!(kinds, want);
    }
    source.complete(everything(14, 2)).unwrap();

    let mut reader = PeerReader::connect(server.local_endpoint(), impatient()).unwrap();
    let mut bytes = vec![0xff; 4 * PAGE as usize];
    let result = reader.read(wire(0, 3, 4), &mut bytes);
    assert!(matches!(result, Err(MigrateError::Poisoned { granule: 5, .. })), "{result:?}");
    assert!(bytes[..PAGE as usize] == pattern(0, 3, PAGE)[..]);
    reader.read(wire(0, 0, 4), &mut bytes).expect("the reader goes on");
    assert!(matches!(reader.read(wire(0, 0, 4), &mut bytes[1..]), Err(MigrateError::Mismatch(_))));
}

/// Granules larger than the payload bound come in parts.
#[test]
fn large_granules() {
    let size = 256 << 10;
    let from = filled(&[(10, size), (3, PAGE)]);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    let mut options = PeerOptions::default();
    options.max_payload = 64 << 10;
    let sink = RecordingSink::arc(&layout(&[(10, size), (3, PAGE)]));
    let source = PeerSource::connect(server.local_endpoint(), options).unwrap();
    source.attach(Arc::clone(&sink) as _).unwrap();
    request(&source, &sink, span(0, 0, 7), Urgency::Prefetch);
    request(&source, &sink, span(0, 7, 3), Urgency::Demand);
    request(&source, &sink, span(1, 0, 3), Urgency::Prefetch);
    sink.wait_answered(13);
    sink.verify();
    source.complete(everything(13, 0)).unwrap();
    let mut reader = PeerReader::connect(server.local_endpoint(), options).unwrap();
    let mut bytes = vec![0; 6 * size as usize];
    reader.read(wire(0, 0, 6), &mut bytes).unwrap();
    assert!(bytes == sink.recorded.lock().unwrap().memory[0][..bytes.len()]);
}

/// A sink that does not take the bytes of one answer does not upset the next ones.
#[test]
fn an_answer_that_is_not_installed() {
    for size in [PAGE, 128 << 10] {
        let from = filled(&[(10, size)]);
        let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
        let mut sink = RecordingSink::new(&layout(&[(10, size)]));
        sink.refuse = Some(2);
        let sink = Arc::new(sink);
        let mut options = PeerOptions::default();
        options.max_payload = 64 << 10;
        let source = PeerSource::connect(server.local_endpoint(), options).unwrap();
        source.attach(Arc::clone(&sink) as _).unwrap();
        for granule in 0..10 {
            request(&source, &sink, span(0, granule, 1), Urgency::Demand);
        }
        sink.wait_answered(9);
        // The engine counts it as poisoned, or not at all: neither contradicts the peer.
        source.complete(everything(9, 1)).unwrap();
    }
}

#[test]
fn expedited_granules_come_once_and_early() {
    let from = filled(&[(20_000, PAGE)]);
    let mut options = ServerOptions::default();
    // Nothing of the queue leaves before this has passed, so that the order is certain.
    options.delay = Duration::from_millis(300);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, options);
    let sink = RecordingSink::arc(&layout(&[(20_000, PAGE)]));
    let source = attach(&server, &sink);
    request(&source, &sink, span(0, 0, 10_000), Urgency::Prefetch);
    request(&source, &sink, span(0, 10_000, 10_000), Urgency::Prefetch);
    for granule in (5_000..20_000).step_by(1000) {
        source.expedite(span(0, granule, 2)).unwrap();
    }
    sink.wait_answered(20_000);
    sink.verify();
    source.complete(everything(20_000, 0)).unwrap();
    let expedited = server.stats().expedited;
    // An expedite may overtake its request, which then is moved up instead.
    assert!(expedited <= 30, "{expedited}");
    assert_eq!(server.stats().granules(), 20_000);
}

/// Delayed answers do not wait for one another.
#[test]
fn a_slow_source_is_slow_but_not_serial() {
    const DELAY: Duration = Duration::from_millis(100);
    let from = filled(&[(64, PAGE)]);
    let mut options = ServerOptions::default();
    options.delay = DELAY;
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, options);
    let sink = RecordingSink::arc(&layout(&[(64, PAGE)]));
    let source = attach(&server, &sink);
    let start = Instant::now();
    for granule in 0..64 {
        let urgency = if granule % 2 == 0 { Urgency::Demand } else { Urgency::Prefetch };
        request(&source, &sink, span(0, granule, 1), urgency);
    }
    sink.wait_answered(64);
    let took = start.elapsed();
    sink.verify();
    assert!(took >= DELAY, "answered after {took:?}");
    assert!(took < DELAY * 20, "one after the other: {took:?}");
    source.complete(everything(64, 0)).unwrap();
}

/// A queue that is full makes the client wait, and loses nothing.
#[test]
fn a_small_queue() {
    let from = filled(&[(5_000, PAGE)]);
    let mut options = ServerOptions::default();
    options.max_queued = 4;
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, options);
    let sink = RecordingSink::arc(&layout(&[(5_000, PAGE)]));
    let source = attach(&server, &sink);
    for granule in 0..5_000 {
        request(&source, &sink, span(0, granule, 1), Urgency::Prefetch);
        if granule % 7 == 0 {
            source.expedite(span(0, granule, 1)).unwrap();
        }
    }
    sink.wait_answered(5_000);
    sink.verify();
    source.complete(everything(5_000, 0)).unwrap();
}

#[test]
fn many_clients() {
    let from = filled(&[(500, PAGE)]);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let sink = RecordingSink::arc(&layout(&[(500, PAGE)]));
                let source = attach(&server, &sink);
                for granule in 0..500 {
                    let urgency =
                        if granule % 3 == 0 { Urgency::Demand } else { Urgency::Prefetch };
                    request(&source, &sink, span(0, granule, 1), urgency);
                }
                sink.wait_answered(500);
                sink.verify();
                source.complete(everything(500, 0)).unwrap();
            });
        }
    });
    assert_eq!(server.stats().sessions_opened, 8);
    assert_eq!(server.stats().granules(), 4_000);
}

#[test]
fn the_server_stops_midway() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let from = filled(&[(64, PAGE)]);
        let mut options = ServerOptions::default();
        options.delay = Duration::from_secs(60);
        let server = serve(&endpoint, &from, options);
        let sink = RecordingSink::arc(&layout(&[(64, PAGE)]));
        let source = Arc::new(attach(&server, &sink));
        sink.detach_on_loss.set(Arc::clone(&source)).ok();
        request(&source, &sink, span(0, 0, 32), Urgency::Demand);
        request(&source, &sink, span(0, 32, 32), Urgency::Prefetch);
        let start = Instant::now();
        server.stop();
        assert!(start.elapsed() < Duration::from_secs(5), "stopping waits for delayed answers");
        sink.wait_lost();
        assert!(source.request(span(0, 1, 1), Urgency::Demand, &*sink).is_err());
        assert_eq!(sink.recorded.lock().unwrap().lost.len(), 1, "lost is said once");
        source.detach();

        // Another source takes over.
        let server = serve(&endpoint, &from, ServerOptions::default());
        let source = attach(&server, &sink);
        request(&source, &sink, span(0, 0, 64), Urgency::Demand);
        sink.wait("answers", |recorded| recorded.answered == 64);
        sink.verify();
    }
}

#[test]
fn memory_that_does_not_fit() {
    let from = filled(&[(16, PAGE), (16, PAGE)]);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    for (to, why) in [
        (layout(&[(16, PAGE)]), "regions"),
        (layout(&[(16, PAGE), (16, PAGE), (1, PAGE)]), "no such region"),
        (layout(&[(16, PAGE), (15, PAGE)]), "bytes at"),
        (layout(&[(16, PAGE), (8, 2 * PAGE)]), "granules of"),
    ] {
        let source = PeerSource::connect(server.local_endpoint(), impatient()).unwrap();
        let error = source.attach(RecordingSink::arc(&to)).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn the_engine_claims_more_than_was_answered() {
    let from = filled(&[(16, PAGE)]);
    let server = serve(&"127.0.0.1:0".parse().unwrap(), &from, ServerOptions::default());
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let source = attach(&server, &sink);
    request(&source, &sink, span(0, 0, 16), Urgency::Demand);
    sink.wait_answered(16);
    let error = source.complete(everything(17, 0)).unwrap_err().to_string();
    assert!(error.contains("17 filled and 0 poisoned claimed"), "{error}");
    source.complete(everything(16, 0)).expect("nothing was sent, so it can be said again");
}

/// An image file served over a socket: holes, an end in the middle of a granule, several regions
/// in one file, and a place that cannot be read.
#[test]
fn an_image() {
    let to = layout(&[(8, PAGE), (4, PAGE)]);
    let file = tempfile::tempfile().unwrap();
    write_image(&file, &to);
    file.set_len(12 * PAGE - 1).unwrap();
    let store = ImageStore::new(RawImage::from_file(file, "test").unwrap(), PAGE).unwrap();
    assert_eq!(store.regions()[0].length, 12 * PAGE);
    let server = PageServer::bind(
        &"127.0.0.1:0".parse().unwrap(),
        Arc::new(store),
        ServerOptions::default(),
    )
    .unwrap();
    let sink = RecordingSink::arc(&to);
    let source = attach(&server, &sink);
    request(&source, &sink, span(1, 0, 4), Urgency::Prefetch);
    request(&source, &sink, span(0, 0, 8), Urgency::Demand);
    sink.wait_answered(12);
    source.complete(everything(11, 1)).unwrap();
    let recorded = sink.recorded.lock().unwrap();
    assert_eq!(recorded.answers[1][3], [Answer::Poison]);
    assert_eq!(recorded.answers[0][4], [Answer::Zero]);
    for granule in 0..8 {
        let at = (granule * PAGE) as usize;
        assert!(recorded.memory[0][at..][..PAGE as usize] == pattern(0, granule, PAGE)[..]);
    }
    assert!(recorded.memory[1][..PAGE as usize] == pattern(1, 0, PAGE)[..]);
}

fn write_image(file: &File, layout: &Layout) {
    use std::os::unix::fs::FileExt;
    for (id, region) in layout.iter() {
        for granule in 0..region.granules() {
            let bytes = pattern(usize::from(id.get()), granule, PAGE);
            if bytes.iter().any(|byte| *byte != 0) {
                let at = region.image_offset().get() + granule * PAGE;
                file.write_all_at(&bytes, at).unwrap();
            }
        }
    }
}

/// The end of an image cannot be read, in small granules and in the middle of a large one's
/// parts: exactly what cannot be read is poisoned.
#[test]
fn an_image_cut_short_while_it_is_served() {
    let large = 128 << 10;
    for (granule, granules, poisoned) in [(PAGE, 64, 16), (large, 2, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, vec![7; 2 * large as usize]).unwrap();
        let image = RawImage::from_file(File::open(&path).unwrap(), "cut").unwrap();
        let store = ImageStore::new(image, granule).unwrap();
        // Behind the store's back.
        File::options().write(true).open(&path).unwrap().set_len(large + large / 2).unwrap();
        let server = PageServer::bind(
            &"127.0.0.1:0".parse().unwrap(),
            Arc::new(store),
            ServerOptions::default(),
        )
        .unwrap();
        let sink = RecordingSink::arc(&layout(&[(granules, granule)]));
        let mut options = PeerOptions::default();
        options.max_payload = 64 << 10;
        let source = PeerSource::connect(server.local_endpoint(), options).unwrap();
        source.attach(Arc::clone(&sink) as _).unwrap();
        request(&source, &sink, span(0, 0, granules), Urgency::Demand);
        sink.wait_answered(granules);
        let filled = granules - poisoned;
        source.complete(everything(filled, poisoned)).unwrap();
        assert_eq!(source.answered(), Counts { filled, poisoned });
        let recorded = sink.recorded.lock().unwrap();
        for (n, answers) in recorded.answers[0].iter().enumerate() {
            let want = if n < filled as usize { Answer::Data } else { Answer::Poison };
            assert_eq!(*answers, [want], "granule {n}");
        }
    }
}
