//! A demo that is killed with SIGKILL leaves nothing behind. Alone in its file, since it looks at the
//! pool of huge pages, which other tests change.

mod common;

use common::{
    Running,
    host::{has_userfaultfd, huge_pages_available, huge_pages_total, is_root},
    pageferry, wait_for, words,
};
use rustix::process::Signal;

#[test]
fn huge_pages_that_were_reserved_are_given_back() {
    if !has_userfaultfd() {
        return;
    }
    if !is_root() {
        println!("skipped: needs root, to reserve huge pages");
        return;
    }
    let before = huge_pages_total();
    let missing = 4;
    let mib = 2 * (huge_pages_available() + missing);
    // It never comes to its end.
    let args =
        format!("demo --guest threads --backing hugetlb-2m --memory {mib}MiB --delay-us 60000000");
    let mut demo = Running::start(&mut pageferry(words(&args)));
    let added = demo.wait_until("huge pages", |_| {
        huge_pages_total().checked_sub(before).filter(|added| *added >= missing)
    });
    // By then it has somebody who gives them back.
    demo.wait_until("the keeper and the source", |pid| {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        (children.split_whitespace().count() == 2).then_some(())
    });
    assert_eq!(added, missing);
    demo.signal(Signal::KILL);
    let _ = demo.end();
    wait_for("the pool as it was", || (huge_pages_total() == before).then_some(()));
}
