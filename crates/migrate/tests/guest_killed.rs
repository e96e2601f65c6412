//! One side is killed, as by the operator of its host.

mod guest_common;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use guest_common::*;
use pageferry_memory::Backing;
use pageferry_migrate::{Endpoint, Mode, ReceiveOptions, Stage};
use pageferry_testing::{features, wait_for, watch};

const MIB: u64 = 1 << 20;
const ROLE: &str = "PAGEFERRY_TEST_ROLE";

fn able() -> bool {
    let needed = pageferry_uffd::Features::WP_ASYNC | pageferry_uffd::Features::POISON;
    features(needed)
}

/// A process that ends with the test.
struct Other(Child);

impl Other {
    /// Runs `test` of this binary again, in another role.
    fn new(test: &str, role: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Where it listens, as it says.
    fn endpoint(&mut self) -> Endpoint {
        let out = BufReader::new(self.0.stdout.take().unwrap());
        let said = out.lines().map(Result::unwrap).find_map(|line| {
            line.split_once("listening at ").map(|(_, endpoint)| endpoint.to_owned())
        });
        said.expect("the other process says where it listens").parse().unwrap()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn impatient() -> ReceiveOptions {
    let mut options = ReceiveOptions::default();
    options.keepalive = Duration::from_millis(500);
    options
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_or_takes_it_along() {
    if !able() {
        return;
    }
    let lives = Arc::new(Lives::default());
    if std::env::var(ROLE).is_ok() {
        let destination = Destination::new(Backing::Anonymous, Load::BUSY, &lives);
        let receiving = listen_with(&destination, impatient());
        println!("listening at {}", receiving.endpoint().unwrap());
        let _ = receiving.wait();
        return;
    }
    let _watch = watch(60);
    let test = "a_destination_that_is_killed_leaves_the_guest_or_takes_it_along";
    for stage in [Stage::Copying { round: 1 }, Stage::PostCopy] {
        let mut other = Other::new(test, "destination");
        let endpoint = other.endpoint();
        let source = Source::new(layout(Backing::Anonymous, 8 * MIB), Load::BUSY, &lives);
        let mut options = options(Mode::Hybrid);
        options.precopy_bandwidth = Some(32 * MIB);
        options.background_bandwidth = Some(MIB);
        if stage == Stage::PostCopy {
            options.mode = Mode::PostCopy;
        }
        let sending = start(&source, endpoint, options);
        wait_for("the stage to come", || sending.stage() == stage);
        other.kill();
        if stage != Stage::PostCopy {
            assert!(sending.wait().is_err());
            source.assert_goes_on();
            continue;
        }
        // It may run there for all that can be known here.
        wait_for("the loss to be noticed", || sending.stage() == Stage::Paused);
        assert!(!sending.cancel() && sending.reclaim().is_err());
        sending.give_up().unwrap();
        let error = sending.wait().unwrap_err().to_string();
        assert!(error.contains("the guest with it"), "{error}");
        assert!(!source.vm.is_running() && !source.released.load(SeqCst));
    }
}

#[test]
fn a_source_that_is_killed_takes_the_guest_along_or_leaves_it_incomplete() {
    if !able() {
        return;
    }
    let lives = Arc::new(Lives::default());
    if let Ok(role) = std::env::var(ROLE) {
        let (mode, endpoint) = role.split_once(' ').unwrap();
        let source = Source::new(layout(Backing::Anonymous, 8 * MIB), Load::BUSY, &lives);
        let mut options = options(if mode == "post" { Mode::PostCopy } else { Mode::PreCopy });
        options.precopy_bandwidth = Some(4 * MIB);
        options.background_bandwidth = Some(MIB);
        let _ = start(&source, endpoint.parse().unwrap(), options).wait();
        return;
    }
    let _watch = watch(60);
    let test = "a_source_that_is_killed_takes_the_guest_along_or_leaves_it_incomplete";
    for (mode, stage) in [("pre", Stage::Copying { round: 1 }), ("post", Stage::PostCopy)] {
        // What waits for absent memory is to see an error in the end: nothing is to touch it here.
        let destination = Destination::new(Backing::Anonymous, Load::IDLE, &lives);
        let receiving = listen_with(&destination, impatient());
        let role = format!("{mode} {}", receiving.endpoint().unwrap());
        let mut other = Other::new(test, &role);
        wait_for("the stage to come", || receiving.status().stage == stage);
        other.kill();
        if mode == "pre" {
            assert!(receiving.wait().is_err());
            destination.assert_dropped();
            assert!(receiving.abandon().is_err());
            continue;
        }
        wait_for("the loss to be noticed", || receiving.status().stage == Stage::Paused);
        assert!(destination.vm().is_running() && receiving.drop_guest().is_err());
        let missing = receiving.status().missing;
        assert!(missing > 0);
        receiving.abandon().unwrap();
        let error = receiving.wait().unwrap_err().to_string();
        assert!(error.contains(&format!("{} bytes", missing * PAGE)), "{error}");
        destination.vm().stop();
    }
}
