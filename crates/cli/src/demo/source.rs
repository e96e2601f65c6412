//! The other process: it holds the memory and serves it.

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use pageferry::{
    memory::{Backing, GuestAddress, Layout, PageSize, Region, RegionConfig},
    migrate::{Endpoint, MemoryStore, PageServer, ServerOptions},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::pattern::{Contents, PAGE};
use crate::{
    Context,
    exit::{Exit, Failure},
};

/// Serves a patterned memory to `pageferry demo`
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Each region: where the guest has it, and how long it is
    #[arg(long, required = true)]
    region: Vec<WireRegion>,
    #[arg(long)]
    granule: u64,
    #[arg(long)]
    contents: Contents,
    #[arg(long)]
    delay_us: u64,
}

/// A region, as one process tells the other of it.
#[derive(Copy, Clone, Debug)]
struct WireRegion {
    base: u64,
    bytes: u64,
}

impl fmt::Display for WireRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.base, self.bytes)
    }
}

impl FromStr for WireRegion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (base, bytes) = text.split_once('+').ok_or("not BASE+BYTES")?;
        let number = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
        Ok(Self { base: number(base)?, bytes: number(bytes)? })
    }
}

/// What the source says once it serves, in front of its address.
const READY: &str = "serving ";

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    // However the destination ends, this process does not outlive it, not even stopped.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let mut regions = Vec::new();
    for WireRegion { base, bytes } in &args.region {
        let mut config = RegionConfig::new(*bytes, Backing::Anonymous);
        config.guest_base = GuestAddress::new(*base);
        config.granule = PageSize::try_new(args.granule);
        regions.push(Arc::new(Region::new(&config)?));
    }
    for region in &regions {
        args.contents.fill(region)?;
    }
    let layout = Arc::new(Layout::new(regions)?);
    let mut options = ServerOptions::default();
    options.delay = Duration::from_micros(args.delay_us);
    let endpoint: Endpoint = "127.0.0.1:0".parse()?;
    let server = PageServer::bind(&endpoint, Arc::new(MemoryStore::new(layout)), options)?;
    println!("{READY}{}", server.local_endpoint());
    std::io::stdout().flush()?;
    // The destination holds the other end of our standard input, and closes it when it is done.
    let stdin = std::io::stdin();
    loop {
        let mut fds =
            [PollFd::new(&stdin, PollFlags::IN), PollFd::new(&context.signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for the destination"),
        }
        let mut byte = [0];
        let closed = !fds[0].revents().is_empty() && stdin.lock().read(&mut byte)? == 0;
        if closed || context.signals.caught().is_some() {
            break;
        }
    }
    server.stop();
    Ok(Exit::Success)
}

/// The granule of the memory, of which all regions have the same.
pub(super) fn granule_of(layout: &Layout) -> u64 {
    layout.iter().map(|(_, region)| region.granule().bytes()).max().unwrap_or(PAGE)
}

/// How long a source that is not needed any more may take to end by itself.
const LEAVING: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// The source process, as the destination sees it. Dropping it ends it.
pub(super) struct Source {
    process: Process,
    pub(super) endpoint: Endpoint,
}

impl Source {
    /// Starts it and waits until it serves.
    pub(super) fn start(
        layout: &Layout,
        contents: Contents,
        delay: Duration,
        context: &Context,
    ) -> anyhow::Result<Self> {
        let myself = std::env::current_exe().context("finding this program to start the source")?;
        let mut command = Command::new(&myself);
        command.arg("demo-source");
        for (_, region) in layout.iter() {
            let region = WireRegion { base: region.guest_base().get(), bytes: region.len() };
            command.args(["--region", &region.to_string()]);
        }
        let child = command
            .args(["--granule", &granule_of(layout).to_string()])
            .args(["--contents", &contents.to_string()])
            .args(["--delay-us", &delay.as_micros().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} as the source", myself.display()))?;
        let mut process = Process(child);
        let stdout = process.0.stdout.take().context("the source has a standard output")?;
        // Filling much memory takes long. What it says then, it says in one write.
        let mut fds =
            [PollFd::new(&stdout, PollFlags::IN), PollFd::new(&context.signals, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, None)).context("waiting for the source")?;
        if let Err(stopped) = context.stop_if_asked() {
            // It would not notice before it has filled its memory.
            process.0.kill().context("ending the source")?;
            return Err(stopped);
        }
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let endpoint = match read {
            Ok(_) => line.trim_end().strip_prefix(READY).map(str::parse),
            Err(_) => None,
        };
        match endpoint {
            Some(Ok(endpoint)) => Ok(Self { process, endpoint }),
            _ => {
                let status = process.end()?;
                Err(Failure::source_lost(format!(
                    "the source process ended before it served anything ({status})"
                ))
                .into())
            }
        }
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.process.0.id()
    }
}

/// A process that ends when its standard input does.
struct Process(Child);

impl Process {
    /// Lets it end by itself, and kills it if it does not.
    fn end(&mut self) -> io::Result<ExitStatus> {
        drop(self.0.stdin.take());
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        let handle = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty())?;
        let mut fds = [PollFd::new(&handle, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut fds, Some(&LEAVING)))? == 0 {
            self.0.kill()?;
        }
        self.0.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("pageferry: waiting for the source process: {error}");
        }
    }
}
