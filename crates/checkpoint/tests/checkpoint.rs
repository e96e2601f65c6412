//! Checkpoints of processes that write all the time.

mod common;

use std::{ops::ControlFlow, path::Path, sync::Arc};

use common::Target;
use pageferry_checkpoint::{Directory, Event, Options, Receiving, Remote, Why, checkpoint};
use pageferry_dirty::{self as dirty, Ability, Method, probe};
use pageferry_image::{Chain, Content, ImageRange, Missing, list};
use pageferry_memory::{ImageOffset, Mapping as MemoryMapping};
use pageferry_migrate::{Endpoint, ImageReceiver, ReceiverOptions, SenderOptions, Stop};
use pageferry_process::{Detail, Mapping, MappingName, Process, Signal, StopMethod};
use pageferry_testing::{child, target};
use pageferry_uffd::{HostAddress, HostRange, Pagemap, PagemapEntry};

/// Not a test: what the children of the others do.
#[test]
fn target() {
    common::target();
}

/// Whether a process of ours can be tracked so here.
fn can_track(method: Option<Method>) -> bool {
    // Any other process: what is asked is about the kernel.
    let report = probe(dirty::Target::Process(std::process::id()));
    let works = |(found, ability): &(Method, Ability)| {
        !matches!(ability, Ability::Missing(_)) && method.is_none_or(|method| method == *found)
    };
    let works = report.methods.iter().any(works);
    if !works {
        let name = method.map_or("a way to track writes", Method::name);
        println!("skipped: needs {name}");
    }
    works
}

fn silent(_: Event) -> bool {
    true
}

/// Every page of a stopped process, against a chain. Answers with how many were compared.
fn compare(process: &Process, chain: &Chain) -> u64 {
    let pagemap = process.pagemap().unwrap();
    let mut compared = 0;
    for mapping in process.mappings(Detail::Full).unwrap() {
        if mapping.takeable().is_err() {
            continue;
        }
        let mut at = mapping.range.start();
        while at < mapping.range.end() {
            compared += u64::from(compare_page(process, &pagemap, &mapping, at, chain));
            at = HostAddress::new(at.get() + 4096);
        }
    }
    compared
}

fn compare_page(
    process: &Process,
    pagemap: &Pagemap,
    mapping: &Mapping,
    at: HostAddress,
    chain: &Chain,
) -> bool {
    let offset = ImageOffset::new(at.get());
    let content = chain.extent_at(offset).unwrap().content;
    if content == Content::Absent {
        // Only what lies in a file that stays where it is, and what cannot be read at all because
        // it is behind the end of one.
        if process.read_memory_exact(at, &mut [0; 4096]).is_err() {
            return false;
        }
        assert!(
            matches!(mapping.name, MappingName::File { deleted: false, .. }),
            "{at} of {mapping:?} is not in the chain"
        );
        let mut entry = [PagemapEntry::from_bits(0)];
        pagemap.read_entries(HostRange::new(at, 4096), &mut entry).unwrap();
        let own = entry[0].swapped() || entry[0].present() && !entry[0].file();
        assert!(mapping.shared || !own, "{at} of {mapping:?} has changed, and is not in the chain");
        return false;
    }
    let (mut found, mut expected) = ([0; 4096], [0; 4096]);
    chain.read_at(offset, &mut found, Missing::Poison).unwrap();
    process.read_memory_exact(at, &mut expected).unwrap();
    assert!(found == expected, "{at} ({content}) of {mapping:?}");
    true
}

fn verify(directory: &Path) -> Chain {
    let chain = Chain::open(directory).unwrap();
    let verified = chain.verify(&mut |_| ControlFlow::Continue(())).unwrap();
    assert!(verified.is_intact(), "{verified:?}");
    chain
}

