//! `pageferry migrate`: guests that move from process to process, or fail to.

mod common;
mod vm_common;

use common::{json, text};
use rustix::process::Signal;
use serde_json::Value;
use vm_common::{Here, Process, able};

/// So slow that pre-copy does not end by itself.
const SLOW: &str = "--mode pre --compress none --bandwidth 1MiB";

fn totals(lines: &[Value]) -> &Value {
    let last = lines.last().expect("a line");
    assert_eq!(last["event"], "ended", "{lines:#?}");
    last
}

/// Waits until the guest runs there with all of its memory, and has got on.
fn arrived(here: &Here, receiver: &mut Process) {
    let ended = receiver.wait_for("ended");
    assert_eq!((&ended["outcome"], &ended["guest"]), (&"completed".into(), &"here".into()));
    here.goes_on(&receiver.name);
}

/// Moves the idle guest of the one to the other, and waits until it runs there. Most of its memory
/// has not come by then, and will not for a while.
fn moved_early(here: &Here, receiver: &mut Process) -> Process {
    let slow = "--mode post --compress none --background-bandwidth 2MiB";
    let mut migrating = here.migrate("a", receiver, slow);
    receiver.wait_for("running");
    migrating.wait_for("progress");
    migrating
}

/// The migration that is under way, once pages are copied.
fn copying(here: &Here, receiver: &Process) -> Process {
    let mut migrating = here.migrate("a", receiver, SLOW);
    migrating.wait_for("stage");
    assert_eq!(here.status("a")["state"], "moving");
    migrating
}

#[test]
fn in_every_mode_there_and_back() {
    if !able() {
        return;
    }
    let here = Here::new();
    for (mode, behaviour) in [
        ("pre", "random-write --rate 20"),
        ("post", "random-read"),
        ("hybrid", "linear-write --rate 50"),
    ] {
        let mut at = here.guest("a", &format!("--behaviour {behaviour}"));
        here.goes_on("a");
        for (from, to) in [("a", "b"), ("b", "a")] {
            let mut receiver = here.receiver(to, "");
            let lines = here.migrate(from, &receiver, &format!("--mode {mode}")).end(0);
            at.left("moved");
            let ended = totals(&lines);
            assert_eq!(
                (&ended["outcome"], &ended["guest"]),
                (&"completed".into(), &"there".into())
            );
            assert!(ended["bytes"].as_u64() >= Some(1 << 20), "{ended}");
            assert!(ended["downtime_ms"].as_f64() > Some(0.0), "{ended}");
            let rounds = lines.iter().filter(|line| line["event"] == "round").count() as u64;
            assert_eq!(ended["rounds"], rounds, "{lines:#?}");
            assert_eq!(rounds == 0, mode == "post");
            arrived(&here, &mut receiver);
            let list = json(&here.run("vm list", 0));
            assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
            at = receiver;
        }
        if mode == "post" {
            let ended = at.find("ended").expect("it arrived");
            let faults = &ended["faults"];
            assert!(faults["faults"].as_u64() > Some(0), "{ended}");
            assert!(faults["p99_us"].as_f64() >= faults["p50_us"].as_f64(), "{ended}");
        }
        here.stop(at);
        assert!(here.sockets().is_empty());
    }
}

#[test]
fn by_other_ways_and_to_other_memory() {
    if !able() {
        return;
    }
    let here = Here::new();
    let folder = tempfile::tempdir().expect("a directory");
    let guest = here.guest("a", "--vcpus 1 --rate 20 --setup missing --tracking protection");
    let listen = format!("unix:{}", folder.path().join("socket").display());
    let args = format!("vm receive --name b --listen {listen} --setup minor-own-view");
    let mut receiver = here.start("b", &args, "listening");
    let more = "--connections 4 --demand-connections 2 --compress zstd --downtime 50ms \
                --timeout 10s --otherwise post-copy --background-bandwidth 64MiB/s";
    here.migrate("a", &receiver, more).end(0);
    guest.left("moved");
    arrived(&here, &mut receiver);
    here.stop(receiver);
}

