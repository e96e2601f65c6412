//! One connection to the control socket: one request, and its answer.

use std::{os::unix::net::UnixStream, sync::Arc};

use anyhow::{Context as _, bail};
use pageferry::migrate::Endpoint;

use super::{
    host::Host,
    protocol::{Heard, Reply, Request, TO_ASK, Wire},
    sending,
};

/// Answers whatever comes, and returns.
pub(super) fn serve(host: &Arc<Host>, stream: UnixStream) {
    // Who asks and goes away before the answer misses it, and nothing else.
    let _ = try_serve(host, stream);
}

fn try_serve(host: &Arc<Host>, stream: UnixStream) -> std::io::Result<()> {
    let mut wire = Wire::new(stream)?;
    let ending = std::os::fd::AsFd::as_fd(host.ending());
    let request = match wire.hear(Some(ending), Some(TO_ASK)) {
        Ok(Heard::Line(request)) => request,
        Ok(Heard::Closed) => return Ok(()),
        Ok(Heard::Interrupted) => {
            return wire.say(&Reply::Refused { why: "the guest has ended".to_owned() });
        }
        Ok(Heard::TimedOut) => {
            return wire.say(&Reply::Refused { why: "a request did not come".to_owned() });
        }
        Err(error) => return wire.say(&Reply::Refused { why: format!("no request: {error}") }),
    };
    let reply = match request {
        Request::Migrate(request) => sending::run(host, &request, &mut wire).map(|()| None),
        other => reply(host, &other).map(Some),
    };
    match reply {
        Ok(None) => Ok(()),
        Ok(Some(reply)) => wire.say(&reply),
        Err(error) => wire.say(&Reply::Refused { why: format!("{error:#}") }),
    }
}

fn done(said: impl Into<String>) -> anyhow::Result<Reply> {
    Ok(Reply::Done { said: said.into() })
}

fn reply(host: &Host, request: &Request) -> anyhow::Result<Reply> {
    match request {
        Request::Status => Ok(Reply::Status(host.status())),
        Request::Stop => {
            host.stop(false).map_err(anyhow::Error::msg)?;
            let finished = host.wait_finished();
            let (name, touches, wrong) = (&host.name, finished.touches, finished.mismatches);
            done(format!("{name} has ended: {touches} pages touched here, {wrong} wrong words"))
        }
        Request::Migration => match host.migration() {
            Some(line) => Ok(Reply::Event(line)),
            None => bail!("the guest has not been moved, and is not being moved"),
        },
        Request::Cancel => {
            if !host.outgoing()?.cancel() {
                bail!("it is too late: the guest has been given away");
            }
            done("called off")
        }
        Request::PostCopy => {
            host.outgoing()?.post_copy_now();
            done("the guest moves when this round is over, and its memory follows")
        }
        Request::Recover { at } => {
            let endpoint: Endpoint = at.parse()?;
            if let Some(incoming) = host.incoming() {
                let at = incoming.relisten(&endpoint)?;
                return done(format!("listening on {at}"));
            }
            host.outgoing()?.recover(endpoint)?;
            done(format!("the destination is at {at}"))
        }
        Request::Reclaim => {
            host.outgoing()?.reclaim()?;
            done("the guest goes on here")
        }
        Request::GiveUp => {
            host.outgoing()?.give_up()?;
            done("the guest is given up")
        }
        Request::Abandon => {
            let incoming = host.incoming().context("no guest's memory is arriving here")?;
            incoming.abandon()?;
            done("what is missing will not come")
        }
        Request::Migrate(_) => bail!("a migration is no short request"),
    }
}
