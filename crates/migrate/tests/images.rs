//! Images from a sender to a receiver, over real sockets: how that goes, and how it ends.

mod common;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{
    images::{
        Content, FIRST, Image, RawSender, Recorder, Run, SECOND, Seen, Step, THIRD, append,
        bad_link, data, impatient_receiver, impatient_sender, page, pages, plain, serve,
    },
    *,
};
use pageferry_migrate::{
    Endpoint, ImageDescription, ImageReceiver, ImageSender, MigrateError, ReceiverOptions,
    SenderOptions, Stop,
    core::{ImageCounts, ProtocolError, RefusalCode},
};
use pageferry_testing::child;

/// What a round trip sends, image by image.
fn script() -> Vec<(ImageDescription, Vec<Run>)> {
    let mut first = plain(FIRST, None);
    first.metadata = b"pid=1".to_vec();
    // More than one frame takes.
    first.mappings = (0..200_000_u32).map(|n| n as u8).collect();
    let mut runs = vec![(0, Content::Data(pages(0, 1)))];
    // Single pages, far apart; a run that is larger than every buffer; and all other kinds.
    for n in 0..700 {
        runs.push(((10 + 3 * n) * PAGE, Content::Data(page(n))));
    }
    runs.push((5_000 * PAGE, Content::Data(pages(5_000, 1_700))));
    runs.push((6_700 * PAGE, Content::Zero(1 << 33)));
    runs.push((1 << 50, Content::Poisoned(1)));
    runs.push(((1 << 50) + PAGE, Content::Gone(3)));
    runs.push(((1 << 50) + 4 * PAGE, Content::Data(pages(77, 20))));
    let second = plain(SECOND, Some(FIRST));
    let changed = vec![(11 * PAGE, Content::Zero(1)), (40 * PAGE, Content::Data(pages(1, 3)))];
    let mut third = plain(THIRD, Some(SECOND));
    third.metadata = vec![7; 65_536];
    vec![(first, runs), (second, changed), (third, Vec::new())]
}

fn say(sender: &mut ImageSender, runs: &[Run]) {
    for (address, content) in runs {
        match content {
            Content::Data(bytes) => sender.pages(*address, bytes),
            Content::Zero(count) => sender.zero(*address, *count),
            Content::Poisoned(count) => sender.poisoned(*address, *count),
            Content::Gone(count) => sender.gone(*address, *count),
        }
        .unwrap();
    }
}

/// What a sink is to record of these runs.
fn recorded(description: &ImageDescription, said: &[Run]) -> Image {
    let (mut runs, mut counts) = (Vec::new(), ImageCounts::default());
    for (address, content) in said {
        match content {
            Content::Data(bytes) => counts.data += bytes.len() as u64 / PAGE,
            Content::Zero(count) => counts.zero += count,
            Content::Poisoned(count) => counts.poisoned += count,
            Content::Gone(count) => counts.gone += count,
        }
        append(&mut runs, *address, content.clone());
    }
    Image { description: description.clone(), runs, counts }
}

/// Sends the script and checks that all of it comes.
fn round_trip(listen: &Endpoint, through: impl FnOnce(&Endpoint) -> Endpoint) {
    let served = serve(listen, ReceiverOptions::default(), Recorder::default());
    let through = through(&served.endpoint);
    let mut sender = ImageSender::connect(&through, SenderOptions::default()).unwrap();
    let script = script();
    let mut expected = Vec::new();
    for (n, (description, runs)) in script.iter().enumerate() {
        if n == 1 {
            sender.begin(description).unwrap();
            sender.pages(0, &page(1)).unwrap();
            sender.abort("not yet").unwrap();
        }
        sender.begin(description).unwrap();
        say(&mut sender, runs);
        expected.push(recorded(description, runs));
        assert_eq!(sender.counts(), expected[n].counts);
        assert_eq!(sender.finish().unwrap(), expected[n].counts);
        assert_eq!(sender.last_stored(), Some(description.id));
        // Stored when the sender is told so, and not some time later.
        assert!(served.images() == expected, "image {n}");
    }
    let totals = sender.close().unwrap();
    assert_eq!((totals.stored, totals.aborted), (3, 1));
    let received = served.outcome(0).unwrap();
    assert_eq!((received.stored, received.aborted), (3, 1));
    assert_eq!((received.last, received.completed), (Some(THIRD), true));
    let why = "given up by the sender: not yet".to_owned();
    assert_eq!(served.record.lock().unwrap().dropped, [(SECOND, Some(why))]);
    let events = ["connected", "begun 1", "stored 1", "begun 2", "dropped 2", "begun 2"];
    assert_eq!(served.wait("all", |_| true).events[..6], events);
}

