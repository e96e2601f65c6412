//! What goes wrong: in no case do two copies of the guest run, and in no case is it lost while one
//! side has all of it.

mod guest_common;

use std::{
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use guest_common::{proxy::Proxy, *};
use pageferry_memory::Backing;
use pageferry_migrate::{
    DestinationMigration, Event, GuestError, MigrateOptions, Mode, Outcome, ReceiveOptions,
    SourceMigration, Stage,
};
use pageferry_paging::Events;
use pageferry_testing::{features, wait_for, watch};

const MIB: u64 = 1 << 20;
const MODES: [Mode; 3] = [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];

fn able() -> bool {
    let needed = pageferry_uffd::Features::WP_ASYNC | pageferry_uffd::Features::POISON;
    features(needed)
}

/// A guest on its way through a proxy.
struct Trip {
    lives: Arc<Lives>,
    source: Arc<Source>,
    destination: Arc<Destination>,
    receiving: DestinationMigration,
    proxy: Proxy,
}

type Step = Box<dyn Fn(&'static str) -> Result<(), GuestError> + Send + Sync>;

fn nothing() -> Step {
    Box::new(|_| Ok(()))
}

impl Trip {
    fn new(options: ReceiveOptions) -> Self {
        Self::with(options, nothing(), nothing())
    }

    /// Once it has moved, the guest touches nothing, so that it takes long until all is there.
    fn lazy(options: ReceiveOptions) -> Self {
        Self::loaded(options, (nothing(), nothing()), Load::IDLE)
    }

    fn with(options: ReceiveOptions, at_source: Step, at_destination: Step) -> Self {
        Self::loaded(options, (at_source, at_destination), Load::BUSY)
    }

    fn loaded(
        options: ReceiveOptions,
        (at_source, at_destination): (Step, Step),
        load: Load,
    ) -> Self {
        let lives = Arc::new(Lives::default());
        let memory = layout(Backing::Anonymous, 8 * MIB);
        let source = Source::with(memory, Load::BUSY, &lives, at_source);
        let destination =
            Destination::with(Backing::Anonymous, load, &lives, Events::Ignore, at_destination);
        source.vm.work(100);
        let receiving = listen_with(&destination, options);
        let proxy = Proxy::new(&receiving.endpoint().unwrap());
        Self { lives, source, destination, receiving, proxy }
    }

    fn start(&self, options: MigrateOptions) -> SourceMigration {
        start(&self.source, self.proxy.endpoint(), options)
    }

    /// The guest is at the source, and nowhere else.
    #[track_caller]
    fn stays(&self) {
        assert!(self.receiving.wait().is_err());
        self.destination.assert_dropped();
        self.source.assert_goes_on();
    }

    /// The guest is at the destination, and nowhere else.
    #[track_caller]
    fn moved(&self, sending: &SourceMigration) {
        assert_eq!(sending.wait().unwrap(), Outcome::Completed);
        self.receiving.wait().unwrap();
        self.destination.assert_goes_on();
        assert!(!self.source.vm.is_running() && self.source.released.load(SeqCst));
        self.lives.assert_never_two();
    }
}

/// Calls `then` when the source comes to a stage.
fn at_stage(
    options: &mut MigrateOptions,
    wanted: impl Fn(Stage) -> bool + Send + Sync + 'static,
    then: impl Fn() + Send + Sync + 'static,
) {
    options.observer = Some(Arc::new(move |event| {
        if let Event::Stage(stage) = event
            && wanted(*stage)
        {
            then();
        }
    }));
}

#[test]
fn a_link_that_is_cut_before_the_guest_moves_leaves_it_where_it_is() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for mode in MODES {
        for bytes in [1, 100, 400, 5000, 1 << 20] {
            let trip = Trip::new(ReceiveOptions::default());
            trip.proxy.cut_after(bytes);
            // Post-copy has moved the guest by the time a mebibyte has passed.
            if mode == Mode::PostCopy && bytes > 400 {
                continue;
            }
            let sending = trip.start(options(mode));
            assert!(sending.wait().is_err(), "{mode:?} {bytes}");
            trip.source.assert_goes_on();
            assert!(!trip.destination.has_run());
            drop(trip.receiving);
        }
    }
}

#[test]
fn a_link_that_is_cut_at_every_stage_before_the_guest_is_given_away() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let stages: [fn(Stage) -> bool; 2] =
        [|stage| matches!(stage, Stage::Copying { .. }), |stage| stage == Stage::Switching];
    for stage in stages {
        let trip = Arc::new(Trip::new(ReceiveOptions::default()));
        let mut options = options(Mode::Hybrid);
        let weak = Arc::downgrade(&trip);
        at_stage(&mut options, stage, move || weak.upgrade().unwrap().proxy.cut());
        let sending = trip.start(options);
        assert!(sending.wait().is_err());
        trip.stays();
    }
}

