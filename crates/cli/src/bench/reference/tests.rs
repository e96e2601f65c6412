//! Every loop serves every page right. Each test is a table of the cases that the loop has.

use super::*;
use crate::bench::case::{Access, Order};

fn cases(delivery: Delivery) -> Vec<Case> {
    let mut cases = Vec::new();
    for (backing, kind) in [
        (Backing::Anon, Kind::Missing),
        (Backing::Memfd, Kind::Missing),
        (Backing::Memfd, Kind::Minor),
    ] {
        for (threads, workers, batch) in [(1, 1, 1), (8, 3, 64), (32, 2, 4)] {
            for (order, access) in
                [(Order::Random, Access::Read), (Order::Sequential, Access::Write)]
            {
                cases.push(Case {
                    delivery,
                    backing,
                    kind,
                    threads,
                    pages: 512,
                    order,
                    access,
                    seed: threads as u64,
                    workers,
                    batch,
                });
            }
        }
    }
    cases
}

fn check(contender: &mut dyn Contender, delivery: Delivery) {
    for case in cases(delivery) {
        match contender.run(&case) {
            // Wrong contents, and pages not touched, are errors of the guest's side.
            Ok(measured) => assert_eq!(measured.latency.count(), 512, "{case:?}"),
            Err(error) if error.is::<Failure>() => {
                println!("skipped: needs userfaultfd: {error}");
                return;
            }
            Err(error) => panic!("{case:?}: {error:#}"),
        }
    }
}

#[test]
fn reader() {
    check(&mut Reader, Delivery::Queue);
}

#[test]
fn raw_queue() {
    check(&mut Raw, Delivery::Queue);
}

#[test]
fn raw_queue_n() {
    check(&mut Raw, Delivery::QueueN);
}

#[test]
fn raw_by_thread() {
    check(&mut Raw, Delivery::ByThread);
}

#[test]
fn raw_by_cpu() {
    check(&mut Raw, Delivery::ByCpu);
}

#[test]
fn raw_sharded() {
    check(&mut Raw, Delivery::Sharded);
}

#[test]
fn raw_signal() {
    check(&mut Raw, Delivery::Signal);
}

#[test]
fn minor_faults_of_anonymous_memory_are_refused() {
    let mut case = cases(Delivery::Queue).swap_remove(0);
    case.kind = Kind::Minor;
    let error = Raw.run(&case).expect_err("there is no alias");
    assert!(error.to_string().contains("memfd"), "{error}");
}
