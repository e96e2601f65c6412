//! How a child ended is seen, and what it should not have done is not taken for what it should.

use std::panic::catch_unwind;

use pageferry_memory::Backing;
use pageferry_testing::{
    PAGE, child,
    child::{End, SAW_MEMORY},
    fail, layout, peek, poke,
};
use rustix::process::Signal;

const KILLED: End = End::Signal(Signal::KILL.as_raw());

#[test]
fn ends_are_told_apart() {
    const ME: &str = "ends_are_told_apart";
    match child::case().as_deref() {
        None => {}
        // Exits, because what the harness prints of a test that returns would be counted as a test.
        Some("early") => std::process::exit(0),
        Some("fails") => {
            child::reached();
            fail("on purpose");
        }
        Some("reads") => {
            let layout = layout(Backing::Anonymous, PAGE);
            poke(&layout, 8, 7);
            child::reached();
            child::saw(peek(&layout, 8));
        }
        Some("dies") => {
            child::reached();
            // One that the standard library has no handler for.
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, Signal::KILL).unwrap();
            unreachable!("a process that has killed itself");
        }
        Some(other) => panic!("{other}"),
    }
    child::expect(ME, "fails", End::Exit(101));
    child::expect(ME, "reads", End::Exit(SAW_MEMORY));
    child::expect(ME, "dies", KILLED);
    assert!(child::run(ME, "reads").1.contains("saw 0x7"), "all that it prints is returned");
    assert!(child::run(ME, "fails").1.contains("on purpose"));

    let early = catch_unwind(|| child::expect(ME, "early", End::Exit(0)));
    assert!(early.is_err(), "a child that never did what is tested");
    let survived = catch_unwind(|| child::expect(ME, "reads", KILLED));
    assert!(survived.is_err(), "a child that ended otherwise");
}
