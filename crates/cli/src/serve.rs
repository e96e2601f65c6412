//! `pageferry serve`: a memory image for any number of clients.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use pageferry::{
    image::RawImage,
    migrate::{Endpoint, ImageStore, PageServer, ServerOptions, ServerStats},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::{
    Context,
    exit::{self, Exit, Failure},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry serve guest.mem --listen 127.0.0.1:7777
  pageferry serve guest.mem --listen unix:/run/guest.sock --granule 2MiB
  pageferry serve guest.mem --listen '[::1]:0' --json

The image is the memory itself, byte for byte, and is never written. Clients speak the page-transfer
protocol (crates/migrate/docs/protocol.md). With port 0 the system picks one; the address is the
first line printed; whether anybody reads on is not asked, for it is for its clients that it serves.
There is no encryption and no authentication yet: listen on addresses that only
trusted clients reach.";

/// Serve a memory image, read-only, to any number of clients
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help_of_server(EXAMPLES))]
pub(crate) struct Args {
    /// The image: a file with the memory's bytes
    image: PathBuf,
    /// Where to listen: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// The unit in which clients ask for memory: a power of two, 4KiB at least
    #[arg(long, default_value = "4KiB", value_parser = size::parse, value_name = "SIZE")]
    granule: u64,
    /// Delay each answer by this many microseconds
    #[arg(long, default_value = "0", value_name = "N")]
    delay_us: u64,
}

/// What `--json` prints, a line each: when it begins to listen, and when it stops.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Event {
    Listening {
        address: String,
        bytes: u64,
    },
    Stopped {
        sessions: u64,
        refused: u64,
        failed: u64,
        requests: u64,
        granules_data: u64,
        granules_zero: u64,
        granules_poisoned: u64,
        bytes: u64,
    },
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    if !(args.granule.is_power_of_two() && (4096..=1 << 30).contains(&args.granule)) {
        let why = format!("--granule {}: a power of two from 4KiB to 1GiB", args.granule);
        return Err(Failure::usage(why).into());
    }
    let endpoint: Endpoint =
        args.listen.parse().map_err(|error| Failure::usage(format!("--listen: {error}")))?;
    let image = RawImage::open(&args.image)?;
    let bytes = image.length();
    if bytes == 0 {
        bail!("{}: the image is empty: there is no memory in it to serve", args.image.display());
    }
    let store = ImageStore::new(image, args.granule)
        .with_context(|| format!("serving {}", args.image.display()))?;
    let mut options = ServerOptions::default();
    options.delay = Duration::from_micros(args.delay_us);
    let server = PageServer::bind(&endpoint, Arc::new(store), options)?;
    let address = server.local_endpoint().to_string();
    if context.output.json() {
        context.output.write_json_line(&Event::Listening { address, bytes })?;
    } else {
        let image = args.image.display();
        let text = format!("listening on {address}: {image}, {}\n", size::display(bytes));
        context.output.write_text(&text)?;
    }
    let mut last = None;
    while context.signals.caught().is_none() {
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut fds = [PollFd::new(&context.signals, PollFlags::IN)];
        match poll(&mut fds, Some(&second)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for a signal"),
        }
        show(&server.stats(), &mut last, context);
    }
    server.stop();
    let stats = server.stats();
    if context.output.json() {
        context.output.write_json_line(&Event::Stopped {
            sessions: stats.sessions_opened,
            refused: stats.refused,
            failed: stats.failed,
            requests: stats.requests_demand + stats.requests_background,
            granules_data: stats.granules_data,
            granules_zero: stats.granules_zero,
            granules_poisoned: stats.granules_poisoned,
            bytes: stats.bytes,
        })?;
    }
    // Being stopped is how serving ends: it is no failure.
    Ok(Exit::Success)
}

/// Says what changed, on standard error, at most once a second.
fn show(stats: &ServerStats, last: &mut Option<(u64, u64)>, context: &Context) {
    let now = (stats.sessions, stats.granules());
    if context.output.json() || *last == Some(now) {
        return;
    }
    *last = Some(now);
    eprintln!(
        "{} sessions, {} granules served ({} zero, {} unreadable), {}",
        stats.sessions,
        stats.granules(),
        stats.granules_zero,
        stats.granules_poisoned,
        size::display(stats.bytes)
    );
}
