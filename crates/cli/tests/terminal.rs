//! What the command draws in a terminal, and that it leaves the terminal as it was.

#[path = "common/chain.rs"]
mod chain;
mod common;
#[path = "common/terminal.rs"]
mod terminal;
#[path = "common/writer.rs"]
mod writer;

use chain::of;
use common::{host::has_userfaultfd, pageferry, words};
use rustix::process::Signal;
use terminal::Terminal;
use vt100::{Color, Screen};
use writer::{Writer, can_track};

/// Not a test: what the children of the others do.
#[test]
fn writer() {
    writer::run();
}

fn rows(screen: &Screen) -> Vec<String> {
    let (_, columns) = screen.size();
    screen.rows(0, columns).map(|row| row.trim_end().to_owned()).collect()
}

const BEFORE: &str = "what was there before";
const FOOTER: &str = "q or Ctrl-C: end";

/// A live view, and how the line was set before it came.
struct Live {
    terminal: Terminal,
    view: terminal::InTerminal,
    settings: String,
}

impl Live {
    /// Starts it, and waits for its first picture.
    #[track_caller]
    fn start(writer: &Writer, options: &str) -> Self {
        let terminal = Terminal::new(24, 110);
        let settings = terminal.settings();
        terminal.show(BEFORE);
        let args = format!("dirty --interval 50ms {options}");
        let view = terminal.start(&mut of(writer, &args));
        let screen = terminal.wait_for("the view", |screen| screen.contents().contains(FOOTER));
        assert!(screen.alternate_screen() && screen.hide_cursor(), "a screen of its own");
        assert_ne!(terminal.settings(), settings, "keys come at once");
        Self { terminal, view, settings }
    }

    /// Waits for its end; the terminal has to be as it was, and to show what it showed.
    #[track_caller]
    fn end(self, code: i32) -> Terminal {
        let terminal = self.end_resized(code);
        assert_eq!(rows(&terminal.screen())[0], BEFORE);
        terminal
    }

    /// As [`end`](Self::end), where the terminal itself has cut off what it showed.
    #[track_caller]
    fn end_resized(self, code: i32) -> Terminal {
        let Self { terminal, view, settings } = self;
        assert_eq!(view.end().code(), Some(code));
        assert_eq!(terminal.settings(), settings);
        let screen = terminal.wait_for("the screen of before", |screen| {
            !screen.alternate_screen() && !screen.hide_cursor()
        });
        assert!(!screen.contents().contains(FOOTER), "{}", screen.contents());
        terminal
    }
}

#[test]
fn the_live_view_shows_where_a_process_writes() {
    if !terminal::available() || !can_track() {
        return;
    }
    let writer = Writer::start();
    let live = Live::start(&writer, "");
    // The memory that is written most is on top: its first part, and nothing else of it.
    let strip = |screen: &Screen| -> Vec<String> {
        let (_, columns) = screen.size();
        let cell = |column| screen.cell(7, column).expect("a cell").contents().to_owned();
        (columns - 32..columns).map(cell).collect()
    };
    let heated = |strip: &[String]| {
        ["░", "▒", "▓", "█"].contains(&strip[0].as_str())
            && strip[1..].iter().all(|cell| cell == "·")
    };
    let screen = live.terminal.wait_for("the heat of its memory", |screen| heated(&strip(screen)));
    let drawn = rows(&screen);
    assert!(drawn[0].contains(&format!("({})", writer.pid())), "{drawn:#?}");
    assert!(screen.cell(0, 0).expect("a cell").bold(), "its name is bold");
    let method = ["wp-async: ", "wp-blocking: ", "soft-dirty: "];
    assert!(method.iter().any(|method| drawn[1].starts_with(method)), "{drawn:#?}");
    assert!(drawn[2].contains("/s written, dirty set "), "{drawn:#?}");
    let header = ["mapping", "size", "written", "dirty set", "rate", "where"];
    assert_eq!(
        drawn[6].split("  ").map(str::trim).filter(|word| !word.is_empty()).collect::<Vec<_>>(),
        header
    );
    assert!(drawn[7].contains("32.0 MiB") || drawn[7].contains("32 MiB"), "{drawn:#?}");
    assert_eq!(drawn[23], FOOTER);
    let colour = |column| screen.cell(7, column).expect("a cell").fgcolor();
    assert_ne!(colour(78), colour(79), "what is written is of another colour");
    assert_eq!(colour(79), Color::Idx(8));
    // The rate over time: three rows of bars that grow to the right.
    let bars = |screen: &Screen| {
        let bars = "▁▂▃▄▅▆▇█";
        rows(screen)[3..6].iter().flat_map(|row| row.chars()).filter(|c| bars.contains(*c)).count()
    };
    let before = bars(&screen);
    live.terminal.wait_for("more samples", |screen| bars(screen) > before);
    live.terminal.press(b"q");
    let terminal = live.end(0);
    // What there was to see is told once more, where it stays.
    terminal.wait_for("the summary", |screen| screen.contents().contains(" written to in "));
    writer.assert_untouched();
}

