//! Guests moved while they run, in every way.

mod guest_common;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use guest_common::*;
use pageferry_memory::{Backing, PageSize};
use pageferry_migrate::{
    Compression, DestinationMigration, Endpoint, MigrateOptions, Mode, OnNoConvergence, Outcome,
    ReceiveOptions, SourceMigration, Stage, Via,
};
use pageferry_paging::Events;
use pageferry_testing::{HugePages, features, watch};

const MIB: u64 = 1 << 20;
const MODES: [Mode; 3] = [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];

fn able() -> bool {
    let needed = pageferry_uffd::Features::WP_ASYNC | pageferry_uffd::Features::POISON;
    features(needed)
}

/// Moves a guest, and checks all of it.
fn moves(from: Backing, to: Backing, load: Load, options: MigrateOptions) -> SourceMigration {
    moves_with(from, to, load, Events::Ignore, options)
}

fn moves_with(
    from: Backing,
    to: Backing,
    load: Load,
    events: Events,
    options: MigrateOptions,
) -> SourceMigration {
    let lives = Arc::new(Lives::default());
    let source = Source::new(layout(from, 16 * MIB), load, &lives);
    let destination = Destination::with(to, load, &lives, events, Box::new(|_| Ok(())));
    source.vm.work(200);
    let receiving = listen(&destination);
    let sending = start(&source, receiving.endpoint().unwrap(), options);
    assert_eq!(sending.wait().unwrap(), Outcome::Completed);
    receiving.wait().unwrap();
    assert!(source.released.load(SeqCst) && !source.vm.is_running());
    assert_eq!((sending.stage(), receiving.status().stage), (Stage::Completed, Stage::Completed));
    destination.assert_goes_on();
    assert_eq!(lives.running(), 0);
    sending
}

#[test]
fn every_mode_while_the_guest_writes() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for mode in MODES {
        for load in [Load::IDLE, Load::BUSY] {
            let sending = moves(Backing::Anonymous, Backing::Anonymous, load, options(mode));
            let status = sending.status();
            assert!(status.downtime.is_some());
            assert_eq!(status.remaining, 0);
            assert_eq!(status.rounds.is_empty(), mode == Mode::PostCopy);
            assert!(status.counts.zero > 0);
        }
    }
}

#[test]
fn from_any_kind_of_memory_to_any() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for (from, to) in [
        (Backing::Memfd, Backing::Anonymous),
        (Backing::Anonymous, Backing::Memfd),
        (Backing::Memfd, Backing::Memfd),
    ] {
        for mode in MODES {
            moves(from, to, Load::BUSY, options(mode));
        }
    }
    moves_with(
        Backing::Anonymous,
        Backing::Memfd,
        Load::BUSY,
        Events::Watch,
        options(Mode::Hybrid),
    );
}

#[test]
fn to_and_from_huge_pages() {
    if !able() {
        return;
    }
    let huge = Backing::Hugetlb(PageSize::SIZE_2M);
    let Some(_pages) = HugePages::reserve(16) else { return };
    let _watch = watch(60);
    for mode in MODES {
        moves(Backing::Anonymous, huge, Load::BUSY, options(mode));
        moves(huge, Backing::Anonymous, Load::BUSY, options(mode));
    }
}

#[test]
fn over_any_number_of_connections_and_packed_in_any_way() {
    if !able() {
        return;
    }
    let _watch = watch(120);
    for (connections, demand) in [(0, 0), (0, 1), (1, 0), (3, 2)] {
        for compression in
            [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Auto]
        {
            let mode = MODES[(usize::from(connections) + compression as usize) % 3];
            let mut options = options(mode);
            options.connections = connections;
            options.demand_connections = demand;
            options.compression = compression;
            let sending = moves(Backing::Anonymous, Backing::Anonymous, Load::BUSY, options);
            let packed = sending.status().counts.packed;
            match compression {
                Compression::None => assert_eq!(packed, 0),
                // Which is measured, and may not pay.
                Compression::Auto => {}
                _ => assert!(packed > 200, "{packed} units packed"),
            }
        }
    }
}