#[test]
fn several_images() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        round_trip(&endpoint, Endpoint::clone);
    }
}

/// Bytes that come in all splits, and late.
#[test]
fn a_bad_link() {
    let listen = "127.0.0.1:0".parse().unwrap();
    round_trip(&listen, |far| bad_link(far, |n| 1 + n * 7919 % 40_000, Duration::ZERO));
    round_trip(&listen, |far| bad_link(far, |n| 1 + n % 20_000, Duration::from_micros(300)));
}

#[test]
fn one_sender_after_the_other() {
    let served = serve(&"127.0.0.1:0".parse().unwrap(), impatient_receiver(), Recorder::default());
    let mut first = ImageSender::connect(&served.endpoint, impatient_sender()).unwrap();
    // While one is served, another is told so.
    let busy = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap_err();
    let MigrateError::Protocol(ProtocolError::Refused(refusal)) = &busy else { panic!("{busy}") };
    assert_eq!(refusal.code, RefusalCode::Busy, "{busy}");
    first.begin(&plain(FIRST, None)).unwrap();
    first.finish().unwrap();
    // And as soon as that has gone, the next is served.
    first.close().unwrap();
    for n in 2..12 {
        served.still_serves(pageferry_migrate::core::ImageId([n; 16]));
    }
    assert_eq!(served.images().len(), 11);
}

/// `serve_one`, again and again: whoever came in between waits, and is served next.
#[test]
fn one_sender_only() {
    let receiver =
        ImageReceiver::listen(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default()).unwrap();
    let endpoint = receiver.local_endpoint().clone();
    let senders = thread::spawn(move || {
        for n in 1..6 {
            let mut sender = ImageSender::connect(&endpoint, SenderOptions::default()).unwrap();
            sender.begin(&plain(pageferry_migrate::core::ImageId([n; 16]), None)).unwrap();
            sender.finish().unwrap();
            sender.close().unwrap();
        }
    });
    let (mut sink, stop) = (Recorder::default(), Stop::new().unwrap());
    for n in 1..6 {
        let received = receiver.serve_one(&mut sink, &mut |_| {}, &stop).unwrap();
        assert_eq!((received.stored, received.last.map(|id| id.0[0])), (1, Some(n)));
    }
    senders.join().unwrap();
    stop.stop();
    let stopped = receiver.serve_one(&mut sink, &mut |_| {}, &stop).unwrap_err();
    assert!(matches!(&*stopped.error, MigrateError::Stopped), "{stopped}");
    assert_eq!(stopped.to_string(), "stopped; no image was completed");
}

/// A sender that is dropped, with and without an image begun, and with nothing flushed yet.
#[test]
fn a_sender_that_leaves() {
    let served =
        serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), Recorder::default());
    drop(ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap());
    for flush in [false, true] {
        let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
        sender.begin(&plain(FIRST, None)).unwrap();
        sender.pages(0, &page(0)).unwrap();
        if flush {
            sender.flush().unwrap();
            drop(served.wait("an image", |seen| seen.events.iter().any(|e| e == "begun 1")));
        }
    }
    for (n, aborted) in [(0, 0), (1, 1), (2, 1)] {
        let received = served.outcome(n).unwrap();
        assert_eq!((received.stored, received.aborted, received.completed), (0, aborted, false));
    }
    assert!(served.images().is_empty());
    assert_eq!(served.record.lock().unwrap().dropped.len(), 2);
}

fn begun_again(seen: &Seen) -> bool {
    seen.events.iter().any(|event| event == "begun 2")
}