#[test]
fn one_connection_of_several_that_is_cut_is_as_good_as_all() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for index in 0..3 {
        let trip = Arc::new(Trip::new(ReceiveOptions::default()));
        let mut options = options(Mode::PreCopy);
        options.precopy_bandwidth = Some(8 * MIB);
        let weak = Arc::downgrade(&trip);
        at_stage(
            &mut options,
            |stage| stage == Stage::Copying { round: 1 },
            move || weak.upgrade().unwrap().proxy.cut_one(index),
        );
        // The connection that carries pages, the one for requests, and control. A round needs no
        // requests, so that their connection is found to be gone by the one who listens to it.
        let sending = trip.start(options);
        assert!(sending.wait().is_err(), "{index}");
        trip.stays();
    }
}

#[test]
fn a_link_that_is_cut_ten_times_in_post_copy_is_found_again_ten_times() {
    if !able() {
        return;
    }
    let _watch = watch(90);
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        let trip = Trip::new(ReceiveOptions::default());
        let mut options = options(mode);
        options.background_bandwidth = Some(4 * MIB);
        options.reconnect = Some(Duration::from_millis(10));
        let sending = trip.start(options);
        trip.destination.vm();
        for _ in 0..10 {
            let before = sending.status().counts.resumed;
            trip.proxy.cut();
            wait_for("the sides to find each other", || {
                sending.status().counts.resumed > before
                    || sending.status().stage == Stage::Completed
            });
        }
        if mode == Mode::PostCopy {
            assert!(sending.status().counts.resumed >= 8, "{:?}", sending.status());
        }
        trip.moved(&sending);
    }
}

#[test]
fn either_side_is_told_another_address() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let trip = Trip::lazy(ReceiveOptions::default());
    let mut options = options(Mode::PostCopy);
    options.background_bandwidth = Some(4 * MIB);
    let sending = trip.start(options);
    wait_for("the source to hear that it runs", || sending.stage() == Stage::PostCopy);
    trip.proxy.refuse(true);
    trip.proxy.cut();
    wait_for("both to notice", || {
        sending.stage() == Stage::Paused && trip.receiving.status().stage == Stage::Paused
    });
    assert!(sending.reclaim().is_err(), "the guest has run at the destination");
    assert!(trip.receiving.drop_guest().is_err());
    assert!(!sending.cancel());
    // The destination listens somewhere else, and the source is told where.
    let elsewhere = trip.receiving.relisten(&local()).unwrap();
    sending.recover(elsewhere).unwrap();
    trip.moved(&sending);
    assert_eq!(trip.receiving.status().counts.resumed, 1);
}

