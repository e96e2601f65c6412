//! `pageferry image info`.

use std::{fmt::Write as _, path::PathBuf};

use anyhow::Context as _;
use pageferry::image::{Image, ImageMapping, MappingFlags};
use serde::Serialize;

use super::{Described, meant, time};
use crate::{
    Context,
    exit::{self, Exit},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry image info checkpoint-0003.pfi
  pageferry image info checkpoint-0003.pfi --json

Reads no contents: what it says of them is what the image says of itself. `image verify` reads all.";

/// What an image is, what was mapped, and what else it says of itself
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// The image, or a directory: the newest image of the newest chain in it
    image: PathBuf,
}

#[derive(Serialize)]
struct Report {
    path: String,
    #[serde(flatten)]
    image: Described,
    metadata: serde_json::Map<String, serde_json::Value>,
    mappings: Vec<MappingRow>,
}

#[derive(Serialize)]
struct MappingRow {
    start: u64,
    end: u64,
    permissions: String,
    kind: Vec<String>,
    page_bytes: u64,
    file_offset: u64,
    device: String,
    inode: u64,
    name: String,
}

impl MappingRow {
    fn of(mapping: &ImageMapping) -> Self {
        let ImageMapping { range, flags, page_size, file_offset, device, inode, name } = mapping;
        let letter = |flag, letter| if flags.contains(flag) { letter } else { '-' };
        let sharing = if flags.contains(MappingFlags::SHARED) { 's' } else { 'p' };
        let permissions = [
            letter(MappingFlags::READ, 'r'),
            letter(MappingFlags::WRITE, 'w'),
            letter(MappingFlags::EXECUTE, 'x'),
            sharing,
        ];
        let said =
            MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::SHARED;
        let kinds = flags.difference(said).iter_names();
        Self {
            start: range.start().get(),
            end: range.end().get(),
            permissions: permissions.iter().collect(),
            kind: kinds.map(|(name, _)| name.to_ascii_lowercase().replace('_', "-")).collect(),
            page_bytes: page_size.bytes(),
            file_offset: *file_offset,
            device: format!("{:02x}:{:02x}", device.0, device.1),
            inode: *inode,
            name: name.escape_ascii().to_string(),
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let path = meant(&args.image)?;
    let image = Image::open(&path)?;
    let info = image.info();
    let metadata: Vec<(String, String)> = image
        .metadata()?
        .map(|(key, value)| (key.to_owned(), value.escape_ascii().to_string()))
        .collect();
    let mappings: Vec<MappingRow> = image.mappings()?.iter().map(MappingRow::of).collect();
    if context.output.json() {
        context.output.write_json(&Report {
            path: path.display().to_string(),
            image: Described::of(&info),
            metadata: metadata.into_iter().map(|(key, value)| (key, value.into())).collect(),
            mappings,
        })?;
        return Ok(Exit::Success);
    }
    let mut text = String::new();
    let mut line = |what: &str, value: String| {
        writeln!(text, "{what:<10}{value}").context("formatting the report")
    };
    line("image", path.display().to_string())?;
    line("id", info.id.to_string())?;
    line(
        "parent",
        match &info.parent {
            Some(link) => format!("{} ({})", link.id(), link.name()),
            None => "none: it is complete by itself".to_owned(),
        },
    )?;
    line("created", time(info.created))?;
    line("format", format!("version {}, blocks of {}", info.version, info.block_size))?;
    let amounts = info.amounts;
    line(
        "data",
        format!(
            "{}, of which {} stored, {} in images before; {} zero, {} with memory errors, {} no \
             longer there",
            size::display(amounts.data),
            size::display(amounts.stored),
            size::display(amounts.elsewhere),
            size::display(amounts.zero),
            size::display(amounts.poisoned),
            size::display(amounts.gone),
        ),
    )?;
    line("file", size::display(info.file_length))?;
    for (key, value) in &metadata {
        line(key, value.clone())?;
    }
    line("mappings", mappings.len().to_string())?;
    for MappingRow { start, end, permissions, file_offset, name, .. } in &mappings {
        writeln!(text, "  {start:012x}-{end:012x} {permissions} {file_offset:08x} {name}")
            .context("formatting the report")?;
    }
    context.output.write_text(&text)?;
    Ok(Exit::Success)
}
