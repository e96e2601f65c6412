//! `pageferry receive`: the other end of `pageferry checkpoint --to HOST:PORT`.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use pageferry::{
    checkpoint::{Directory, Receiving},
    migrate::{Endpoint, ImageReceiver, MigrateError, ReceiveEvent, ReceiverOptions, Stop},
};
use serde::Serialize;

use crate::{
    Context,
    exit::{self, Exit, Failure},
    output::{self, Output},
};

/// A peer that says nothing for so long keeps nobody else out any longer: a true one speaks first,
/// and waits some times as long to be answered.
const HANDSHAKE: Duration = Duration::from_secs(1);

const EXAMPLES: &str = "\
Examples:
  pageferry receive --listen 192.0.2.7:7777 --to checkpoints/
  pageferry receive --listen '[::]:0' --to checkpoints/ --once --json

Writes the images that `pageferry checkpoint --to HOST:PORT` sends to a directory, each as it is made.
An image appears when it is complete and on disk; only then the sender is told so. If the sender is
lost, what it had begun is dropped, and what is complete stays. One sender at a time: others wait a
little, and are turned away then. It ends when nobody reads what it says any more (`| head`), after
the sender that is there. With port 0 the system picks one; the address is the first line
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

/// Whoever reads what is said.
struct Reader {
    state: Mutex<State>,
    /// Ends the receiving.
    stop: Stop,
}

#[derive(Default)]
struct State {
    /// A sender is being served.
    sending: bool,
    gone: bool,
}

impl Reader {
    /// Ends the receiving when nobody reads any more; a sender that is there is served to its end.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        if state.gone && !state.sending {
            self.stop.stop();
        }
    }

    fn see(&self, event: &ReceiveEvent<'_>) {
        match event {
            ReceiveEvent::Connected { .. } => self.update(|state| state.sending = true),
            ReceiveEvent::Ended { .. } => self.update(|state| state.sending = false),
            _ => {}
        }
    }

    /// Looks out for it while something else is done.
    fn watch<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let over = Over(Stop::new().context("making an eventfd")?);
        let done = over.0.clone();
        thread::scope(|scope| {
            let watching = thread::Builder::new()
                .name("pf-reader".into())
                .spawn_scoped(scope, || -> anyhow::Result<()> {
                    let done = done;
                    if output::wait_unread(&done)? {
                        self.update(|state| state.gone = true);
                    }
                    Ok(())
                })
                .context("starting a thread")?;
            let result = work();
            drop(over);
            watching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            result
        })
    }
}

/// Ends the looking out, also when what was done meanwhile panics.
struct Over(Stop);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.stop();
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let endpoint: Endpoint =
        args.listen.parse().map_err(|error| Failure::usage(format!("--listen: {error}")))?;
    let mut sink = Receiving::new(Directory::open(&args.to)?);
    let stop = context.stop_signal()?;
    let mut options = ReceiverOptions::default();
    options.handshake_timeout = HANDSHAKE;
    let receiver = ImageReceiver::listen(&endpoint, options)?;
    let address = receiver.local_endpoint().to_string();
    Line::Listening { address }.write(context.output)?;
    let reader = Reader { state: Mutex::default(), stop: stop.clone() };
    let mut said = Ok(());
    let mut observe = |event: ReceiveEvent<'_>| {
        reader.see(&event);
        if let Some(line) = Line::of(&event)
            && said.is_ok()
        {
            said = line.write(context.output);
        }
    };
    reader.watch(|| {
        if args.once {
            let received = receiver.serve_one(&mut sink, &mut observe, &stop);
            match received {
                Err(error)
                    if context.signals.caught().is_none()
                        && !matches!(*error.error, MigrateError::Stopped) =>
                {
                    Err(Failure::source_lost(error.to_string()).into())
                }
                _ => Ok(()),
            }
        } else {
            receiver.serve(&mut sink, &mut observe, &stop).map_err(Into::into)
        }
    })?;
    said?;
    // Being stopped is how receiving ends: it is no failure.
    Ok(Exit::Success)
}
