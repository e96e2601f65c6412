//! `pageferry dirty`, `checkpoint`, `receive` and `image`, on a process that writes all the time.

#[path = "common/chain.rs"]
mod chain;
mod common;
#[path = "common/nobody.rs"]
mod nobody;
#[path = "common/writer.rs"]
mod writer;

use std::{fs, path::Path};

use chain::{Saying, images, is_stored, lines, named, of, of_event, receiver, verify};
use common::{Running, expect_code, host::is_root, json, pageferry, run, text, words};
use nobody::ForNobody;
use rustix::process::Signal;
use serde_json::Value;
use writer::{HOT, PAGES, Writer, can_track};

/// Not a test: what the children of the others do.
#[test]
fn writer() {
    writer::run();
}

#[test]
fn dirty_shows_what_is_written_and_where() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let output = run(&mut of(&writer, "--json dirty --interval 50ms --for 1s"));
    expect_code(&output, 0);
    let samples = lines(&output);
    assert!((5..=20).contains(&samples.len()), "{} samples", samples.len());
    let last = samples.last().expect("a sample");
    // On a busy machine it may have come to a part of them only.
    let hot = (HOT * 4096) as u64;
    let most = last["mappings"]
        .as_array()
        .expect("mappings")
        .iter()
        .max_by_key(|mapping| mapping["dirty_set_bytes"].as_u64())
        .expect("a mapping");
    let set = most["dirty_set_bytes"].as_u64().expect("bytes");
    assert!((hot / 8..=hot + 8192).contains(&set), "{set} of {hot}");
    let size = most["end"].as_u64().expect("an end") - most["start"].as_u64().expect("a start");
    assert!(size >= (PAGES * 4096) as u64);
    // It writes at the beginning of its memory only.
    let heat: Vec<u64> =
        most["heat"].as_array().expect("heat").iter().filter_map(Value::as_u64).collect();
    assert_eq!(heat.len(), 32);
    assert!(heat[4..].iter().all(|pages| *pages == 0), "{heat:?}");
    assert!(samples.iter().any(|sample| sample["bytes_per_s"].as_f64() > Some(0.0)));
    assert!(last["dirty_set_bytes"].as_u64() >= Some(set));
    writer.assert_untouched();
}

#[test]
fn dirty_ends_with_the_process() {
    if !can_track() {
        return;
    }
    let mut writer = Writer::start();
    let mut dirty = Saying::start(&mut of(&writer, "--json dirty --interval 10ms"));
    dirty.next();
    writer.end();
    let output = dirty.end();
    expect_code(&output, 0);
    assert!(text(&output).contains("has ended"), "{output:?}");
}

#[test]
fn whatever_ends_it_the_process_goes_on_untouched() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    for (signal, code) in [(Signal::INT, Some(0)), (Signal::TERM, Some(0)), (Signal::KILL, None)] {
        let mut dirty = Saying::start(&mut of(&writer, "--json dirty --interval 5ms"));
        dirty.next();
        dirty.running.signal(signal);
        let output = dirty.end();
        assert_eq!(output.status.code(), code, "{signal:?}: {output:?}");
        writer.assert_untouched();
    }
}

#[test]
fn processes_that_cannot_be_tracked() {
    // The second process is the kernel's, where it is not somebody's container.
    for (pid, code, why) in [("0", 2, "invalid"), ("4194305", 1, "none"), ("4294967295", 2, "pid")]
    {
        for command in ["dirty", "checkpoint --to /nonexistent/directory"] {
            let output = run(pageferry(words(command)).args(["--pid", pid]));
            expect_code(&output, code);
            assert!(text(&output).contains(why), "{command} {pid}: {}", text(&output));
        }
    }
    if !is_root() {
        println!("skipped: needs root, to have processes of two users");
        return;
    }
    let writer = Writer::start();
    let pid = writer.pid().to_string();
    let nobody = ForNobody::new();
    for command in ["dirty", "checkpoint --to /tmp"] {
        let output = run(nobody.command(words(command)).args(["--pid", &pid]));
        expect_code(&output, 3);
        assert!(text(&output).contains("CAP_SYS_PTRACE"), "{}", text(&output));
    }
    writer.assert_untouched();
}

