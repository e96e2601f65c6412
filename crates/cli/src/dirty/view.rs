//! The samples in a terminal.

use ratatui::{
    Frame,
    layout::{Constraint, Layout},
    style::{Color, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Sparkline, Table},
};

use super::sample::{MappingSample, Sample, Samples};
use crate::size;

/// What stands above the samples.
#[derive(Debug)]
pub(super) struct Heading {
    pub(super) pid: u32,
    pub(super) command: String,
    pub(super) method: String,
    /// Why that method.
    pub(super) why: String,
}

/// Columns from which on there is room for everything.
const WIDE: u16 = 110;

/// Draws `sample`, the mappings that were written most at the top.
pub(super) fn draw(frame: &mut Frame<'_>, heading: &Heading, samples: &Samples, sample: &Sample) {
    let areas = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(3),
        Constraint::Min(2),
        Constraint::Length(1),
    ])
    .split(frame.area());
    let Heading { pid, command, method, why } = heading;
    let untracked = match sample.untracked_bytes {
        0 => String::new(),
        bytes => format!(", {} not tracked", size::display(bytes)),
    };
    let total = format!(
        "{}/s written, dirty set {}{untracked}, stopped {:.2} ms for this sample",
        size::display(sample.bytes_per_s as u64),
        size::display(sample.dirty_set_bytes),
        sample.stopped_ms
    );
    let why = shortened(&format!("{method}: {why}"), frame.area().width);
    let head = vec![
        Line::from(vec![
            format!("{command} ({pid})").bold(),
            format!("  {:.0} s", sample.t_s).into(),
        ]),
        Line::from(why.dim()),
        Line::from(total),
    ];
    frame.render_widget(Paragraph::new(head), areas[0]);
    let rates = samples.total_rates();
    let width = usize::from(areas[1].width);
    let recent = &rates[rates.len().saturating_sub(width)..];
    frame.render_widget(Sparkline::default().data(recent).style(Color::Cyan), areas[1]);

    let mut mappings: Vec<&MappingSample> = sample.mappings.iter().collect();
    mappings.sort_by(|a, b| {
        let written = |m: &MappingSample| (m.written_pages, m.dirty_set_bytes);
        let size = |m: &MappingSample| m.end - m.start;
        // Above what is not written: what may be.
        let rank =
            |m: &MappingSample| (written(m), !m.tracked, if m.tracked { 0 } else { size(m) });
        rank(b).cmp(&rank(a)).then(a.start.cmp(&b.start))
    });
    // Where there is little room, which mapping it is counts for more.
    let wide = frame.area().width >= WIDE;
    let rows = mappings.iter().map(|mapping| {
        let mut cells =
            vec![Cell::from(name(mapping)), Cell::from(size::display(mapping.end - mapping.start))];
        cells.extend(if mapping.tracked {
            [
                Cell::from(format!("{}/s", size::display(mapping.bytes_per_s as u64))),
                Cell::from(size::display(mapping.dirty_set_bytes)),
            ]
        } else {
            [Cell::from("not tracked".red()), Cell::from("?")]
        });
        if wide {
            cells.push(Cell::from(spark(&samples.rates(mapping.start))));
        }
        if mapping.tracked {
            cells.push(Cell::from(heat(mapping, if wide { 1 } else { 2 })));
        }
        Row::new(cells)
    });
    let (widths, titles): (&[u16], &[&str]) = if wide {
        (&[10, 12, 10, 16, 32], &["mapping", "size", "written", "dirty set", "rate", "where"])
    } else {
        (&[10, 12, 10, 16], &["mapping", "size", "written", "dirty set", "where"])
    };
    let widths = widths.iter().map(|width| Constraint::Length(*width));
    let widths = std::iter::once(Constraint::Fill(1)).chain(widths);
    let header = Row::new(titles.iter().copied()).bold();
    frame.render_widget(Table::new(rows, widths).header(header), areas[2]);
    frame.render_widget(Paragraph::new("q or Ctrl-C: end".dim()), areas[3]);
}

/// As much of a text as there is room for, with a sign that it goes on.
fn shortened(text: &str, width: u16) -> String {
    let width = usize::from(width);
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    // Not in the middle of a word, unless it is all there is.
    let kept = kept.rsplit_once(' ').map_or(kept.as_str(), |(whole, _)| whole);
    format!("{}…", kept.trim_end_matches([' ', ',', ';', ':', '(']))
}