/// Which mapping it is can be seen in an ordinary terminal too.
#[test]
fn the_live_view_names_mappings_where_there_is_little_room() {
    if !terminal::available() || !can_track() {
        return;
    }
    let writer = Writer::start();
    let live = Live::start(&writer, "");
    live.terminal.resize(24, 80);
    let screen = live.terminal.wait_for("a narrow view", |screen| {
        let drawn = rows(screen);
        let written = |row: &String| row.contains(['░', '▒', '▓', '█']) && row.contains("MiB");
        let narrow = drawn[6].starts_with("mapping") && !drawn[6].contains("rate");
        narrow && written(&drawn[7]) && drawn[23] == FOOTER
    });
    let drawn = rows(&screen);
    let (address, rest) = drawn[7].split_once(' ').expect("an address");
    assert!(u64::from_str_radix(address, 16).is_ok_and(|address| address > 0), "{drawn:#?}");
    assert!(rest.starts_with("rw-p "), "{drawn:#?}");
    assert!(drawn[6].starts_with("mapping ") && drawn[6].contains("where"), "{drawn:#?}");
    assert_eq!(drawn[7].chars().filter(|c| "·░▒▓█".contains(*c)).count(), 16, "{drawn:#?}");
    live.terminal.press(b"q");
    live.end_resized(0);
}

#[test]
fn the_live_view_fits_whatever_size_the_terminal_gets() {
    if !terminal::available() || !can_track() {
        return;
    }
    let writer = Writer::start();
    let live = Live::start(&writer, "");
    for (height, width) in [(40, 160), (10, 60), (3, 20), (2, 8), (24, 100)] {
        let sent = live.terminal.sent().len();
        live.terminal.resize(height, width);
        live.terminal.wait_for(&format!("{height} x {width}"), |screen| {
            let drawn = rows(screen);
            let there = drawn.len() == usize::from(height);
            // Where there is no room for all, nobody asks what is left out.
            let drawn_again = live.terminal.sent().len() > sent;
            there && drawn_again && (height < 8 || drawn.last().is_some_and(|row| row == FOOTER))
        });
    }
    live.terminal.press(b"q");
    live.end_resized(0);
}

#[test]
fn keys_and_signals_end_the_live_view_and_the_terminal_is_as_before() {
    if !terminal::available() || !can_track() {
        return;
    }
    let writer = Writer::start();
    type End = fn(&Live);
    let ends: [(&str, &str, End, i32); 5] = [
        ("Ctrl-C", "", |live| live.terminal.press(b"\x03"), 0),
        ("Esc", "", |live| live.terminal.press(b"\x1b"), 0),
        ("the time it was given", "--for 300ms", |_| {}, 0),
        ("SIGTERM", "", |live| live.view.signal(Signal::TERM), 0),
        ("SIGINT", "--for 1h", |live| live.view.signal(Signal::INT), 130),
    ];
    for (how, options, end, code) in ends {
        println!("{how}");
        let live = Live::start(&writer, options);
        // Keys that mean nothing.
        live.terminal.press(b"x7\t");
        end(&live);
        live.end(code);
        writer.assert_untouched();
    }
}

#[test]
fn the_live_view_ends_with_the_process() {
    if !terminal::available() || !can_track() {
        return;
    }
    let mut writer = Writer::start();
    let live = Live::start(&writer, "");
    writer.end();
    let terminal = live.end(0);
    terminal.wait_for("why", |screen| screen.contents().contains("has ended"));
}

/// No bar and nothing of one is left when the command has ended.
#[track_caller]
fn assert_no_bar(screen: &Screen) {
    let left = screen.contents();
    assert!(!left.contains(['█', '░']), "{left}");
    assert!(!screen.hide_cursor());
}

#[test]
fn a_checkpoint_shows_how_far_it_is() {
    if !terminal::available() || !can_track() {
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    let terminal = Terminal::new(24, 200);
    let args = "checkpoint --rounds 2 --downtime 0s";
    let ended = terminal.start(of(&writer, args).arg("--to").arg(folder.path())).end();
    assert_eq!(ended.code(), Some(0));
    let screen = terminal.wait_for("the end", |screen| screen.contents().contains("complete: "));
    assert_no_bar(&screen);
    let sent = terminal.sent();
    let bar = |prefix: &str| {
        let mut drawn = sent.split(['\r', '\n']).filter(|line| line.contains(prefix));
        drawn.any(|line| line.contains('█') || line.contains('░'))
    };
    assert!(bar("round 0 "), "{sent:?}");
    // What was said meanwhile is whole, a line each.
    let drawn = rows(&screen);
    for round in 0..3 {
        let begins = format!("round {round}: ");
        let said: Vec<_> = drawn.iter().filter(|row| row.starts_with(&begins)).collect();
        assert_eq!(said.len(), 1, "{drawn:#?}");
        assert!(said[0].ends_with(&format!("checkpoint-000{round}.pfi")), "{drawn:#?}");
    }
}

#[test]
fn the_demo_shows_how_far_it_is() {
    if !terminal::available() || !has_userfaultfd() {
        return;
    }
    let terminal = Terminal::new(60, 200);
    let args = "demo --guest threads --memory 32MiB";
    let ended = terminal.start(&mut pageferry(words(args))).end();
    assert_eq!(ended.code(), Some(0), "{}", terminal.sent());
    let sent = terminal.sent();
    let percent = |line: &str| -> Option<u32> {
        let (before, _) = line.split_once('%')?;
        before.rsplit(' ').next()?.parse().ok()
    };
    let drawn: Vec<u32> = sent
        .split(['\r', '\n'])
        .filter(|line| line.contains('█') || line.contains('░'))
        .filter_map(percent)
        .collect();
    assert!(drawn.iter().any(|percent| *percent < 100), "{sent:?}");
    let screen = terminal.wait_for("what came of it", |screen| !rows(screen)[0].is_empty());
    assert_no_bar(&screen);
}
