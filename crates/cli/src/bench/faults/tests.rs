//! The harness's arithmetic and its order of runs, with contenders that only pretend to serve.

use std::{cell::RefCell, rc::Rc};

use super::*;

fn measured(wall_us: u64) -> Measurement {
    let mut latency = Histogram::new();
    latency.record(Duration::from_micros(wall_us));
    Measurement {
        pages: 10,
        wall: Duration::from_micros(wall_us),
        cpu: Duration::from_micros(2 * wall_us),
        latency,
    }
}

fn series(walls_us: &[u64]) -> Series {
    let args = <Args as clap::Args>::augment_args(clap::Command::new("faults"));
    let matches = args.get_matches_from(["faults", "--threads", "2"]);
    let args = <Args as clap::FromArgMatches>::from_arg_matches(&matches).expect("valid");
    let case = args.groups().expect("valid").swap_remove(0).cases.swap_remove(0);
    Series { case, rounds: walls_us.iter().map(|us| measured(*us)).collect() }
}

#[test]
fn ratios_are_within_rounds() {
    // Twice as fast in every round, while the machine slows down tenfold in between.
    let (fast, slow) = (series(&[10, 100, 1000]), series(&[20, 200, 2000]));
    let row = fast.row("x", Some(&slow), &fast);
    assert_eq!(row.ratio_to_raw, Some(2.0));
    assert_eq!(row.ratio_to_reader, 1.0);
    assert_eq!(row.pages_per_s.round(), 100_000.0);
    assert_eq!(row.us_per_page.round(), 10.0);
    assert_eq!(row.cpu_us_per_page.round(), 20.0);
    assert_eq!(row.max_us.round(), 1000.0);
}

#[test]
fn only_counted_rounds_are_kept() {
    struct Counter(Rc<RefCell<Vec<Delivery>>>);
    impl Contender for Counter {
        fn name(&self) -> &str {
            "counter"
        }
        fn run(&mut self, case: &Case) -> anyhow::Result<Measurement> {
            self.0.borrow_mut().push(case.delivery);
            Ok(measured(self.0.borrow().len() as u64))
        }
    }
    let runs = Rc::default();
    let mut counter = Counter(Rc::clone(&runs));
    let mut kept = series(&[]);
    kept.run(&mut counter, true).expect("counts");
    kept.run(&mut counter, false).expect("counts");
    kept.run(&mut counter, false).expect("counts");
    assert_eq!(runs.borrow().len(), 3);
    assert_eq!(kept.rounds.iter().map(|m| m.wall.as_micros()).collect::<Vec<_>>(), [2, 3]);
}
