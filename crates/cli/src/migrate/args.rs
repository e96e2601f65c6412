//! What can be asked of `pageferry migrate`.

use std::{num::NonZeroU64, time::Duration};

use anyhow::Context as _;
use clap::ValueEnum;
use pageferry::migrate::Endpoint;

use crate::{
    exit::{self, Failure},
    size,
    vm::{place::Name, protocol::MigrateRequest},
};

const EXAMPLES: &str = "\
Examples:
  pageferry migrate --from a --to 192.0.2.7:7000
  pageferry migrate --from a --to unix:/run/b.sock --mode pre --downtime 50ms --otherwise give-up
  pageferry migrate --from a --to '[2001:db8::7]:7000' --connections 4 --compress none --json
  pageferry migrate status a
  pageferry migrate cancel a

The guest's own process (`pageferry vm run`) connects and sends; this command asks it to, and shows
how it goes. At the other end `pageferry vm receive` waits. The modes:
  pre     its memory is copied in rounds while it runs here, and it moves when little is left
  post    it moves at once, and its memory comes when it is touched, and in the background
  hybrid  one round, then as post; only what was written during the round comes late

SIGINT and SIGTERM call the migration off, as long as the guest runs here; afterwards they end this
command only. Ends with 0 when the guest runs there with all of its memory, with 1 if it was called
off or failed, and with 4 if it failed because the destination is gone or cannot be reached, or the
guest's process is gone. Where it failed, the guest goes on here unless the message says otherwise.

When the connection is lost after the guest has moved, both sides wait; the guest's threads that need
memory stand still. `recover` on both sides lets them go on: it says where the other side is now (to
the source), and where it is to be waited for (to the destination). If one side is gone for good:
`reclaim` takes back a guest that never ran there; `give-up` (at the source) and `abandon` (at the
destination) end a migration that cannot be completed.";

/// Move a running guest to another process or host
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(super) action: Option<Action>,
    #[command(flatten)]
    pub(super) go: GoArgs,
}

#[derive(clap::Subcommand, Debug)]
pub(super) enum Action {
    /// Tell how a guest's migration goes, or went
    Status(NameArgs),
    /// Call a migration off, as long as the guest is here
    Cancel(NameArgs),
    /// Let the guest move now, and the rest of its memory follow
    Postcopy(NameArgs),
    /// After a loss: where the other side is, or is to be waited for
    Recover(RecoverArgs),
    /// After a loss: take the guest back, as the destination never ran it and never will
    Reclaim(NameArgs),
    /// After a loss: the destination is gone for good, and the guest with it
    GiveUp(NameArgs),
    /// After a loss, at the destination: what is missing will never come
    Abandon(NameArgs),
}

#[derive(clap::Args, Debug)]
pub(super) struct NameArgs {
    /// The guest's name
    pub(super) name: Name,
}

#[derive(clap::Args, Debug)]
pub(super) struct RecoverArgs {
    /// The guest's name
    pub(super) name: Name,
    /// The address: HOST:PORT, or unix:PATH
    #[arg(long, visible_alias = "to", value_name = "ADDR")]
    pub(super) at: String,
}

#[derive(clap::Args, Debug)]
pub(super) struct GoArgs {
    /// The guest's name
    #[arg(long, required = true, value_name = "NAME")]
    pub(super) from: Option<Name>,
    /// Where the receiver listens: HOST:PORT, or unix:PATH
    #[arg(long, required = true, value_name = "ADDR")]
    to: Option<String>,
    /// When the guest moves
    #[arg(long, value_enum, default_value = "hybrid")]
    mode: ModeName,
    /// Connections that carry pages, 0 to 32
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(..=32), value_name = "N")]
    connections: u16,
    /// Connections that carry pages that are waited for, 0 to 32
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(..=32), value_name = "N")]
    demand_connections: u16,
    /// How pages are compressed; auto: by lz4, where that is measured to pay
    #[arg(long, value_enum, default_value = "auto")]
    compress: CompressName,
    /// How long the guest may stand still, if that can be had
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration, value_name = "TIME")]
    downtime: Duration,
    /// For all rounds together
    #[arg(long, default_value = "5m", value_parser = humantime::parse_duration, value_name = "TIME")]
    timeout: Duration,
    /// Most rounds
    #[arg(long, default_value = "30", value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    rounds: u32,
    /// What to do when further rounds do not help
    #[arg(long, value_enum, default_value = "switch")]
    otherwise: OtherwiseName,
    /// Most bytes a second while the guest runs here [default: no bound]
    #[arg(long, value_parser = parse_bandwidth, value_name = "SIZE")]
    bandwidth: Option<NonZeroU64>,
    /// Most bytes a second in the background, when the guest has moved [default: no bound]
    #[arg(long, value_parser = parse_bandwidth, value_name = "SIZE")]
    background_bandwidth: Option<NonZeroU64>,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum ModeName {
    Pre,
    Post,
    Hybrid,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum CompressName {
    Auto,
    None,
    Lz4,
    Zstd,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum OtherwiseName {
    /// Stop the guest, however long the rest takes
    Switch,
    /// Let it move, and the rest follow
    PostCopy,
    /// Slow its vCPUs down
    Throttle,
    /// Leave it where it is
    GiveUp,
}

fn parse_bandwidth(text: &str) -> Result<NonZeroU64, String> {
    let bytes = size::parse(text.strip_suffix("/s").unwrap_or(text))?;
    NonZeroU64::new(bytes).ok_or_else(|| "more than nothing".to_owned())
}

/// An option's value, as the user types it and as the control protocol has it.
fn name_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// An endpoint that means the same in another process: a path may be relative to this one's
/// directory.
pub(super) fn endpoint(option: &str, text: &str) -> anyhow::Result<String> {
    let endpoint: Endpoint =
        text.parse().map_err(|error| Failure::usage(format!("{option}: {error}")))?;
    Ok(match endpoint {
        Endpoint::Unix(path) => {
            let path = std::path::absolute(path).context("finding the current directory")?;
            Endpoint::Unix(path).to_string()
        }
        other => other.to_string(),
    })
}

impl GoArgs {
    /// Whose guest, and what is asked.
    pub(super) fn request(&self) -> anyhow::Result<(&Name, MigrateRequest)> {
        let (Some(from), Some(to)) = (&self.from, &self.to) else {
            return Err(Failure::usage("--from and --to are needed").into());
        };
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let request = MigrateRequest {
            to: endpoint("--to", to)?,
            mode: name_of(&self.mode),
            connections: self.connections,
            demand_connections: self.demand_connections,
            compress: name_of(&self.compress),
            downtime_ms: ms(self.downtime),
            timeout_ms: ms(self.timeout),
            rounds: self.rounds,
            otherwise: name_of(&self.otherwise),
            bandwidth: self.bandwidth.map(NonZeroU64::get),
            background_bandwidth: self.background_bandwidth.map(NonZeroU64::get),
        };
        Ok((from, request))
    }
}