/// With each method: the chain is the memory at the last stop, page for page.
#[test]
fn it_is_the_memory_at_the_last_stop() {
    for method in [None, Some(Method::WpAsync), Some(Method::WpBlocking), Some(Method::SoftDirty)] {
        for case in ["writes", "maps"] {
            if !can_track(method) {
                continue;
            }
            println!("{method:?} {case}");
            let mut target = Target::start(case);
            let process = target.process();
            let directory = tempfile::tempdir().unwrap();
            let mut destination = Directory::open(directory.path()).unwrap();
            // A downtime that nothing meets: all the rounds.
            let options = Options {
                rounds: 4,
                downtime: Default::default(),
                method,
                leave_stopped: true,
                ..Options::default()
            };
            let report = checkpoint(&process, &mut destination, &options, &mut silent)
                .unwrap_or_else(|error| panic!("{method:?} {case}: {error}"));
            assert_eq!(report.rounds.len(), 5, "{case}");
            assert!(report.rounds.iter().all(|round| round.last == (round.round == 4)));
            assert!(report.rounds[1..].iter().all(|round| round.stopped_by.is_some()));
            assert_eq!(report.left_stopped, Some(StopMethod::Ptrace));
            let chain = verify(directory.path());
            assert_eq!(chain.images().len(), 5);
            assert_eq!(chain.newest().id(), report.rounds[4].stored.id);
            let compared = compare(&process, &chain);
            assert!(compared > 10_000, "{method:?} {case}: {compared} pages");
            process.signal(Signal::CONT).unwrap();
            target.assert_runs();
        }
    }
}

/// What is taken again because nobody can tell whether it has changed, and has not, is not stored
/// again: in a directory, and where the images come from elsewhere.
#[test]
fn what_has_not_changed_is_stored_once_in_a_chain() {
    if !can_track(None) {
        return;
    }
    let target = Target::start("writes");
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("here"), folder.path().join("there"));
    let options = Options {
        rounds: 2,
        downtime: Default::default(),
        retake_shared: true,
        ..Options::default()
    };
    let mut destination = Directory::open(&here).unwrap();
    checkpoint(&target.process(), &mut destination, &options, &mut silent).unwrap();

    let endpoint: Endpoint = "127.0.0.1:0".parse().unwrap();
    let receiver = ImageReceiver::listen(&endpoint, ReceiverOptions::default()).unwrap();
    let address = receiver.local_endpoint();
    let mut sink = Receiving::new(Directory::open(&there).unwrap());
    std::thread::scope(|scope| {
        let received =
            scope.spawn(|| receiver.serve_one(&mut sink, &mut |_| (), &Stop::new().unwrap()));
        let mut remote = Remote::connect(address, SenderOptions::default()).unwrap();
        checkpoint(&target.process(), &mut remote, &options, &mut silent).unwrap();
        // It is gone: nobody waits for more.
        drop(remote);
        received.join().unwrap().unwrap();
    });

    for directory in [here, there] {
        let chain = verify(&directory);
        let amounts = chain.newest().info().amounts;
        // Of 4 MiB, mapped twice, the second half of what has been written at all is not written
        // any more.
        assert!(amounts.elsewhere >= 2 * (3 << 19), "{}: {amounts:?}", directory.display());
        assert!(amounts.data >= amounts.stored + amounts.elsewhere, "{amounts:?}");
        assert!(chain.images()[2].info().amounts.elsewhere == 0, "the first has none before it");
    }
}

#[test]
fn without_rounds_it_stands_still_for_all_of_it() {
    let mut target = Target::start("writes");
    let process = target.process();
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path().join("made")).unwrap();
    let options = Options { rounds: 0, leave_stopped: true, ..Options::default() };
    let report = checkpoint(&process, &mut destination, &options, &mut silent).unwrap();
    assert_eq!((report.rounds.len(), report.method), (1, None));
    assert!(compare(&process, &verify(&directory.path().join("made"))) > 10_000);
    process.signal(Signal::CONT).unwrap();
    target.assert_runs();
}

