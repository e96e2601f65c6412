//! `pageferry image diff`.

use std::{ops::ControlFlow, path::PathBuf};

use pageferry::image::{self, Chain};
use serde::Serialize;

use super::meant;
use crate::{
    Context,
    exit::{self, Exit},
    output::{Align, Table},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry image diff checkpoint-0002.pfi checkpoint-0003.pfi
  pageferry image diff before/ after/ --json

Compares memory, each image with all it is based on, not files: the same memory in other blocks, or
in fewer images, does not differ. What is stored is compared by the digests that the images have of
it, and mostly not read: whether it is what they say, `image verify` finds out. The exit code is 0
whether they differ or not.";

/// Which memory differs between two images
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// The first image, or a directory: the newest chain in it
    before: PathBuf,
    /// The second
    after: PathBuf,
}

#[derive(Serialize)]
struct Row {
    start: u64,
    end: u64,
    before: String,
    after: String,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let (before, after) = (meant(&args.before)?, meant(&args.after)?);
    let (before, after) = (Chain::open(before)?, Chain::open(after)?);
    let mut rows: Vec<Row> = Vec::new();
    image::diff(&before, &after, &mut |difference| {
        rows.push(Row {
            start: difference.range.start().get(),
            end: difference.range.end().get(),
            before: difference.before.to_string(),
            after: difference.after.to_string(),
        });
        match context.signals.caught() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    })?;
    context.stop_if_asked()?;
    let bytes: u64 = rows.iter().map(|row| row.end - row.start).sum();
    if context.output.json() {
        context.output.write_json(&serde_json::json!({
            "differing_bytes": bytes,
            "differences": rows,
        }))?;
        return Ok(Exit::Success);
    }
    let mut table = Table::new(&[
        ("from", Align::Right),
        ("to", Align::Right),
        ("size", Align::Right),
        ("before", Align::Left),
        ("after", Align::Left),
    ]);
    let runs = rows.len();
    for Row { start, end, before, after } in rows {
        let (from, to) = (format!("{start:x}"), format!("{end:x}"));
        table.row(vec![from, to, size::display(end - start), before, after]);
    }
    let total = format!("{} differ, in {runs} runs\n", size::display(bytes));
    context.output.write_text(&(if runs > 0 { table.render() } else { String::new() } + &total))?;
    Ok(Exit::Success)
}