#[test]
fn a_stalled_link_is_a_lost_one() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let mut receive = ReceiveOptions::default();
    (receive.keepalive, receive.idle_timeout) =
        (Duration::from_millis(200), Duration::from_millis(1500));
    for stage in [Stage::Copying { round: 1 }, Stage::Switching] {
        let trip = Arc::new(Trip::new(receive.clone()));
        let mut options = options(Mode::Hybrid);
        (options.keepalive, options.idle_timeout) = (receive.keepalive, receive.idle_timeout);
        (options.write_timeout, options.switch_timeout) =
            (Duration::from_millis(1500), Duration::from_millis(1500));
        let weak = Arc::downgrade(&trip);
        at_stage(
            &mut options,
            move |now| now == stage,
            move || weak.upgrade().unwrap().proxy.stall(true),
        );
        let sending = trip.start(options);
        assert!(sending.wait().is_err());
        // The destination finds out by itself, or when the stall ends.
        trip.proxy.stall(false);
        trip.stays();
    }
    // After the guest has moved, it is found again.
    let trip = Arc::new(Trip::lazy(receive.clone()));
    let mut options = options(Mode::PostCopy);
    (options.keepalive, options.idle_timeout) = (receive.keepalive, receive.idle_timeout);
    options.write_timeout = Duration::from_millis(1500);
    options.background_bandwidth = Some(4 * MIB);
    options.reconnect = Some(Duration::from_millis(50));
    let sending = trip.start(options);
    wait_for("the source to hear that it runs", || sending.stage() == Stage::PostCopy);
    trip.proxy.stall(true);
    wait_for("the stall to be noticed", || sending.stage() == Stage::Paused);
    trip.proxy.stall(false);
    trip.moved(&sending);
}

#[test]
fn a_cancel_is_heard_at_every_stage_before_the_guest_is_given_away() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let steps = ["start_tracking", "harvest", "pause", "save", "prepare", "restore"];
    for step in steps {
        let sending: Arc<Mutex<Option<Arc<SourceMigration>>>> = Arc::default();
        let cancel: Arc<dyn Fn(&'static str) + Send + Sync> = {
            let sending = Arc::clone(&sending);
            Arc::new(move |now| {
                if now == step {
                    wait_for("the migration to be known", || sending.lock().unwrap().is_some());
                    assert!(sending.lock().unwrap().as_ref().unwrap().cancel());
                }
            })
        };
        let same = Arc::clone(&cancel);
        let trip = Trip::with(
            ReceiveOptions::default(),
            Box::new(move |now| {
                cancel(now);
                Ok(())
            }),
            Box::new(move |now| {
                same(now);
                Ok(())
            }),
        );
        let migration = Arc::new(trip.start(options(Mode::Hybrid)));
        *sending.lock().unwrap() = Some(Arc::clone(&migration));
        assert_eq!(migration.wait().unwrap(), Outcome::Cancelled, "{step}");
        assert_eq!(migration.stage(), Stage::Cancelled);
        trip.stays();
        sending.lock().unwrap().take();
    }
}

#[test]
fn whatever_fails_at_the_source_leaves_the_guest_there() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for step in ["start_tracking", "harvest", "pause", "save"] {
        let fail: Step = Box::new(move |now| match now == step {
            true => Err(GuestError::failed(step, "as the test wants it")),
            false => Ok(()),
        });
        let trip = Trip::with(ReceiveOptions::default(), fail, nothing());
        let sending = trip.start(options(Mode::Hybrid));
        let error = sending.wait().unwrap_err().to_string();
        assert!(error.contains("as the test wants it"), "{step}: {error}");
        trip.stays();
    }
}

#[test]
fn whatever_fails_at_the_destination_leaves_the_guest_at_the_source() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for step in ["prepare", "restore", "run"] {
        let paused = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&paused);
        let at_source: Step = Box::new(move |now| {
            if now == "pause" {
                count.fetch_add(1, SeqCst);
            }
            Ok(())
        });
        let fail: Step = Box::new(move |now| match now == step {
            true => Err(GuestError::Memory { bytes: 8 * MIB, why: "as the test wants it".into() }),
            false => Ok(()),
        });
        let trip = Trip::with(ReceiveOptions::default(), at_source, fail);
        let sending = trip.start(options(Mode::Hybrid));
        let error = sending.wait().unwrap_err().to_string();
        if step == "run" {
            assert!(error.contains("could not run"), "{error}");
        } else {
            assert!(error.contains("as the test wants it"), "{step}: {error}");
        }
        // What there is no room for is refused before the guest is stopped.
        assert_eq!(paused.load(SeqCst), usize::from(step != "prepare"), "{step}");
        trip.stays();
    }
    let mut receive = ReceiveOptions::default();
    receive.max_memory = 4 * MIB;
    let trip = Trip::new(receive);
    let error = trip.start(options(Mode::Hybrid)).wait().unwrap_err().to_string();
    assert!(error.contains("memory"), "{error}");
    trip.stays();
}

