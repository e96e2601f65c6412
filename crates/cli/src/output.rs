//! Writing results: tables for people, JSON for programs.

use std::{
    fmt::Write as _,
    io::{self, Stdout, Write as _},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::Context as _;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::Serialize;

/// Where and how a command writes its result.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether the user asked for JSON. Progress and remarks then stay off standard output.
    pub(crate) fn json(self) -> bool {
        self.json
    }

    /// Writes `value` as one JSON document and a newline.
    pub(crate) fn write_json(self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        self.write_text(&text)
    }

    /// Writes `value` as one line of JSON, for a command that reports more than once.
    pub(crate) fn write_json_line(self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string(value)?;
        text.push('\n');
        self.write_text(&text)
    }

    /// Writes `text` to standard output as it is. A reader that has gone (`| head`) is no error.
    pub(crate) fn write_text(self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}

/// Standard output, to be polled for that nobody reads it any more: it is a pipe, a socket or a
/// terminal, and the other side of it is gone (poll(2), POLLERR and POLLHUP).
pub(crate) fn unread(stdout: &Stdout) -> PollFd<'_> {
    PollFd::new(stdout, PollFlags::empty())
}

/// Whether that is so. A command that reports without end has to ask.
pub(crate) fn is_unread() -> anyhow::Result<bool> {
    let stdout = io::stdout();
    polled(&mut [unread(&stdout)], Some(Duration::ZERO))
}

/// Waits until that is so, or `over` is readable; whether it is so.
pub(crate) fn wait_unread(over: &impl AsFd) -> anyhow::Result<bool> {
    let stdout = io::stdout();
    let mut fds = [unread(&stdout), PollFd::new(over, PollFlags::IN)];
    loop {
        if polled(&mut fds, None)? {
            return Ok(true);
        }
        if !fds[1].revents().is_empty() {
            return Ok(false);
        }
    }
}

/// Whether the first of `fds` has anything to say.
fn polled(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> anyhow::Result<bool> {
    let limit = limit.map(Timespec::try_from).transpose()?;
    match poll(fds, limit.as_ref()) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(Errno::INTR) => {
            // What an interrupted call leaves there says nothing.
            for fd in fds {
                fd.clear_revents();
            }
            Ok(false)
        }
        Err(error) => Err(error).context("waiting until nobody reads standard output"),
    }
}

/// Which side of its column a cell is set to.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Align {
    Left,
    Right,
}

/// A table whose columns are as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; it must have as many cells as there are columns.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.columns.len(), "a cell for every column");
        self.rows.push(cells);
    }

    pub(crate) fn render(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.columns[column].0.chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut one = String::new();
            for ((cell, width), (_, align)) in cells.zip(&widths).zip(&self.columns) {
                let padding = width - cell.chars().count();
                let (before, after) = match align {
                    Align::Left => (0, padding),
                    Align::Right => (padding, 0),
                };
                let _ = write!(one, "{:before$}{cell}{:after$}  ", "", "");
            }
            text.push_str(one.trim_end());
            text.push('\n');
        };
        line(&mut self.columns.iter().map(|(name, _)| *name));
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(vec!["a".into(), "1000".into()]);
        table.row(vec!["longer".into(), "7".into()]);
        assert_eq!(table.render(), "name       n\na       1000\nlonger     7\n");
    }
}