#[test]
fn it_ends_when_what_is_left_is_small_and_the_process_goes_on() {
    if !can_track(None) {
        return;
    }
    let mut target = Target::start("writes");
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path()).unwrap();
    let options = Options { downtime: std::time::Duration::from_secs(60), ..Options::default() };
    let mut copied = 0;
    let mut observe = |event| {
        if let Event::Copied { bytes } = event {
            copied += bytes;
        }
        true
    };
    let report = checkpoint(&target.process(), &mut destination, &options, &mut observe).unwrap();
    assert_eq!(report.rounds.len(), 2, "everything, and what was written meanwhile");
    assert_eq!(report.left_stopped, None);
    let changed: u64 = report.rounds.iter().map(|round| round.changed).sum();
    assert_eq!(copied, changed, "progress comes to its end");
    target.assert_runs();
    // A second one into the same directory is a chain of its own.
    checkpoint(&target.process(), &mut destination, &options, &mut silent).unwrap();
    let images = list(directory.path()).unwrap();
    assert_eq!(images.len(), 4);
    target.assert_runs();
}

#[test]
fn on_request_it_stops_and_the_process_goes_on() {
    if !can_track(None) {
        return;
    }
    let mut target = Target::start("writes");
    for wanted in ["attached", "copying", "copied", "completed"] {
        let directory = tempfile::tempdir().unwrap();
        let mut destination = Directory::open(directory.path()).unwrap();
        let mut complete = 0;
        let mut observe = |event| {
            let name = match event {
                Event::Attached { .. } => "attached",
                Event::Copying { round: 1, .. } => "copying",
                Event::Copied { .. } if complete == 2 => "copied",
                Event::Completed(_) => {
                    complete += 1;
                    "completed"
                }
                _ => "",
            };
            name != wanted
        };
        let options = Options { downtime: Default::default(), ..Options::default() };
        let error =
            checkpoint(&target.process(), &mut destination, &options, &mut observe).unwrap_err();
        assert!(matches!(error.why, Why::Stopped), "{wanted}: {error}");
        target.assert_runs();
        let images = list(directory.path()).unwrap();
        assert_eq!(images.len(), complete, "{wanted}");
        assert_eq!(error.last_complete.is_some(), complete > 0, "{wanted}: {error}");
        if complete > 0 {
            verify(directory.path());
        }
    }
}

/// What is completed before stays, and is named.
#[test]
fn a_process_killed_in_a_round() {
    if !can_track(None) {
        return;
    }
    for round in 0..3 {
        let mut target = Target::start("writes");
        let process = target.process();
        let directory = tempfile::tempdir().unwrap();
        let mut destination = Directory::open(directory.path()).unwrap();
        let mut observe = |event| {
            if matches!(event, Event::Copying { round: now, .. } if now == round) {
                target.kill();
            }
            true
        };
        let options = Options { downtime: Default::default(), ..Options::default() };
        let error = checkpoint(&process, &mut destination, &options, &mut observe).unwrap_err();
        assert!(error.round == round, "{error}");
        let images = list(directory.path()).unwrap();
        assert_eq!(images.len(), round as usize, "{error}");
        if round > 0 {
            let last = error.last_complete.unwrap();
            assert_eq!(last, images[round as usize - 1].path.display().to_string());
            verify(directory.path());
        }
    }
}

/// A mapping that was unmapped is no longer in the chain.
#[test]
fn gone_is_gone() {
    if !can_track(None) {
        return;
    }
    let target = Target::start("maps");
    let process = target.process();
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path()).unwrap();
    let options = Options {
        rounds: 6,
        downtime: Default::default(),
        leave_stopped: true,
        ..Options::default()
    };
    checkpoint(&process, &mut destination, &options, &mut silent).unwrap();
    let chain = verify(directory.path());
    let mapped: Vec<HostRange> =
        process.mappings(Detail::Names).unwrap().iter().map(|mapping| mapping.range).collect();
    for extent in chain.extents(ImageRange::ALL) {
        let extent = extent.unwrap();
        if extent.content == Content::Absent {
            continue;
        }
        let mut at = extent.range.start().get();
        while at < extent.range.end().get() {
            let address = HostAddress::new(at);
            assert!(mapped.iter().any(|range| range.contains(address)), "{address} is not mapped");
            at += 4096;
        }
    }
    let kept: Vec<&[u8]> =
        chain.newest().mappings().unwrap().iter().map(|mapping| mapping.name.as_slice()).collect();
    assert!(kept.contains(&b"[stack]".as_slice()) && kept.contains(&b"[heap]".as_slice()));
}

