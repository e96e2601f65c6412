//! `pageferry image flatten`.

use std::path::PathBuf;

use anyhow::bail;
use pageferry::image::{self, Chain, ImageWriter, WriterOptions};

use super::{Described, Watch, meant};
use crate::{
    Context,
    exit::{self, Exit},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry image flatten checkpoints/ whole.pfi
  pageferry image flatten checkpoint-0003.pfi whole.pfi --json

The new image appears when it is complete, and is never put in the place of another file.";

/// Put an image and all it is based on together into one that needs no other
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// The image, or a directory: the newest chain in it
    image: PathBuf,
    /// Where to write the new one
    to: PathBuf,
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    // Before all the work; that nobody has come first is seen to in the end.
    if args.to.symlink_metadata().is_ok() {
        bail!("{}: there is such a file already, and it is not replaced", args.to.display());
    }
    let chain = Chain::open(meant(&args.image)?)?;
    let mut writer = ImageWriter::create(&args.to, WriterOptions::new(chain.block_size()))?;
    let watch = Watch::new(context)?;
    let result = image::flatten(&chain, &mut writer, &mut |progress| watch.see(progress));
    watch.end(result)?;
    writer.finish()?;
    let info = image::Image::open(&args.to)?.info();
    if context.output.json() {
        context.output.write_json(&Described::of(&info))?;
    } else {
        let images = chain.images().len();
        let (data, file) = (size::display(info.amounts.data), size::display(info.file_length));
        let to = args.to.display();
        context
            .output
            .write_text(&format!("{to}: {data} of data from {images} images, {file}\n"))?;
    }
    Ok(Exit::Success)
}
