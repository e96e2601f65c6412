//! A guest that is sent away, as its process sees it.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use pageferry::migrate::{
    Compression, Endpoint, Event, MigrateError, MigrateOptions, Mode, OnNoConvergence, Outcome,
    SourceMigration,
    core::{ProtocolError, RefusalCode},
};

use super::{
    host::{Fate, Host},
    line::{Ended, Line, Progress, is_last},
    protocol::{MigrateRequest, Reply, Wire},
};

/// Between two lines of progress.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// The protocol's own bound.
const CONNECTIONS: u16 = 32;
/// Longer than anybody means.
const LONGEST_MS: u64 = 7 * 24 * 3600 * 1000;

/// Why what was asked for is no migration.
fn options(request: &MigrateRequest) -> anyhow::Result<(Endpoint, MigrateOptions)> {
    let endpoint: Endpoint = request.to.parse()?;
    let mut options = MigrateOptions::default();
    options.mode = match request.mode.as_str() {
        "pre" => Mode::PreCopy,
        "post" => Mode::PostCopy,
        "hybrid" => Mode::Hybrid,
        other => anyhow::bail!("{other:?} is no mode"),
    };
    options.compression = match request.compress.as_str() {
        "auto" => Compression::Auto,
        "none" => Compression::None,
        "lz4" => Compression::Lz4,
        "zstd" => Compression::Zstd,
        other => anyhow::bail!("{other:?} is no compression"),
    };
    options.on_no_convergence = match request.otherwise.as_str() {
        "switch" => OnNoConvergence::Switch,
        "post-copy" => OnNoConvergence::PostCopy,
        "throttle" => OnNoConvergence::Throttle,
        "give-up" => OnNoConvergence::GiveUp,
        other => anyhow::bail!("{other:?} is nothing to do when rounds do not help"),
    };
    if request.connections.max(request.demand_connections) > CONNECTIONS {
        anyhow::bail!("there can be {CONNECTIONS} connections");
    }
    if request.rounds == 0 || request.timeout_ms.max(request.downtime_ms) > LONGEST_MS {
        anyhow::bail!("no rounds, or a time of more than a week");
    }
    if request.bandwidth == Some(0) || request.background_bandwidth == Some(0) {
        anyhow::bail!("a bandwidth of 0 bytes a second");
    }
    options.connections = request.connections;
    options.demand_connections = request.demand_connections;
    options.downtime = Duration::from_millis(request.downtime_ms);
    options.timeout = Duration::from_millis(request.timeout_ms);
    options.rounds = request.rounds;
    options.precopy_bandwidth = request.bandwidth;
    options.background_bandwidth = request.background_bandwidth;
    Ok((endpoint, options))
}

/// Sends the guest away and tells how it goes, as long as somebody listens.
///
/// # Errors
/// Why it was not begun.
pub(super) fn run(host: &Host, request: &MigrateRequest, wire: &mut Wire) -> anyhow::Result<()> {
    let (endpoint, mut options) = options(request)?;
    let (sender, events) = mpsc::channel();
    options.observer = Some(Arc::new(move |event: &Event| {
        // Nobody listens any more when it is over.
        let _ = sender.send(event.clone());
    }));
    let guest = host.begin_sending()?;
    let migration = match SourceMigration::start(guest, endpoint, options) {
        Ok(migration) => Arc::new(migration),
        Err(error) => {
            host.sent(None, None);
            return Err(error.into());
        }
    };
    host.sending(&migration);
    let mut listener = Listener(Some(wire));
    listener.tell(Line::Started {
        to: request.to.clone(),
        mode: request.mode.clone(),
        memory_bytes: migration.status().memory,
    });
    follow(&events, |event| match event {
        Some(event) => {
            if let Some(line) = Line::of(event) {
                listener.tell(line);
            }
        }
        None => listener.tell(Line::Progress(Progress::of_source(&migration.status()))),
    });
    let result = migration.wait();
    let (ended, fate) = outcome(&migration, result.as_ref().map_err(|error| &**error));
    drop(migration);
    let gone = fate.is_some();
    host.sent(Some(ended.clone()), fate);
    if gone {
        host.wait_finished();
    }
    listener.tell(Line::Ended(ended));
    Ok(())
}