#[test]
fn a_checkpoint_and_what_can_be_done_with_it() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("chain");
    let args = "--json checkpoint --rounds 3 --downtime 0s";
    let output = run(of(&writer, args).arg("--to").arg(&directory));
    expect_code(&output, 0);
    writer.assert_untouched();
    let lines = lines(&output);
    assert_eq!(of_event(&lines, "attached").len(), 1);
    let rounds = of_event(&lines, "round");
    assert_eq!(rounds.len(), 4);
    for (number, round) in rounds.iter().enumerate() {
        assert_eq!(
            (round["round"].as_u64(), &round["last"]),
            (Some(number as u64), &(number == 3).into())
        );
        assert_eq!(round["stopped_ms"].as_f64() > Some(0.0), number > 0, "{round}");
    }
    let all = rounds[0]["changed_bytes"].as_u64().expect("bytes");
    assert!(all >= (PAGES * 4096) as u64);
    assert!(rounds[1..].iter().all(|round| round["changed_bytes"].as_u64() < Some(all / 4)));
    let complete = of_event(&lines, "complete");
    assert_eq!(complete[0]["image"], rounds[3]["image"]);

    let images = images(&directory);
    assert_eq!(images.len(), 4);
    verify(&directory);
    let info = json(&run(pageferry(["--json", "image", "info"]).arg(&images[3])));
    assert_eq!(info["metadata"]["pid"], writer.pid().to_string());
    assert_eq!((&info["metadata"]["moment"], &info["ancestors"]), (&"one".into(), &3.into()));
    assert_eq!(info["id"], rounds[3]["id"]);
    let names: Vec<&str> = info["mappings"]
        .as_array()
        .expect("mappings")
        .iter()
        .filter_map(|mapping| mapping["name"].as_str())
        .collect();
    assert!(names.contains(&"[stack]") && names.contains(&"[heap]"), "{names:?}");

    let whole = folder.path().join("whole.pfi");
    let output = run(pageferry(["--json", "image", "flatten"]).arg(&directory).arg(&whole));
    expect_code(&output, 0);
    assert_eq!(json(&output)["parent"], Value::Null);
    let differ = |a: &Path, b: &Path| {
        let output = run(pageferry(["--json", "image", "diff"]).arg(a).arg(b));
        expect_code(&output, 0);
        json(&output)["differing_bytes"].as_u64().expect("bytes")
    };
    assert_eq!(differ(&directory, &whole), 0);
    let changed = differ(Path::new(&images[0]), &whole);
    assert!(changed > 0 && changed < all / 4, "{changed} of {all}");
    // Text, for people.
    for args in [["ls"].as_slice(), &["verify"], &["diff", &images[0]]] {
        let output = run(pageferry(["image"]).args(args).arg(&directory));
        expect_code(&output, 0);
        assert!(!output.stdout.is_empty(), "{args:?}");
    }
    // There is something already.
    let output = run(pageferry(["image", "flatten"]).arg(&directory).arg(&whole));
    expect_code(&output, 1);
    assert!(text(&output).contains("whole.pfi"), "{}", text(&output));

    // One bit.
    let mut bytes = fs::read(&images[1]).expect("the image");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&images[1], bytes).expect("written");
    let output = run(pageferry(["--json", "image", "verify"]).arg(&directory));
    expect_code(&output, 1);
    let report = json(&output);
    let said = report["damage"][0]["error"].as_str().or(report["error"].as_str());
    assert!(said.expect("what is wrong").contains("checkpoint-0001.pfi"), "{report}");
    // And a parent that is not there.
    fs::remove_file(&images[0]).expect("removed");
    let output = run(pageferry(["--json", "image", "ls"]).arg(&directory));
    expect_code(&output, 1);
    assert_eq!(json(&output)["images"][0]["parent_state"], "missing");
    let output = run(pageferry(["image", "verify"]).arg(&directory));
    expect_code(&output, 1);
    assert!(text(&output).contains("checkpoint-0000.pfi"), "{}", text(&output));
}

/// What is meant for an address is never written to this disk.
#[test]
fn addresses_with_mistakes_in_them_are_no_directories() {
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoint = |to: &str| {
        let mut command = of(&writer, "checkpoint --rounds 0");
        run(command.args(["--to", to]).current_dir(folder.path()))
    };
    for to in ["192.0.2.7:99999", "localhost:http", "::1:7777", "unix:", "host:"] {
        let output = checkpoint(to);
        expect_code(&output, 2);
        let said = text(&output);
        assert!(said.contains(to) && said.contains("host:port"), "{said}");
        assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 0, "{to}");
    }
    if !can_track() {
        return;
    }
    for to in ["./192.0.2.7:99999", "192.0.2.7:99999"] {
        expect_code(&checkpoint(to), 0);
    }
    assert_eq!(images(&folder.path().join("192.0.2.7:99999")).len(), 2);
}

/// The second is a chain of its own, and the one that is meant.
#[test]
fn two_checkpoints_in_one_directory() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    for _ in 0..2 {
        let args = "checkpoint --rounds 1 --downtime 0s";
        expect_code(&run(of(&writer, args).arg("--to").arg(folder.path())), 0);
    }
    assert_eq!(images(folder.path()).len(), 4);
    for command in ["verify", "info"] {
        let output = run(pageferry(["image", command]).arg(folder.path()));
        expect_code(&output, 0);
        let said = text(&output);
        assert!(said.contains("2 chains") && said.contains("checkpoint-0003.pfi"), "{said}");
    }
}