/// A sender process that is killed in a round: the image begun is dropped, the one before stays,
/// and the receiver says so.
#[test]
fn a_sender_that_is_killed() {
    if let Some(endpoint) = child::case() {
        let mut sender =
            ImageSender::connect(&endpoint.parse().unwrap(), SenderOptions::default()).unwrap();
        sender.begin(&plain(FIRST, None)).unwrap();
        sender.pages(0, &pages(0, 10)).unwrap();
        sender.finish().unwrap();
        sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
        sender.pages(0, &pages(0, 300)).unwrap();
        sender.flush().unwrap();
        child::reached();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .unwrap();
        unreachable!();
    }
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let served = serve(&endpoint, ReceiverOptions::default(), Recorder::default());
        let killed = child::End::Signal(rustix::process::Signal::KILL.as_raw());
        child::expect("a_sender_that_is_killed", &served.endpoint.to_string(), killed);
        let error = served.outcome(0).unwrap_err();
        assert_eq!((error.image, error.last_stored), (Some(SECOND), Some(FIRST)), "{error}");
        let text = error.to_string();
        assert!(text.contains(&SECOND.to_string()) && text.ends_with(&FIRST.to_string()), "{text}");
        assert_eq!(served.images().len(), 1);
        assert_eq!(served.record.lock().unwrap().dropped[0].0, SECOND);
        served.still_serves(THIRD);
    }
}

/// A receiver process that is killed in a round: the sender names what is left.
#[test]
fn a_receiver_that_is_killed() {
    if let Some(endpoint) = child::case() {
        let options = ReceiverOptions::default();
        let receiver = ImageReceiver::listen(&endpoint.parse().unwrap(), options).unwrap();
        let hook = Box::new(|step| {
            // The second image's pages, after the first's.
            static TIMES: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let pages = step == Step::Pages;
            if pages && TIMES.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1 {
                child::reached();
                let (this, kill) = (rustix::process::getpid(), rustix::process::Signal::KILL);
                rustix::process::kill_process(this, kill).unwrap();
            }
        });
        let mut sink = Recorder { hook: Some(hook), ..Recorder::default() };
        receiver.serve(&mut sink, &mut |_| {}, &Stop::new().unwrap()).unwrap();
        unreachable!();
    }
    let folder = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(folder.path().join("socket"));
    let case = endpoint.to_string();
    let killed = thread::spawn(move || {
        let killed = child::End::Signal(rustix::process::Signal::KILL.as_raw());
        child::expect("a_receiver_that_is_killed", &case, killed);
    });
    let until = Instant::now() + Duration::from_secs(20);
    let mut sender = loop {
        match ImageSender::connect(&endpoint, SenderOptions::default()) {
            Ok(sender) => break sender,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    sender.begin(&plain(FIRST, None)).unwrap();
    sender.pages(0, &pages(0, 10)).unwrap();
    sender.finish().unwrap();
    sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
    // More than all buffers on the way hold.
    let bytes = pages(0, 1_000);
    let error = (0..)
        .find_map(|n| sender.pages(n * bytes.len() as u64, &bytes).err())
        .expect("this never ends well");
    killed.join().unwrap();
    assert_eq!((error.image, error.last_stored), (Some(SECOND), Some(FIRST)), "{error}");
    assert!(!error.in_doubt, "{error}");
    let again = sender.finish().unwrap_err();
    assert_eq!(again.to_string(), error.to_string(), "the same reason for ever");
}

/// A sink that cannot store: the sender gets its reason in words, whatever it is doing then.
#[test]
fn disk_full() {
    for step in [Step::Begin, Step::Pages, Step::Zero, Step::Finish] {
        let sink = Recorder { fail: Some(step), ..Recorder::default() };
        let served = serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), sink);
        let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
        sender.begin(&plain(FIRST, None)).unwrap();
        sender.finish().unwrap();
        sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
        sender.zero(0, 1).unwrap();
        // Megabytes of it, for some of the steps: the sender is in the middle of a write.
        let many = if step == Step::Finish { 1 } else { 20 };
        let bytes = pages(0, 1_000);
        let error = (0..many)
            .find_map(|n| sender.pages((1 + 1_000 * n) * PAGE, &bytes).err())
            .unwrap_or_else(|| sender.finish().unwrap_err());
        let text = error.to_string();
        assert!(text.contains("No space left on device"), "{step:?}: {text}");
        assert!(text.ends_with(&FIRST.to_string()), "{step:?}: {text}");
        assert_eq!((error.image, error.last_stored), (Some(SECOND), Some(FIRST)), "{error}");
        assert!(!error.in_doubt, "{step:?}: the receiver has said that it is not stored: {text}");
        let MigrateError::Protocol(ProtocolError::Refused(refusal)) = &*error.error else {
            panic!("{step:?}: {error}");
        };
        assert_eq!(refusal.code, RefusalCode::Storage);
        let theirs = served.outcome(0).unwrap_err();
        assert!(matches!(&*theirs.error, MigrateError::Store(_)), "{theirs}");
        assert_eq!((theirs.image, theirs.last_stored), (Some(SECOND), Some(FIRST)), "{theirs}");
        assert_eq!(served.images().len(), 1, "{step:?}");
    }
}