fn name(mapping: &MappingSample) -> String {
    match mapping.name.as_str() {
        "" => format!("{:x} {}", mapping.start, mapping.permissions),
        // Of a path the end tells more than the beginning, and there is no room for all of it.
        path => path.rsplit('/').next().unwrap_or(path).to_owned(),
    }
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The last 16 rates, the highest of them as high as a bar can be.
fn spark(rates: &[u64]) -> String {
    let recent = &rates[rates.len().saturating_sub(16)..];
    let most = recent.iter().copied().max().unwrap_or(0);
    let bar = |rate: &u64| match (rate * 8).checked_div(most) {
        None | Some(0) if *rate == 0 => ' ',
        height => BARS[(height.unwrap_or(0) as usize).clamp(1, 8) - 1],
    };
    recent.iter().map(bar).collect()
}

/// The mapping from its start to its end: the more of a part was written, the brighter.
/// Each character is for so many of the parts.
fn heat(mapping: &MappingSample, parts: usize) -> Line<'static> {
    let heat: Vec<u64> = mapping.heat.chunks(parts).map(|parts| parts.iter().sum()).collect();
    let cells = heat.len().max(1) as u64;
    let pages = (mapping.end - mapping.start) / crate::bench::case::PAGE as u64;
    let most = pages.div_ceil(cells).max(1);
    let shades = [Color::DarkGray, Color::Blue, Color::Magenta, Color::Red, Color::Yellow];
    let cell = |written: &u64| {
        let shade = match written * 4 {
            0 => 0,
            written => (written / most).clamp(1, 4) as usize,
        };
        // Not by colour alone: for those who see none, and for copies of the text.
        Span::styled(["·", "░", "▒", "▓", "█"][shade], Style::default().fg(shades[shade]))
    };
    heat.iter().map(cell).collect::<Vec<_>>().into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::dirty::sample::Mapping;

    #[test]
    fn what_is_written_most_is_on_top() {
        let mapping = |start: u64, pages: u64, name: &str| Mapping {
            range: start << 12..(start + pages) << 12,
            permissions: "rw-p".into(),
            name: name.into(),
            tracked: name != "[taken]",
        };
        let mut samples = Samples::default();
        let all = || {
            vec![
                mapping(16, 32, "[heap]"),
                mapping(64, 64, ""),
                mapping(256, 32, "/lib/libx.so"),
                mapping(512, 32, "[taken]"),
            ]
        };
        let first = 16 << 12..18 << 12;
        samples.add(Duration::from_secs(1), Duration::ZERO, all(), std::slice::from_ref(&first));
        let written = [16 << 12..17 << 12, 64 << 12..96 << 12];
        let sample = samples.add(Duration::from_secs(2), Duration::from_millis(3), all(), &written);
        let heading = Heading {
            pid: 42,
            command: "worker".into(),
            method: "wp-async".into(),
            why: format!("because {}of this", "it is so, and ".repeat(9)),
        };
        let mut terminal = Terminal::new(TestBackend::new(120, 14)).unwrap();
        terminal.draw(|frame| draw(frame, &heading, &samples, &sample)).unwrap();
        let screen = terminal.backend().to_string();
        let line = |text: &str| {
            let found = screen.lines().position(|line| line.contains(text));
            found.unwrap_or_else(|| panic!("{text} is not in {screen}"))
        };
        assert!(line("worker (42)") < line("wp-async: because"));
        assert!(line("132 KiB/s written") < line("40000 rw-p"));
        assert!(line("40000 rw-p") < line("[heap]"));
        assert!(line("[heap]") < line("libx.so"));
        assert!(line("[heap]") < line("[taken]") && line("[taken]") < line("libx.so"));
        let taken = screen.lines().nth(line("[taken]")).unwrap();
        assert!(taken.contains("not tracked") && !taken.contains('·'), "{screen}");
        assert!(line("dirty set 136 KiB, 128 KiB not tracked, stopped") < line("[taken]"));
        let why = screen.lines().nth(line("wp-async: because")).unwrap();
        assert!(why.trim_end_matches([' ', '"']).ends_with('…'), "{screen}");
        let anonymous = screen.lines().nth(line("40000 rw-p")).unwrap();
        assert!(anonymous.contains(&format!("{}{}", "█".repeat(16), "·".repeat(16))), "{screen}");
        assert!(line("q or Ctrl-C") > line("libx.so"));
    }

    #[test]
    fn what_is_too_long_says_so() {
        assert_eq!(shortened("wp-async: it is fast", 20), "wp-async: it is fast");
        assert_eq!(shortened("wp-async: it is fast", 19), "wp-async: it is…");
        assert_eq!(shortened("wp-async: it is fast", 11), "wp-async…");
        assert_eq!(shortened("wp-async: it is fast", 5), "wp-a…");
        assert_eq!(shortened("wp-async", 0), "…");
    }

    #[test]
    fn sparks_have_the_height_of_their_rate() {
        assert_eq!(spark(&[]), "");
        assert_eq!(spark(&[0, 0]), "  ");
        assert_eq!(spark(&[0, 1, 400, 800]), " ▁▄█");
        assert_eq!(spark(&[u64::MAX / 16; 20]).chars().count(), 16);
    }
}