/// Pages that came after one harvest and went before the next were copied perhaps, and nobody tells
/// that they are gone.
#[test]
fn what_came_and_went_is_not_in_the_chain() {
    if !can_track(Some(Method::WpAsync)) {
        return;
    }
    let mut target = Target::start("discards");
    let process = target.process();
    for _ in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        let mut destination = Directory::open(directory.path()).unwrap();
        let options = Options {
            rounds: 6,
            downtime: Default::default(),
            method: Some(Method::WpAsync),
            leave_stopped: true,
            ..Options::default()
        };
        checkpoint(&process, &mut destination, &options, &mut silent).unwrap();
        let chain = verify(directory.path());
        let pagemap = process.pagemap().unwrap();
        let mappings = process.mappings(Detail::Names).unwrap();
        let large = mappings.iter().find(|mapping| mapping.range.len() == 3 << 30).unwrap();
        let mut there = 0;
        for page in 0..512 {
            let at = HostAddress::new(large.range.start().get() + page * 1000 * 4096);
            let mut found = [1; 4096];
            chain.read_at(ImageOffset::new(at.get()), &mut found, Missing::Poison).unwrap();
            let mut entry = [PagemapEntry::from_bits(0)];
            pagemap.read_entries(HostRange::new(at, 4096), &mut entry).unwrap();
            let mut expected = [0; 4096];
            if entry[0].present() {
                process.read_memory_exact(at, &mut expected).unwrap();
            }
            assert!(found == expected, "page {page}: {:?}", entry[0]);
            there += u32::from(expected != [0; 4096]);
        }
        assert!((32..480).contains(&there), "{there} of 512 are there");
        process.signal(Signal::CONT).unwrap();
        target.assert_runs();
    }
}

/// A process that starts another program is no longer what was to be saved.
#[test]
fn a_process_that_starts_another_program() {
    if !can_track(None) {
        return;
    }
    let mut target = Target::start("execs");
    let process = target.process();
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path()).unwrap();
    let mut observe = |event| {
        if matches!(event, Event::Completed(round) if round.round == 0) {
            target.tell();
            pageferry_testing::wait_for("the other program", || {
                process.check().is_err_and(|error| error.is_gone())
            });
        }
        true
    };
    let options = Options { downtime: Default::default(), ..Options::default() };
    let error = checkpoint(&process, &mut destination, &options, &mut observe).unwrap_err();
    assert_eq!(error.round, 1, "{error}");
    assert!(error.to_string().contains("another program"), "{error}");
    assert!(error.to_string().contains("checkpoint-0000.pfi"), "{error}");
    verify(directory.path());
}

/// Nobody can write where there is nothing.
#[test]
fn a_directory_that_is_removed() {
    if !can_track(None) {
        return;
    }
    let mut target = Target::start("writes");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("gone");
    let mut destination = Directory::open(&path).unwrap();
    let mut observe = |event| {
        if matches!(event, Event::Completed(round) if round.round == 1) {
            std::fs::remove_dir_all(&path).unwrap();
        }
        true
    };
    let options = Options { downtime: Default::default(), ..Options::default() };
    let error =
        checkpoint(&target.process(), &mut destination, &options, &mut observe).unwrap_err();
    assert!(matches!(error.why, Why::Destination(_)), "{error}");
    assert!(error.to_string().contains("gone"), "{error}");
    target.assert_runs();
}