/// A sink that has stored something else than came: that is no image to be relied on.
#[test]
fn a_store_that_miscounts() {
    let sink = Recorder { fail: Some(Step::Miscount), ..Recorder::default() };
    let served = serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), sink);
    let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
    sender.begin(&plain(FIRST, None)).unwrap();
    sender.finish().unwrap();
    sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
    let error = sender.finish().unwrap_err();
    let MigrateError::Protocol(ProtocolError::Refused(refusal)) = &*error.error else {
        panic!("{error}");
    };
    assert_eq!((refusal.code, error.last_stored), (RefusalCode::Counts, Some(FIRST)), "{error}");
    assert_eq!(served.outcome(0).unwrap_err().last_stored, Some(FIRST));
}

/// A sink that takes much longer than either side's patience with a silent peer: nobody is lost.
#[test]
fn a_slow_disk() {
    let hook = Box::new(|step| {
        if matches!(step, Step::Pages | Step::Finish) {
            thread::sleep(Duration::from_millis(250));
        }
    });
    let mut options = impatient_receiver();
    // Shorter than what the sink takes for all batches that may wait.
    options.idle_timeout = Duration::from_millis(500);
    let sink = Recorder { hook: Some(hook), ..Recorder::default() };
    let served = serve(&"127.0.0.1:0".parse().unwrap(), options, sink);
    let mut sender = ImageSender::connect(&served.endpoint, impatient_sender()).unwrap();
    sender.begin(&plain(FIRST, None)).unwrap();
    let bytes = pages(0, 1_000);
    for n in 0..8 {
        sender.pages(n * bytes.len() as u64, &bytes).unwrap();
    }
    assert_eq!(sender.finish().unwrap().data, 8_000);
    // And a sender that has nothing to say for long, as between two rounds.
    thread::sleep(Duration::from_millis(1_500));
    sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
    thread::sleep(Duration::from_millis(800));
    sender.finish().unwrap();
    sender.close().unwrap();
    assert_eq!(served.images().len(), 2);
}

/// A sender that is told to stop, wherever it is.
#[test]
fn a_sender_is_stopped() {
    // In the handshake: nobody answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent: Endpoint = listener.local_addr().unwrap().into();
    let stop_soon = |stop: &Stop| {
        let stop = stop.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            stop.stop();
        })
    };
    let options = |stop: &Stop| {
        let mut options = SenderOptions::default();
        options.stop = Some(stop.clone());
        options
    };
    let stop = Stop::new().unwrap();
    let stopping = stop_soon(&stop);
    let error = ImageSender::connect(&silent, options(&stop)).unwrap_err();
    assert!(matches!(error, MigrateError::Stopped), "{error}");
    stopping.join().unwrap();
    // Before it connects.
    let error = ImageSender::connect(&silent, options(&stop)).unwrap_err();
    assert!(matches!(error, MigrateError::Stopped), "{error}");

    // In the middle of a write, and while an image is being stored: the sink is stuck.
    for finish in [false, true] {
        let (entered, at) = mpsc::channel();
        let (go_on, going_on) = mpsc::channel::<()>();
        let hook = Box::new(move |step| {
            let stuck = if finish { Step::Finish } else { Step::Pages };
            if step == stuck {
                // Only the first time is listened for, and in the end the test lets go.
                let _ = entered.send(());
                let _ = going_on.recv();
            }
        });
        let sink = Recorder { hook: Some(hook), ..Recorder::default() };
        let served = serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), sink);
        let stop = Stop::new().unwrap();
        let mut sender = ImageSender::connect(&served.endpoint, options(&stop)).unwrap();
        sender.begin(&plain(FIRST, None)).unwrap();
        let stopping = {
            let stop = stop.clone();
            thread::spawn(move || {
                at.recv().unwrap();
                // Long enough for the sender to fill all buffers on the way.
                thread::sleep(Duration::from_millis(if finish { 0 } else { 300 }));
                stop.stop();
                Instant::now()
            })
        };
        let bytes = pages(0, 1_000);
        let error = if finish {
            sender.finish().unwrap_err()
        } else {
            (0..1_000).find_map(|n| sender.pages(n * 1_000 * PAGE, &bytes).err()).unwrap()
        };
        let took = stopping.join().unwrap().elapsed();
        assert!(matches!(&*error.error, MigrateError::Stopped), "{error}");
        assert_eq!((error.image, error.in_doubt), (Some(FIRST), finish), "{error}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        drop(sender);
        drop(go_on);
        // What had come whole was stored; what had not was not.
        assert!(served.outcome(0).is_err());
        assert_eq!(served.images().len(), usize::from(finish));
    }
}

