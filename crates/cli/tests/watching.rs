//! Commands that report without end, and what they cannot see.

#[path = "common/chain.rs"]
mod chain;
mod common;
#[path = "common/writer.rs"]
mod writer;

use std::net::TcpStream;

use chain::{Saying, images, is_stored, lines, of, of_event, receiver, verify};
use common::{Running, expect_code, run, text};
use rustix::process::Signal;
use serde_json::Value;
use writer::{PAGES, Writer, can_track, can_track_asynchronously};

/// Not a test: what the children of the others do.
#[test]
fn writer() {
    writer::run();
}

/// Memory that another tracker has is not said to be written to by nobody.
#[test]
fn what_cannot_be_tracked_is_said() {
    if !can_track_asynchronously() {
        return;
    }
    let writer = Writer::start();
    let args = "--json dirty --method wp-async --interval 20ms";
    let mut first = Saying::start(&mut of(&writer, args));
    let all = first.next();
    assert_eq!(all["untracked_bytes"], 0);
    assert!(all["mappings"].as_array().expect("mappings").iter().all(|one| one["tracked"] == true));

    let output = run(&mut of(&writer, &format!("{args} --for 100ms")));
    expect_code(&output, 0);
    let said = text(&output);
    assert_eq!(said.matches("cannot be tracked with wp-async").count(), 1, "{said}");
    let sample = lines(&output).pop().expect("a sample");
    let bytes = |value: &Value| value.as_u64().expect("bytes");
    let size = |mapping: &Value| bytes(&mapping["end"]) - bytes(&mapping["start"]);
    let mappings = sample["mappings"].as_array().expect("mappings");
    let untracked: Vec<_> = mappings.iter().filter(|one| one["tracked"] == false).collect();
    let total: u64 = untracked.iter().map(|one| size(one)).sum();
    assert_eq!(bytes(&sample["untracked_bytes"]), total);
    assert!(untracked.iter().any(|one| size(one) >= (PAGES * 4096) as u64), "{sample}");

    let output = run(&mut of(&writer, "dirty --method wp-async --interval 50ms --for 50ms"));
    expect_code(&output, 0);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    let large = table.lines().find(|line| line.contains("  32 MiB") || line.contains("32.0 MiB"));
    assert!(large.is_some_and(|line| line.ends_with("not tracked")), "{table}");
    assert!(table.trim_end().ends_with(" not tracked"), "{table}");

    // Nor that it has changed, when it is only not known.
    let folder = tempfile::tempdir().expect("a folder");
    let args = "checkpoint --method wp-async --rounds 1 --downtime 0s";
    let output = run(of(&writer, args).arg("--to").arg(folder.path()));
    expect_code(&output, 0);
    let rounds = String::from_utf8_lossy(&output.stdout).into_owned();
    let rounds: Vec<&str> = rounds.lines().collect();
    assert!(!rounds[0].contains("not tracked"), "{rounds:#?}");
    assert!(rounds[1].contains("MiB new or not tracked, taken whole)"), "{rounds:#?}");

    first.running.signal(Signal::INT);
    expect_code(&first.end(), 0);
    writer.assert_untouched();
}

/// As with `| head`.
#[test]
fn watching_ends_when_nobody_reads() {
    if !can_track_asynchronously() {
        return;
    }
    let writer = Writer::start();
    let mut often = Saying::start(&mut of(&writer, "--json dirty --interval 20ms"));
    often.next();
    expect_code(&often.unread().end(), 0);
    writer.assert_untouched();
    // Long before the first sample, and where nothing is said before the end.
    for args in ["--json dirty --interval 1d", "dirty"] {
        let mut running = Running::start_unread(of(&writer, args).args(["--method", "wp-async"]));
        let stdout = running.take_stdout();
        running.wait_until("it is tracked", |_| writer.is_registered().then_some(()));
        drop(stdout);
        expect_code(&running.end(), 0);
        writer.assert_untouched();
    }
}

/// What it makes is wanted all the same.
#[test]
fn a_checkpoint_goes_on_when_nobody_reads() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let args = "--json checkpoint --rounds 5 --downtime 0s";
    let mut checkpoint = Saying::start(of(&writer, args).arg("--to").arg(folder.path()));
    checkpoint.next();
    expect_code(&checkpoint.unread().end(), 0);
    assert_eq!(images(folder.path()).len(), 6);
    verify(folder.path());
    writer.assert_untouched();
}

#[test]
fn receiving_ends_when_nobody_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    for options in ["", "--once"] {
        let (receiver, _) = receiver(options, folder.path());
        expect_code(&receiver.unread().end(), 0);
    }
    if !can_track() {
        return;
    }
    // A sender that is there is served to its end.
    let writer = Writer::start();
    for options in ["", "--once"] {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut receiver, address) = receiver(options, folder.path());
        let args = format!("--json checkpoint --rounds 10 --downtime 0s --to {address}");
        let checkpoint = Running::start(&mut of(&writer, &args));
        receiver.wait_for(is_stored);
        let receiver = receiver.unread();
        let output = checkpoint.end();
        expect_code(&output, 0);
        assert_eq!(of_event(&lines(&output), "round").len(), 11);
        expect_code(&receiver.end(), 0);
        assert_eq!(images(folder.path()).len(), 11);
        verify(folder.path());
    }
}

/// Those who connect and say nothing do not keep a true sender out.
#[test]
fn a_sender_comes_in_past_silent_connections() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (receiver, address) = receiver("--once", folder.path());
    let _silent = [(); 2].map(|()| TcpStream::connect(&address).expect("it listens"));
    let args = format!("checkpoint --rounds 0 --to {address}");
    expect_code(&run(&mut of(&writer, &args)), 0);
    expect_code(&receiver.end(), 0);
    assert_eq!(images(folder.path()).len(), 1);
}
