//! `pageferry image ls`.

use std::path::PathBuf;

use pageferry::image::{self, ImageInfo, ParentState};
use serde::Serialize;

use super::{Described, time};
use crate::{
    Context,
    exit::{self, Exit},
    output::{Align, Table},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry image ls
  pageferry image ls checkpoints/ --json

Every chain from its oldest image on; what cannot be opened comes last, with the reason. The exit
code is 1 if there is such an image, or one whose parent is missing or has been altered.";

/// List the images of a directory, in the order of their chains
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// The directory
    #[arg(default_value = ".")]
    directory: PathBuf,
}

#[derive(Serialize)]
struct Row {
    path: String,
    parent_state: &'static str,
    #[serde(flatten)]
    image: Option<Described>,
    error: Option<String>,
}

fn state(state: ParentState) -> &'static str {
    match state {
        ParentState::None => "none",
        ParentState::Present => "present",
        ParentState::Altered => "altered",
        ParentState::Missing => "missing",
        _ => "unknown",
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let images = image::list(&args.directory)?;
    let sound = images.iter().all(|listed| {
        listed.info.is_ok() && matches!(listed.parent, ParentState::None | ParentState::Present)
    });
    if context.output.json() {
        let rows: Vec<Row> = images
            .iter()
            .map(|listed| Row {
                path: listed.path.display().to_string(),
                parent_state: state(listed.parent),
                image: listed.info.as_ref().ok().map(Described::of),
                error: listed.info.as_ref().err().map(ToString::to_string),
            })
            .collect();
        context.output.write_json(&serde_json::json!({ "images": rows }))?;
    } else {
        let mut table = Table::new(&[
            ("image", Align::Left),
            ("id", Align::Left),
            ("parent", Align::Left),
            ("created", Align::Left),
            ("data", Align::Right),
            ("zero", Align::Right),
            ("file", Align::Right),
        ]);
        for listed in &images {
            let name = listed.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let parent = match (&listed.info, listed.parent) {
                (Ok(ImageInfo { parent: Some(link), .. }), ParentState::Present) => {
                    short(&link.id().to_string())
                }
                (Ok(ImageInfo { parent: Some(link), .. }), other) => {
                    format!("{}: {}", state(other), link.name())
                }
                (_, other) => state(other).to_owned(),
            };
            table.row(match &listed.info {
                Ok(info) => vec![
                    name,
                    short(&info.id.to_string()),
                    parent,
                    time(info.created),
                    size::display(info.amounts.data),
                    size::display(info.amounts.zero),
                    size::display(info.file_length),
                ],
                Err(_) => {
                    let nothing = || "-".to_owned();
                    vec![name, nothing(), parent, nothing(), nothing(), nothing(), nothing()]
                }
            });
        }
        context.output.write_text(&table.render())?;
        for error in images.iter().filter_map(|listed| listed.info.as_ref().err()) {
            eprintln!("pageferry: {error}");
        }
    }
    Ok(if sound { Exit::Success } else { Exit::Failed })
}

/// Enough of an identity to tell images of one directory apart.
fn short(id: &str) -> String {
    id.chars().take(8).collect()
}