/// A receiver that is told to stop: the sender hears it at once, even if it has nothing to send.
#[test]
fn a_receiver_is_stopped() {
    let served =
        serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), Recorder::default());
    let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
    sender.begin(&plain(FIRST, None)).unwrap();
    sender.finish().unwrap();
    sender.begin(&plain(SECOND, Some(FIRST))).unwrap();
    sender.pages(0, &page(0)).unwrap();
    sender.flush().unwrap();
    drop(served.wait("the second image", begun_again));
    served.stop.stop();
    let error = served.outcome(0).unwrap_err();
    assert!(matches!(&*error.error, MigrateError::Stopped), "{error}");
    assert_eq!((error.image, error.last_stored), (Some(SECOND), Some(FIRST)));
    let error = sender.finish().unwrap_err();
    let MigrateError::Protocol(ProtocolError::Refused(refusal)) = &*error.error else {
        panic!("{error}");
    };
    assert_eq!(refusal.code, RefusalCode::Stopping);
    assert_eq!(error.last_stored, Some(FIRST));
}

/// What the embedder does wrong changes nothing.
#[test]
fn misuse() {
    let served =
        serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), Recorder::default());
    let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
    assert!(sender.pages(0, &page(0)).is_err());
    assert!(sender.finish().is_err() && sender.abort("why").is_err());
    assert!(sender.begin(&plain(FIRST, Some(FIRST))).is_err());
    sender.begin(&plain(FIRST, None)).unwrap();
    assert!(sender.begin(&plain(SECOND, None)).is_err());
    sender.pages(5 * PAGE, &pages(5, 2)).unwrap();
    for (address, bytes) in
        [(6 * PAGE, page(0)), (0, page(0)), (7 * PAGE + 1, page(0)), (8 * PAGE, vec![0; 100])]
    {
        let error = sender.pages(address, &bytes).unwrap_err();
        assert_eq!((error.image, error.in_doubt), (Some(FIRST), false), "{error}");
    }
    assert!(sender.zero(8 * PAGE, 0).is_err());
    assert!(sender.gone(u64::MAX - PAGE + 1, 1).is_err());
    sender.zero(9 * PAGE, 1).unwrap();
    let counts = sender.finish().unwrap();
    assert_eq!((counts.data, counts.zero), (2, 1));
    sender.close().unwrap();
    let runs = [(5 * PAGE, Content::Data(pages(5, 2))), (9 * PAGE, Content::Zero(1))];
    assert!(served.images() == [recorded(&plain(FIRST, None), &runs)]);
}

/// A connection that is cut in a round, after an image that was acknowledged.
#[test]
fn a_link_that_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let served = serve(&endpoint, ReceiverOptions::default(), Recorder::default());
        let mut raw = RawSender::connect(&served.endpoint);
        raw.image(FIRST);
        raw.begin(SECOND);
        raw.say(&data(1, 5));
        // In the middle of a payload.
        raw.raw.send_frame(&data(6, 9));
        raw.raw.send(&[0; 5_000]);
        drop(raw);
        let error = served.outcome(0).unwrap_err();
        assert_eq!((error.image, error.last_stored), (Some(SECOND), Some(FIRST)), "{error}");
        assert_eq!(served.images().len(), 1);
    }
}