/// What a process wrote over a file of which nothing else is left; what shows through from a shared
/// mapping of the same file; and what is behind a file's end.
#[test]
fn private_copies_over_files_and_what_shows_through() {
    if !can_track(None) {
        return;
    }
    let methods = [None, Some(Method::WpAsync), Some(Method::WpBlocking), Some(Method::SoftDirty)];
    for (rounds, method) in methods.into_iter().map(|method| (3, method)).chain([(0, None)]) {
        if !can_track(method) {
            continue;
        }
        let target = Target::start("layers");
        let process = target.process();
        let directory = tempfile::tempdir().unwrap();
        let mut destination = Directory::open(directory.path()).unwrap();
        let options = Options {
            rounds,
            downtime: Default::default(),
            method,
            leave_stopped: true,
            ..Options::default()
        };
        let report = checkpoint(&process, &mut destination, &options, &mut silent).unwrap();
        let chain = verify(directory.path());
        assert!(compare(&process, &chain) > 100);
        let broken: u64 = report.rounds.iter().map(|round| round.broken).sum();
        assert_eq!(broken, 0, "{method:?}: there is no broken memory");
    }
}

#[test]
fn a_process_whose_first_thread_has_ended() {
    const ME: &str = "a_process_whose_first_thread_has_ended";
    if child::case().is_some() {
        target::alone();
        let memory = Arc::new(MemoryMapping::anonymous(64 * 4096).unwrap());
        let (started, written) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for turn in 0_u64.. {
                memory.write_at(turn % 64 * 4096, &turn.to_ne_bytes()).unwrap();
                if turn == 64 {
                    started.send(()).unwrap();
                }
            }
        });
        written.recv().unwrap();
        target::tell("writes");
        // SAFETY: it ends this thread, and nothing of it is used any more.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    if !can_track(None) {
        return;
    }
    let target = target::Target::start_alone(ME, "run");
    assert_eq!(target.hear(), "writes");
    pageferry_testing::wait_for("the first thread's end", || target.state() == 'Z');
    let process = Process::open(target.pid()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path()).unwrap();
    let options = Options {
        rounds: 2,
        downtime: Default::default(),
        leave_stopped: true,
        ..Options::default()
    };
    let report = checkpoint(&process, &mut destination, &options, &mut silent).unwrap();
    assert_eq!(report.rounds.len(), 3);
    assert!(compare(&process, &verify(directory.path())) > 64);
}

/// Without room for the last image the process goes on, though it was to be left stopped.
#[test]
fn a_full_disk_leaves_nobody_stopped() {
    if !can_track(None) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(_disk) = common::disk::small_disk(directory.path(), 4 << 20) else { return };
    let mut target = Target::start("writes");
    let mut destination = Directory::open(directory.path()).unwrap();
    let options = Options { rounds: 0, leave_stopped: true, ..Options::default() };
    let error = checkpoint(&target.process(), &mut destination, &options, &mut silent).unwrap_err();
    assert!(matches!(error.why, Why::Destination(_)), "{error}");
    target.assert_runs();
    // Nor does somebody who ends it when the image is complete.
    let directory = tempfile::tempdir().unwrap();
    let mut destination = Directory::open(directory.path()).unwrap();
    let mut ends = |event| !matches!(event, Event::Completed(_));
    let error = checkpoint(&target.process(), &mut destination, &options, &mut ends).unwrap_err();
    assert!(matches!(error.why, Why::Stopped), "{error}");
    verify(directory.path());
    target.assert_runs();
}

/// Without room for the next image, the one before stays, and the process goes on.
#[test]
fn a_full_disk() {
    if !can_track(None) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let Some(_mount) = common::disk::small_disk(directory.path(), 64 << 20) else { return };
    let mut target = Target::start("writes");
    let mut destination = Directory::open(directory.path()).unwrap();
    let options = Options { rounds: 50, downtime: Default::default(), ..Options::default() };
    let error = checkpoint(&target.process(), &mut destination, &options, &mut silent).unwrap_err();
    assert!(matches!(error.why, Why::Destination(_)), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    let images = list(directory.path()).unwrap();
    assert_eq!(images.len(), error.round as usize);
    assert_eq!(error.last_complete, images.last().map(|image| image.path.display().to_string()));
    verify(directory.path());
    target.assert_runs();
}