#[test]
fn a_guest_given_away_and_never_heard_of_is_taken_back_on_somebodys_word_only() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let proxy: Arc<Mutex<Option<Arc<Trip>>>> = Arc::default();
    let known = Arc::clone(&proxy);
    // The link breaks while the destination starts the guest, which fails.
    let cut: Step = Box::new(move |now| {
        if now == "run" {
            let trip = known.lock().unwrap().clone().unwrap();
            trip.proxy.refuse(true);
            trip.proxy.cut();
            return Err(GuestError::failed("running", "as the test wants it"));
        }
        Ok(())
    });
    let trip = Arc::new(Trip::with(ReceiveOptions::default(), nothing(), cut));
    *proxy.lock().unwrap() = Some(Arc::clone(&trip));
    let sending = trip.start(options(Mode::Hybrid));
    wait_for("the loss to be noticed", || sending.stage() == Stage::Paused);
    assert!(!trip.source.vm.is_running(), "nobody has given their word");
    assert!(trip.receiving.wait().is_err());
    sending.reclaim().unwrap();
    let error = sending.wait().unwrap_err().to_string();
    assert!(error.contains("taken back"), "{error}");
    trip.stays();
    proxy.lock().unwrap().take();
}

#[test]
fn a_second_guest_is_told_that_the_place_is_taken() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let trip = Trip::new(ReceiveOptions::default());
    let mut slow = options(Mode::PreCopy);
    slow.precopy_bandwidth = Some(4 * MIB);
    let first = trip.start(slow);
    wait_for("the first to begin", || first.stage() == Stage::Copying { round: 1 });
    let lives = Arc::new(Lives::default());
    let other = Source::new(layout(Backing::Anonymous, MIB), Load::BUSY, &lives);
    let second = start(&other, trip.proxy.endpoint(), options(Mode::Hybrid));
    let error = second.wait().unwrap_err().to_string();
    assert!(error.contains("Busy"), "{error}");
    other.assert_goes_on();
    trip.moved(&first);
}

#[test]
fn strangers_do_not_disturb() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let trip = Trip::new(ReceiveOptions::default());
    let endpoint = trip.proxy.endpoint().to_string();
    use std::io::{Read, Write};
    for noise in [&b"GET / HTTP/1.1\r\n\r\n0123456789abcdef"[..], b"", &[0; 4096]] {
        let mut stranger = TcpStream::connect(&endpoint).unwrap();
        // It may have been thrown out by the time that it speaks.
        let _ = stranger.write_all(noise);
        drop(stranger.shutdown(std::net::Shutdown::Write));
        let _ = stranger.read_to_end(&mut Vec::new());
    }
    trip.moved(&trip.start(options(Mode::Hybrid)));
}

#[test]
fn a_destination_that_is_dropped_before_anything_comes_ends() {
    let _watch = watch(20);
    let lives = Arc::new(Lives::default());
    let destination = Destination::new(Backing::Anonymous, Load::IDLE, &lives);
    let receiving = listen(&destination);
    receiving.drop_guest().unwrap();
    assert!(receiving.wait().is_err());
    destination.assert_dropped();
    let sending = start(
        &Source::new(layout(Backing::Anonymous, MIB), Load::IDLE, &lives),
        "127.0.0.1:1".parse().unwrap(),
        options(Mode::Hybrid),
    );
    assert!(sending.wait().is_err());
}