#[test]
fn called_off_by_command_or_by_signal_it_goes_on() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let receiver = here.receiver("b", "");
    let migrating = copying(&here, &receiver);
    let status = json(&here.run("migrate status a", 0));
    assert_eq!((&status["event"], &status["stage"]), (&"progress".into(), &"round-1".into()));
    here.run("migrate cancel a", 0);
    let lines = migrating.end(1);
    let outcome = &lines[lines.len() - 2];
    assert_eq!((&outcome["outcome"], &outcome["guest"]), (&"cancelled".into(), &"here".into()));
    let refused = receiver.end(1);
    assert!(refused.iter().any(|line| line["outcome"] == "cancelled"), "{refused:#?}");
    here.goes_on("a");
    let status = json(&here.run("migrate status a", 0));
    assert_eq!(status["outcome"], "cancelled", "{status}");
    assert!(text(&here.run("migrate cancel a", 1)).contains("not being moved"));

    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let receiver = here.receiver("b", "");
        let migrating = copying(&here, &receiver);
        migrating.running.signal(signal);
        migrating.end(code);
        receiver.end(1);
        here.goes_on("a");
    }
    here.stop(guest);
    assert!(here.sockets().is_empty());
}

#[test]
fn signals_at_either_side() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let receiver = here.receiver("b", "");
    let migrating = copying(&here, &receiver);
    receiver.running.signal(Signal::INT);
    receiver.end(130);
    let lines = migrating.end(4);
    assert_eq!(lines[lines.len() - 2]["guest"], "here", "{lines:#?}");
    here.goes_on("a");

    let receiver = here.receiver("b", "");
    let migrating = copying(&here, &receiver);
    guest.running.signal(Signal::INT);
    guest.left("stopped");
    migrating.end(1);
    receiver.end(1);
    assert!(here.sockets().is_empty());
}

#[test]
fn a_destination_that_is_killed_or_not_there_costs_nothing() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let receiver = here.receiver("b", "");
    let address = receiver.address();
    let migrating = copying(&here, &receiver);
    receiver.running.signal(Signal::KILL);
    let lines = migrating.end(4);
    let outcome = &lines[lines.len() - 2];
    assert_eq!((&outcome["outcome"], &outcome["guest"]), (&"failed".into(), &"here".into()));
    here.goes_on("a");
    // Nobody listens there any more.
    let output = here.run(&format!("migrate --from a --to {address}"), 4);
    assert!(text(&output).contains("goes on where it was"), "{output:?}");
    here.goes_on("a");
    drop(receiver);
    let mut receiver = here.receiver("b", "");
    here.migrate("a", &receiver, "").end(0);
    guest.left("moved");
    arrived(&here, &mut receiver);
    here.stop(receiver);
    assert!(here.sockets().is_empty());
}

#[test]
fn a_source_that_is_killed_before_the_guest_moves_is_lost_to_its_receiver() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let receiver = here.receiver("b", "");
    let migrating = copying(&here, &receiver);
    guest.running.signal(Signal::KILL);
    migrating.end(4);
    receiver.end(4);
}

#[test]
fn one_at_a_time_and_now_if_it_is_asked_for() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let mut receiver = here.receiver("b", "");
    let migrating = copying(&here, &receiver);
    let address = receiver.address();
    let output = here.run(&format!("migrate --from a --to {address}"), 1);
    assert!(text(&output).contains("being moved already"), "{output:?}");
    let output = here.run(&format!("migrate --from b --to {address}"), 1);
    assert!(text(&output).contains("no guest here yet"), "{output:?}");
    here.run("migrate postcopy a", 0);
    migrating.end(0);
    guest.left("moved");
    arrived(&here, &mut receiver);
    here.stop(receiver);
}

