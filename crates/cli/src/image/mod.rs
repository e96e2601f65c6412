//! `pageferry image`: what is in memory images, and whether it is what was written.

mod diff;
mod flatten;
mod info;
mod list;
mod verify;

use std::{
    io::IsTerminal as _,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context as _;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use pageferry::image::{self, ImageInfo};
use serde::Serialize;

use crate::{
    Context,
    exit::{self, Exit},
};

const EXAMPLES: &str = "\
Examples:
  pageferry image ls checkpoints/
  pageferry image info checkpoints/checkpoint-0003.pfi
  pageferry image verify checkpoints/
  pageferry image diff checkpoints/checkpoint-0002.pfi checkpoints/checkpoint-0003.pfi
  pageferry image flatten checkpoints/ whole.pfi

Where an image is asked for, a directory means the chain in it: its newest image and all that one is
based on. If there are several chains, it means the newest one, and that is said. The format is in crates/image/docs/design.md.";

/// Look into memory images, compare them, check them, put chains together
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Ls(list::Args),
    Info(info::Args),
    Verify(verify::Args),
    Diff(diff::Args),
    Flatten(flatten::Args),
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Ls(args) => list::run(args, context),
        Command::Info(args) => info::run(args, context),
        Command::Verify(args) => verify::run(args, context),
        Command::Diff(args) => diff::run(args, context),
        Command::Flatten(args) => flatten::run(args, context),
    }
}

/// The image that is meant: of a directory the last one of its newest chain.
fn meant(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let last = image::last_images(path)?;
    let (newest, others) = last.split_first().context("a chain has a last image")?;
    if !others.is_empty() {
        let others: Vec<_> = others.iter().map(|path| path.display().to_string()).collect();
        eprintln!(
            "pageferry: there are {} chains in {}: this is of the newest, whose last image is {} (of \
             the others: {})",
            last.len(),
            path.display(),
            newest.display(),
            others.join(", ")
        );
    }
    Ok(newest.clone())
}

/// An image, as `--json` has it.
#[derive(Debug, Serialize)]
struct Described {
    id: String,
    seal: String,
    parent: Option<Parent>,
    ancestors: u32,
    created: String,
    version: u32,
    block_bytes: u64,
    file_bytes: u64,
    data_bytes: u64,
    zero_bytes: u64,
    poisoned_bytes: u64,
    gone_bytes: u64,
    /// Of the data, each block once.
    stored_bytes: u64,
    /// Of the data, what images that it is based on have stored.
    elsewhere_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Parent {
    id: String,
    name: String,
}

impl Described {
    fn of(info: &ImageInfo) -> Self {
        Self {
            id: info.id.to_string(),
            seal: info.seal.to_string(),
            parent: info
                .parent
                .as_ref()
                .map(|link| Parent { id: link.id().to_string(), name: link.name().to_owned() }),
            ancestors: info.ancestors,
            created: time(info.created),
            version: info.version,
            block_bytes: info.block_size.bytes(),
            file_bytes: info.file_length,
            data_bytes: info.amounts.data,
            zero_bytes: info.amounts.zero,
            poisoned_bytes: info.amounts.poisoned,
            gone_bytes: info.amounts.gone,
            stored_bytes: info.amounts.stored,
            elsewhere_bytes: info.amounts.elsewhere,
        }
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Shows how far something has come, and ends it when a signal asks for that.
struct Watch<'a> {
    bar: ProgressBar,
    context: &'a Context,
}

impl<'a> Watch<'a> {
    fn new(context: &'a Context) -> anyhow::Result<Self> {
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new(0)
        } else {
            ProgressBar::hidden()
        };
        let style = "{bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style)?);
        Ok(Self { bar, context })
    }

    fn see(&self, progress: image::Progress) -> ControlFlow<()> {
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
        match self.context.signals.caught() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    /// What became of it; a signal comes before the error that it made.
    fn end<T>(self, result: Result<T, image::ImageError>) -> anyhow::Result<T> {
        self.bar.finish_and_clear();
        self.context.stop_if_asked()?;
        Ok(result?)
    }
}
