//! `pageferry receive`: the other end of `pageferry checkpoint --to HOST:PORT`.

use std::path::PathBuf;

use pageferry::{
    checkpoint::{Directory, Receiving},
    migrate::{Endpoint, ImageReceiver, ReceiveEvent, ReceiverOptions},
};
use serde::Serialize;

use crate::{
    Context,
    exit::{self, Exit, Failure},
    output::Output,
};

const EXAMPLES: &str = "\
Examples:
  pageferry receive --listen 192.0.2.7:7777 --to checkpoints/
  pageferry receive --listen '[::]:0' --to checkpoints/ --once --json

Writes the images that `pageferry checkpoint --to HOST:PORT` sends to a directory, each as it is made.
An image appears when it is complete and on disk; only then the sender is told so. If the sender is
lost, what it had begun is dropped, and what is complete stays. One sender at a time: others wait a
little, and are turned away then. With port 0 the system picks one; the address is the first line
printed. There is no encryption and no authentication yet: listen on addresses that only trusted
peers reach.";

/// Write the images that a checkpoint sends over the network to a directory
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help_of_server(EXAMPLES))]
pub(crate) struct Args {
    /// Where to listen: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// The directory; it is made if it is not there
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// End after the first sender; with 4 if it was lost
    #[arg(long)]
    once: bool,
}

/// What `--json` prints, a line each.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Line {
    Listening { address: String },
    Connected { peer: String },
    TurnedAway { peer: String, why: String },
    Begun { image: String, parent: Option<String> },
    Stored { image: String, data_pages: u64, zero_pages: u64, poisoned_pages: u64, gone_pages: u64 },
    Dropped { image: String, why: String },
    Ended { stored: Option<u64>, error: Option<String> },
}

impl Line {
    /// `None` for what is too much to tell.
    fn of(event: &ReceiveEvent<'_>) -> Option<Self> {
        Some(match event {
            ReceiveEvent::Connected { peer } => Self::Connected { peer: (*peer).to_owned() },
            ReceiveEvent::TurnedAway { peer, why } => {
                Self::TurnedAway { peer: (*peer).to_owned(), why: why.to_string() }
            }
            ReceiveEvent::Begun { image } => Self::Begun {
                image: image.id.to_string(),
                parent: image.parent.map(|parent| parent.to_string()),
            },
            ReceiveEvent::Stored { image, counts } => Self::Stored {
                image: image.to_string(),
                data_pages: counts.data,
                zero_pages: counts.zero,
                poisoned_pages: counts.poisoned,
                gone_pages: counts.gone,
            },
            ReceiveEvent::Dropped { image, why } => {
                Self::Dropped { image: image.to_string(), why: (*why).to_owned() }
            }
            ReceiveEvent::Ended { outcome } => match outcome {
                Ok(received) => Self::Ended { stored: Some(received.stored), error: None },
                Err(error) => Self::Ended { stored: None, error: Some(error.to_string()) },
            },
            _ => return None,
        })
    }

    fn text(&self) -> String {
        match self {
            Self::Listening { address } => format!("listening on {address}"),
            Self::Connected { peer } => format!("{peer} is here"),
            Self::TurnedAway { peer, why } => format!("{peer} was turned away: {why}"),
            Self::Begun { image, parent: None } => format!("{image}: a new chain"),
            Self::Begun { image, parent: Some(parent) } => format!("{image}: based on {parent}"),
            Self::Stored { image, data_pages, zero_pages, .. } => {
                format!("{image}: stored, {data_pages} pages with data, {zero_pages} zero")
            }
            Self::Dropped { image, why } => format!("{image}: dropped: {why}"),
            Self::Ended { error: Some(error), .. } => format!("the sender was lost: {error}"),
            Self::Ended { stored, .. } => {
                format!("the sender has gone; {} images", stored.unwrap_or(0))
            }
        }
    }

    fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() {
            output.write_json_line(self)
        } else {
            output.write_text(&(self.text() + "\n"))
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let endpoint: Endpoint =
        args.listen.parse().map_err(|error| Failure::usage(format!("--listen: {error}")))?;
    let mut sink = Receiving::new(Directory::open(&args.to)?);
    let stop = context.stop_signal()?;
    let receiver = ImageReceiver::listen(&endpoint, ReceiverOptions::default())?;
    let address = receiver.local_endpoint().to_string();
    Line::Listening { address }.write(context.output)?;
    let mut said = Ok(());
    let mut observe = |event: ReceiveEvent<'_>| {
        if let Some(line) = Line::of(&event)
            && said.is_ok()
        {
            said = line.write(context.output);
        }
    };
    if args.once {
        let received = receiver.serve_one(&mut sink, &mut observe, &stop);
        if context.signals.caught().is_none() {
            received.map_err(|error| Failure::source_lost(error.to_string()))?;
        }
    } else {
        receiver.serve(&mut sink, &mut observe, &stop)?;
    }
    said?;
    // Being stopped is how receiving ends: it is no failure.
    Ok(Exit::Success)
}