/// Passes events on, and `None` several times a second, until the last has come.
pub(super) fn follow(events: &mpsc::Receiver<Event>, mut each: impl FnMut(Option<&Event>)) {
    let mut due = Instant::now() + TICK;
    loop {
        match events.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(event) => {
                each(Some(&event));
                if matches!(event, Event::Stage(stage) if is_last(stage)) {
                    return;
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                each(None);
                due = Instant::now() + TICK;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Whoever asked for the migration, as long as it listens.
struct Listener<'a>(Option<&'a mut Wire>);

impl Listener<'_> {
    fn tell(&mut self, line: Line) {
        if let Some(wire) = &mut self.0
            && wire.say(&Reply::Event(line)).is_err()
        {
            self.0 = None;
        }
    }
}

/// Whether it failed because the peer is gone, or going, and not by what was said.
pub(super) fn is_peer_lost(error: &MigrateError) -> bool {
    match error {
        MigrateError::Connect { .. }
        | MigrateError::Io { .. }
        | MigrateError::Silent { .. }
        | MigrateError::Closed
        | MigrateError::Left
        | MigrateError::Gone { .. }
        | MigrateError::Protocol(ProtocolError::Truncated(_)) => true,
        MigrateError::Protocol(ProtocolError::Refused(refusal)) => {
            matches!(refusal.code, RefusalCode::Stopping | RefusalCode::Silent)
        }
        _ => false,
    }
}

fn outcome(
    migration: &SourceMigration,
    result: Result<&Outcome, &MigrateError>,
) -> (Ended, Option<Fate>) {
    let mut ended = Ended::of_source(&migration.status());
    let mut say = |outcome: &str, guest: &str| {
        (ended.outcome, ended.guest) = (outcome.to_owned(), guest.to_owned());
    };
    let fate = match result {
        Ok(Outcome::Completed) => {
            say("completed", "there");
            Some(Fate::Moved)
        }
        Ok(_) | Err(MigrateError::Cancelled) => {
            say("cancelled", "here");
            None
        }
        Err(error) => {
            let fate = match error {
                MigrateError::Gone { .. } => {
                    say("failed", "lost");
                    Some(Fate::Lost(error.to_string()))
                }
                MigrateError::NotResumed(_) => {
                    say("failed", "stopped-here");
                    None
                }
                _ => {
                    say("failed", "here");
                    None
                }
            };
            ended.error = Some(error.to_string());
            ended.peer_lost = is_peer_lost(error);
            fate
        }
    };
    (ended, fate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> MigrateRequest {
        MigrateRequest {
            to: "127.0.0.1:7000".into(),
            mode: "hybrid".into(),
            connections: 1,
            demand_connections: 1,
            compress: "auto".into(),
            downtime_ms: 300,
            timeout_ms: 60_000,
            rounds: 30,
            otherwise: "switch".into(),
            bandwidth: None,
            background_bandwidth: None,
        }
    }

    #[test]
    fn what_a_client_may_not_ask_for() {
        assert!(options(&request()).is_ok());
        let cases: [fn(&mut MigrateRequest); 11] = [
            |r| r.to = "nowhere".into(),
            |r| r.mode = "later".into(),
            |r| r.compress = "zip".into(),
            |r| r.otherwise = "hope".into(),
            |r| r.connections = 33,
            |r| r.demand_connections = 33,
            |r| r.rounds = 0,
            |r| r.timeout_ms = u64::MAX,
            |r| r.downtime_ms = u64::MAX,
            |r| r.bandwidth = Some(0),
            |r| r.background_bandwidth = Some(0),
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let mut request = request();
            case(&mut request);
            assert!(options(&request).is_err(), "{number}");
        }
    }
}
