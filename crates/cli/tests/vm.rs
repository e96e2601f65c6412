//! `pageferry vm`: guests, their control sockets, and how they end.

mod common;
mod vm_common;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
};

use common::{json, text, wait_for};
use rustix::process::Signal;
use serde_json::Value;
use vm_common::{Here, able};

#[test]
fn a_guest_runs_until_it_is_stopped() {
    if !able() {
        return;
    }
    let here = Here::new();
    assert_eq!(json(&here.run("vm list", 0)), Value::Array(Vec::new()));
    let behaviours = ["idle", "random-read", "random-write --rate 20", "linear-write --rate 20"];
    for behaviour in behaviours {
        let guest = here.guest("a", &format!("--behaviour {behaviour}"));
        let sockets = here.sockets();
        let [socket] = &sockets[..] else { panic!("{sockets:?}") };
        let mode = std::fs::metadata(socket).expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        here.goes_on("a");
        let list = json(&here.run("vm list", 0));
        assert_eq!((&list[0]["name"], &list[1]), (&"a".into(), &Value::Null));
        assert_eq!(list[0]["memory_bytes"], 16 << 20);
        here.stop(guest);
        assert!(here.sockets().is_empty(), "{behaviour}");
    }
    let output = here.run("vm status a", 1);
    assert!(text(&output).contains("there is no guest a"), "{output:?}");
    here.run("vm stop a", 1);
    here.run("migrate status a", 1);
}

#[test]
fn signals_stop_it_too() {
    if !able() {
        return;
    }
    let here = Here::new();
    for signal in [Signal::INT, Signal::TERM] {
        let guest = here.guest("a", "--rate 20");
        here.goes_on("a");
        guest.running.signal(signal);
        guest.left("stopped");
        assert!(here.sockets().is_empty());
    }
    let waiting = here.receiver("a", "");
    assert_eq!(here.status("a")["state"], "waiting");
    waiting.running.signal(Signal::INT);
    waiting.end(130);
    let waiting = here.receiver("a", "");
    here.run("vm stop a", 0);
    waiting.end(0);
    assert!(here.sockets().is_empty());
}

#[test]
fn a_name_is_one_guests_until_its_process_has_gone() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    for more in ["vm run --name a --memory 16MiB", "vm receive --name a --listen 127.0.0.1:0"] {
        let output = here.run(more, 1);
        assert!(text(&output).contains("already"), "{output:?}");
    }
    here.goes_on("a");
    guest.running.signal(Signal::KILL);
    wait_for("the process's end", || {
        // What it left behind is no guest, and is removed by whoever comes across it.
        let list = json(&here.run("vm list", 0));
        (list == Value::Array(Vec::new()) && here.sockets().is_empty()).then_some(())
    });
    let guest = here.guest("a", "--rate 20");
    here.stop(guest);
}

#[test]
fn what_makes_no_guest() {
    let here = Here::new();
    for wrong in [
        "--name a/b",
        "--name ..",
        "--name a --rate 5 --behaviour idle",
        "--name a --vcpus 0",
        "--name a --memory 0",
        "--name a --memory 4097",
        "--name a --rate 0",
        "--name a --behaviour sleep",
    ] {
        here.run(&format!("vm run {wrong}"), 2);
    }
    here.run("vm receive --name a --listen nowhere", 2);
    here.run("migrate --from a", 2);
    here.run("migrate --from a --to nowhere", 2);
    here.run("migrate --from a --to b:1 --connections 33", 2);
    here.run("migrate --from a --to b:1", 1);
    assert!(here.sockets().is_empty());
}

#[test]
fn a_directory_that_others_can_write_to_is_not_used() {
    let folder = tempfile::tempdir().expect("a directory");
    let place = folder.path().join("pageferry");
    std::fs::create_dir(&place).expect("a directory");
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o777)).expect("its mode");
    let mut command = common::pageferry(["vm", "list"]);
    let output = common::run(command.env("XDG_RUNTIME_DIR", folder.path()));
    common::expect_code(&output, 1);
    assert!(text(&output).contains("only this user's"), "{output:?}");
}

#[test]
fn what_is_no_request_is_refused() {
    if !able() {
        return;
    }
    let here = Here::new();
    let guest = here.guest("a", "--rate 20");
    let [socket] = &here.sockets()[..] else { panic!("one socket") };
    let long = format!("{{\"do\":\"{}\"}}", "x".repeat(70_000));
    let migrate = r#"{"do":"migrate","to":"127.0.0.1:1","mode":"sideways","connections":1,
        "demand_connections":1,"compress":"auto","downtime_ms":1,"timeout_ms":1,"rounds":1,
        "otherwise":"switch"}"#
        .replace('\n', "");
    for request in [
        "",
        "{}",
        "\u{1}\u{2}",
        r#"{"do":"dance"}"#,
        r#"{"do":"recover","at":"nowhere"}"#,
        r#"{"do":"recover","at":"127.0.0.1:1"}"#,
        r#"{"do":"cancel"}"#,
        r#"{"do":"reclaim"}"#,
        r#"{"do":"give-up"}"#,
        r#"{"do":"abandon"}"#,
        r#"{"do":"post-copy"}"#,
        r#"{"do":"migration"}"#,
        r#"{"do":"migrate","to":"127.0.0.1:1"}"#,
        &migrate,
        &long,
    ] {
        let mut stream = UnixStream::connect(socket).expect("a connection");
        // Of what is too long not all is read.
        let _ = stream.write_all(format!("{request}\n").as_bytes());
        let mut answer = String::new();
        match BufReader::new(stream).read_line(&mut answer) {
            Ok(_) => {
                let answer: Value = serde_json::from_str(&answer).expect("an answer");
                assert_eq!(answer["reply"], "refused", "{request}: {answer}");
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{request}");
            }
        }
    }
    // One that never says anything is in nobody's way.
    let silent = UnixStream::connect(socket).expect("a connection");
    here.goes_on("a");
    here.stop(guest);
    drop(silent);
}
