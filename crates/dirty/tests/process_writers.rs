//! No change is lost: while six threads write, and one does everything else to its memory, a copy
//! that is kept up to date by harvests alone equals the memory at every stop, page for page.

#[path = "common/process.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{METHODS, Mirror, PAGE, Target, attach, changed_in, check_form, serve};
use pageferry_dirty::{Method, ProcessTracker};
use pageferry_process::Stopped;
use pageferry_testing::{Effort, HugePages};

/// Half of them while it runs.
const HARVESTS: u64 = 240;
/// An emulated machine does fewer.
const TIME: Duration = Duration::from_secs(60);
const LEAST: u64 = 20;

#[test]
fn process_child() {
    serve();
}

fn all_writers(method: Method) {
    let effort = Effort::new(HARVESTS, TIME);
    let _watch = effort.watch(120);
    let huge = HugePages::reserve(6);
    let mut target = Target::start();
    let pages = |count: u64| count * PAGE;
    for (kind, len) in [("anonymous", pages(600)), ("shared", pages(300)), ("file", pages(300))] {
        let area = target.map(kind, len);
        // Half of it is there, so that pages appear while they are tracked.
        target.tell("fill", &[area.start().get(), len / 2, 1]);
        target.tell("writers", &[2, area.start().get(), len]);
    }
    let thp = target.map("anonymous", 4 << 20);
    target.tell("huge-advice", &[thp.start().get(), thp.len()]);
    target.tell("fill", &[thp.start().get(), thp.len(), 1]);
    target.tell("writers", &[1, thp.start().get(), thp.len()]);
    if huge.is_some() {
        for kind in ["huge", "huge-shared"] {
            let area = target.map(kind, 3 * (2 << 20));
            target.tell("writers", &[1, area.start().get(), area.len()]);
        }
    }
    target.tell("changer", &[1]);
    target.tell("changer", &[2]);

    // Nobody writes here, nor is it next to what others map.
    let hole = target.map("hole", pages(1002));
    let quiet = hole.skip(PAGE).take(pages(1000));
    target.tell("replace", &[quiet.start().get(), quiet.len()]);
    target.tell("fill", &[quiet.start().get(), quiet.len(), 1]);

    let process = target.process();
    let Some(mut tracker) = attach(&process, method) else { return };
    let mut mirror = Mirror::new(&process, &tracker);
    let (begin, mut done, mut looked, mut changed, mut stops) = (Instant::now(), 0, 0, 0, 0);
    let mut exact = 0;
    while done < LEAST || effort.goes_on(done) {
        let mut look = |tracker: &mut ProcessTracker, stopped: Option<&Stopped<'_>>| {
            let found = match tracker.harvest(stopped) {
                Ok(found) => found,
                Err(error) => panic!("{method}, harvest {done}: {error}"),
            };
            check_form(&found);
            let told = changed_in(&found, quiet);
            // With soft-dirty bits, what a child that a changer has made still shares counts as
            // changed.
            assert!(
                told.is_empty() || method == METHODS[2],
                "{method}, harvest {done}: nobody wrote to {told:?}"
            );
            exact += u32::from(told.is_empty());
            mirror.update(&found);
            done += 1;
            found
        };
        if !tracker.needs_stop() {
            look(&mut tracker, None);
        }
        let stopped = process.stop().unwrap();
        let found = look(&mut tracker, Some(&stopped));
        looked += mirror.check(&found, &format!("{method}, harvest {done}"));
        changed += found.changed.iter().map(|range| range.len() / PAGE).sum::<u64>();
        drop(stopped);
        stops += 1;
    }
    let rounds = target.tell("rounds", &[]);
    println!(
        "{method}: {done} harvests, {stops} of them at a stop, {looked} pages compared, {changed} \
         found changed at stops, in {:?}; {rounds} rounds of the writers",
        begin.elapsed()
    );
    assert!(rounds > 0 && changed > 0 && exact > 0);
    tracker.detach().unwrap();
    target.tell("still", &[]);
}

#[test]
fn process_writers_wp_async() {
    all_writers(METHODS[0]);
}

#[test]
fn process_writers_wp_blocking() {
    all_writers(METHODS[1]);
}

#[test]
fn process_writers_soft_dirty() {
    all_writers(METHODS[2]);
}