#[test]
fn over_one_stream() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    for (number, mode) in (0..).zip(MODES) {
        let lives = Arc::new(Lives::default());
        let source = Source::new(layout(Backing::Anonymous, 8 * MIB), Load::BUSY, &lives);
        let destination = Destination::new(Backing::Anonymous, Load::BUSY, &lives);
        let (here, there) = UnixStream::pair().unwrap();
        let pipes = |stream: &UnixStream| Via::Pipes {
            input: OwnedFd::from(stream.try_clone().unwrap()),
            output: OwnedFd::from(stream.try_clone().unwrap()),
        };
        let (here, there) = match number {
            0 => (Via::Socket(here.into()), Via::Socket(there.into())),
            1 => (pipes(&here), pipes(&there)),
            _ => (Via::Socket(here.into()), pipes(&there)),
        };
        let receiving = DestinationMigration::from_stream(
            Arc::clone(&destination) as _,
            there,
            ReceiveOptions::default(),
        )
        .unwrap();
        let sending =
            SourceMigration::start(Arc::clone(&source) as _, here, options(mode)).unwrap();
        assert_eq!(sending.wait().unwrap(), Outcome::Completed);
        receiving.wait().unwrap();
        destination.assert_goes_on();
    }
}

#[test]
fn over_a_unix_socket() {
    if !able() {
        return;
    }
    let _watch = watch(30);
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(directory.path().join("guest"));
    let lives = Arc::new(Lives::default());
    let source = Source::new(layout(Backing::Memfd, 8 * MIB), Load::BUSY, &lives);
    let destination = Destination::new(Backing::Memfd, Load::BUSY, &lives);
    let receiving = DestinationMigration::listen(
        Arc::clone(&destination) as _,
        &endpoint,
        ReceiveOptions::default(),
    )
    .unwrap();
    let sending = start(&source, endpoint, options(Mode::Hybrid));
    assert_eq!(sending.wait().unwrap(), Outcome::Completed);
    receiving.wait().unwrap();
    destination.assert_goes_on();
}

#[test]
fn what_did_not_change_is_not_sent_and_what_did_is_sent_as_little_of_as_will_do() {
    if !able() {
        return;
    }
    let _watch = watch(30);
    let mut options = options(Mode::PreCopy);
    options.downtime = Duration::ZERO;
    options.rounds = 5;
    options.precopy_bandwidth = Some(100 * MIB);
    let sending = moves(Backing::Anonymous, Backing::Anonymous, Load::BUSY, options);
    let status = sending.status();
    assert!(status.rounds.len() >= 2, "{:?}", status.rounds);
    // Each step changes one word of a page that was sent whole in the second round, or later.
    assert!(status.counts.delta > 0 || status.rounds.len() < 3, "{:?}", status.counts);
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_dealt_with_as_asked() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let slow = |otherwise| {
        let mut options = options(Mode::PreCopy);
        options.precopy_bandwidth = Some(32 * MIB);
        options.delta_cache = 0;
        options.compression = Compression::None;
        options.downtime = Duration::from_micros(1);
        options.timeout = Duration::from_secs(10);
        options.on_no_convergence = otherwise;
        options
    };
    let (from, to, load) = (Backing::Anonymous, Backing::Anonymous, Load { vcpus: 2, burst: 400 });
    for otherwise in [OnNoConvergence::Switch, OnNoConvergence::PostCopy, OnNoConvergence::Throttle]
    {
        let sending = moves(from, to, load, slow(otherwise));
        let throttled = sending.status().rounds.iter().any(|round| round.throttle > 0);
        assert_eq!(throttled, otherwise == OnNoConvergence::Throttle);
    }
    let lives = Arc::new(Lives::default());
    let source = Source::new(layout(from, 4 * MIB), load, &lives);
    let destination = Destination::new(to, load, &lives);
    let receiving = listen(&destination);
    let sending = start(&source, receiving.endpoint().unwrap(), slow(OnNoConvergence::GiveUp));
    let error = sending.wait().unwrap_err();
    assert!(error.to_string().contains("stand still"), "{error}");
    assert!(receiving.wait().is_err());
    source.assert_goes_on();
    destination.assert_dropped();
}
