//! `pageferry image verify`.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::Context as _;
use pageferry::image::{Chain, Verified};
use serde::Serialize;

use super::{Watch, meant};
use crate::{
    Context,
    exit::{self, Exit},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry image verify checkpoints/
  pageferry image verify checkpoint-0003.pfi --json

Reads every byte of the image and of all images it is based on, and compares it with its digest. The
exit code is 1 if a single bit is not as it was written; what is damaged, and which memory is lost by
it, is listed.";

/// Read all of an image and of its ancestors, and compare it with its digests
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// The image, or a directory: the newest chain in it
    image: PathBuf,
}

#[derive(Serialize)]
struct Report {
    intact: bool,
    images: usize,
    bytes: u64,
    blocks: u64,
    damaged: u64,
    /// The first of them.
    damage: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    error: String,
    /// Memory lost by it.
    lost_bytes: u64,
    lost: Vec<Range>,
}

#[derive(Serialize)]
struct Range {
    start: u64,
    end: u64,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let chain = Chain::open(meant(&args.image)?)?;
    let watch = Watch::new(context)?;
    let result = chain.verify(&mut |progress| watch.see(progress));
    let verified = watch.end(result)?;
    let report = report(&chain, &verified);
    if context.output.json() {
        context.output.write_json(&report)?;
    } else {
        let mut text = String::new();
        for Row { error, lost_bytes, .. } in &report.damage {
            writeln!(text, "{error}: {} of memory lost", size::display(*lost_bytes))
                .context("formatting the report")?;
        }
        let Report { images, bytes, blocks, damaged, .. } = &report;
        let said = if report.intact { "intact".to_owned() } else { format!("{damaged} damaged") };
        writeln!(text, "{said}: {images} images, {}, {blocks} blocks", size::display(*bytes))
            .context("formatting the report")?;
        context.output.write_text(&text)?;
    }
    Ok(if report.intact { Exit::Success } else { Exit::Failed })
}

fn report(chain: &Chain, verified: &Verified) -> Report {
    let damage = verified.damage.iter().map(|damage| Row {
        error: damage.error.to_string(),
        lost_bytes: damage.lost_bytes,
        lost: damage
            .lost
            .iter()
            .map(|range| Range { start: range.start().get(), end: range.end().get() })
            .collect(),
    });
    Report {
        intact: verified.is_intact(),
        images: chain.images().len(),
        bytes: verified.bytes,
        blocks: verified.blocks,
        damaged: verified.damaged,
        damage: damage.collect(),
    }
}