#[test]
fn a_stop_that_is_not_possible_is_refused_before_anything_is_copied() {
    if !can_track() {
        return;
    }
    // It is in the group of this process.
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("chain");
    let output = run(of(&writer, "checkpoint --stop cgroup --rounds 2").arg("--to").arg(&to));
    expect_code(&output, 1);
    assert!(text(&output).contains("cannot be stopped by its control group"), "{output:?}");
    assert!(!to.exists());
    writer.assert_untouched();
}

#[test]
fn left_stopped() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let output = run(of(&writer, "checkpoint --leave-stopped").arg("--to").arg(folder.path()));
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("kill -CONT"), "{output:?}");
    assert_eq!(writer.state(), 'T');
    writer.signal(Signal::CONT);
    writer.assert_untouched();
}

#[test]
fn on_ctrl_c_it_says_what_is_complete() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let args = "--json checkpoint --rounds 1000000 --downtime 0s";
    let mut checkpoint = Saying::start(of(&writer, args).arg("--to").arg(folder.path()));
    // That it is attached, and two rounds.
    for _ in 0..3 {
        checkpoint.next();
    }
    checkpoint.running.signal(Signal::INT);
    let output = checkpoint.end();
    expect_code(&output, 130);
    writer.assert_untouched();
    let images = images(folder.path());
    assert!(images.len() >= 2);
    assert!(text(&output).contains(images.last().expect("an image")), "{}", text(&output));
    verify(folder.path());
}

#[test]
fn over_the_network() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (receiver, address) = receiver("--once", folder.path());
    let args = format!("--json checkpoint --rounds 3 --downtime 0s --to {address}");
    let output = run(&mut of(&writer, &args));
    expect_code(&output, 0);
    expect_code(&receiver.end(), 0);
    writer.assert_untouched();
    verify(folder.path());
    let sent = lines(&output);
    let ids: Vec<&Value> = of_event(&sent, "round").iter().map(|round| &round["id"]).collect();
    let report = json(&run(pageferry(["--json", "image", "ls"]).arg(folder.path())));
    let stored: Vec<&Value> =
        report["images"].as_array().expect("images").iter().map(|image| &image["id"]).collect();
    assert_eq!(stored, ids, "the images have the identities that they were sent with");
    // Nobody is there any more.
    let output = run(&mut of(&writer, &args));
    expect_code(&output, 4);
}

#[test]
fn a_receiver_that_dies() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (mut receiver, address) = receiver("", folder.path());
    let args = format!("checkpoint --rounds 1000000 --downtime 0s --to {address}");
    let checkpoint = Running::start(&mut of(&writer, &args));
    receiver.wait_for(is_stored);
    receiver.wait_for(is_stored);
    receiver.running.signal(Signal::KILL);
    let output = checkpoint.end();
    expect_code(&output, 4);
    writer.assert_untouched();
    // It may have stored one more than it could tell.
    let stored = json(&run(pageferry(["--json", "image", "ls"]).arg(folder.path())));
    let ids = stored["images"].as_array().expect("images").iter().rev().take(2);
    let named = named(&output).expect("two were stored");
    let (id, peer) = named.split_once(" at ").expect("where it is");
    assert!(ids.into_iter().any(|image| image["id"] == id), "{named} of {stored}");
    assert_eq!(peer, address);
    assert!(images(folder.path()).len() >= 2);
    verify(folder.path());
}

#[test]
fn a_sender_that_dies() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let (mut receiver, address) = receiver("--once", folder.path());
    let args = format!("checkpoint --rounds 1000000 --downtime 0s --to {address}");
    let checkpoint = Running::start(&mut of(&writer, &args));
    receiver.wait_for(is_stored);
    checkpoint.signal(Signal::KILL);
    let _ = checkpoint.end();
    let output = receiver.end();
    expect_code(&output, 4);
    writer.assert_untouched();
    assert!(!images(folder.path()).is_empty());
    verify(folder.path());
    // Nothing but images is left.
    for entry in fs::read_dir(folder.path()).expect("the folder") {
        let name = entry.expect("an entry").file_name();
        assert!(name.to_string_lossy().ends_with(".pfi"), "{name:?}");
    }
}

#[test]
fn a_receiver_goes_on_until_it_is_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let (receiver, _) = receiver("", folder.path());
    receiver.running.signal(Signal::TERM);
    expect_code(&receiver.end(), 0);
}