#[test]
fn while_memory_arrives_nothing_else_is_done_and_a_loss_can_be_mended() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--behaviour idle");
    let mut receiver = here.receiver("b", "");
    let migrating = moved_early(&here, &mut receiver);
    let status = here.status("b");
    assert_eq!(status["state"], "completing", "{status}");
    assert_eq!(here.status("a")["state"], "moved");
    let refused = [
        ("migrate cancel a", "too late"),
        ("vm stop a", "still needed"),
        ("vm stop b", "still arriving"),
        ("migrate --from b --to 127.0.0.1:1", "still arriving"),
        ("migrate reclaim a", "cannot be taken back"),
    ];
    for (command, why) in refused {
        let output = here.run(command, 1);
        assert!(text(&output).contains(why), "{command}: {output:?}");
    }
    let said = json(&here.run("migrate recover b --at 127.0.0.1:0", 0));
    let said = said["said"].as_str().expect("a text");
    let address = said.rsplit(' ').next().expect("an address");
    here.run(&format!("migrate recover a --at {address}"), 0);
    receiver.wait_for("resumed");
    let lines = migrating.end(0);
    assert!(lines.iter().any(|line| line["event"] == "resumed"), "{lines:#?}");
    guest.left("moved");
    arrived(&here, &mut receiver);
    here.stop(receiver);
}

#[test]
fn signals_while_memory_arrives_are_kept_until_it_has() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--behaviour idle");
    let mut receiver = here.receiver("b", "");
    let migrating = moved_early(&here, &mut receiver);
    guest.running.signal(Signal::INT);
    receiver.running.signal(Signal::TERM);
    // This one does not end anything but itself.
    migrating.running.signal(Signal::INT);
    let lines = migrating.end(130);
    assert!(lines.iter().all(|line| line["event"] != "ended"), "{lines:#?}");
    guest.left("moved");
    let lines = receiver.end(0);
    let [.., ended, left] = &lines[..] else { panic!("{lines:#?}") };
    assert_eq!((&ended["outcome"], &left["why"]), (&"completed".into(), &"stopped".into()));
    assert!(here.sockets().is_empty());
}

#[test]
fn what_is_lost_with_one_side_is_said() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--behaviour idle");
    let mut receiver = here.receiver("b", "");
    let mut migrating = moved_early(&here, &mut receiver);
    receiver.running.signal(Signal::KILL);
    migrating.wait_for("lost");
    let output = here.run("migrate reclaim a", 1);
    assert!(text(&output).contains("cannot be taken back"), "{output:?}");
    here.run("migrate give-up a", 0);
    let lines = migrating.end(4);
    let outcome = &lines[lines.len() - 2];
    assert_eq!((&outcome["outcome"], &outcome["guest"]), (&"failed".into(), &"lost".into()));
    let lines = guest.end(4);
    assert!(lines.iter().any(|line| line["why"] == "lost"), "{lines:#?}");
    drop(receiver);

    let guest = here.guest("a", "--behaviour idle");
    let mut receiver = here.receiver("b", "");
    let migrating = moved_early(&here, &mut receiver);
    guest.running.signal(Signal::KILL);
    migrating.end(4);
    receiver.wait_for("lost");
    let status = json(&here.run("migrate status b", 0));
    assert_eq!(status["stage"], "paused", "{status}");
    here.run("migrate abandon b", 0);
    let ended = receiver.wait_for("ended");
    assert_eq!((&ended["outcome"], &ended["guest"]), (&"failed".into(), &"here".into()));
    // It runs until it touches what never came.
    let lines = receiver.end(1);
    assert!(lines.iter().any(|line| line["why"] == "by-itself"), "{lines:#?}");
    // The socket of the one that was killed is removed by whoever comes across it.
    assert_eq!(json(&here.run("vm list", 0)), Value::Array(Vec::new()));
    assert!(here.sockets().is_empty());
}
