//! The terminal, as long as a live view has it.

use std::{io, time::Duration};

use anyhow::Context as _;
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
};

/// A screen of its own, with keys that come at once. What was there before comes back on drop, and
/// if the program panics.
pub(super) struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    pub(super) fn open() -> anyhow::Result<Self> {
        let terminal = ratatui::try_init().context("setting up the terminal")?;
        Ok(Self { terminal })
    }

    pub(super) fn draw(&mut self, picture: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(picture).map(|_| ())
    }

    /// Whether a key was pressed that ends the view. Does not wait.
    pub(super) fn asked_to_end(&mut self) -> io::Result<bool> {
        while event::poll(Duration::ZERO)? {
            let Event::Key(key) = event::read()? else { continue };
            if key.kind != KeyEventKind::Press {
                continue;
            }
            // In this mode Ctrl-C is a key like any other.
            let interrupt =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // ratatui's panic hook has done so already.
        if !std::thread::panicking()
            && let Err(error) = ratatui::try_restore()
        {
            eprintln!("pageferry: restoring the terminal: {error}");
        }
    }
}
