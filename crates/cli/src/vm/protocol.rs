//! What is said over the control socket of a guest: lines of JSON, one request to a connection.
//!
//! ```text
//! asks     {"do":"status"}
//! answers  {"reply":"status","name":"a","pid":4711,"state":"running",…}
//!
//! asks     {"do":"migrate","to":"192.0.2.7:7000","mode":"hybrid","connections":1,…}
//! answers  {"reply":"event","event":"started",…}
//!          {"reply":"event","event":"progress",…}     several a second, and what happens in between
//!          {"reply":"event","event":"ended","outcome":"completed",…}
//! ```
//!
//! * `do` is `status`, `stop`, `migrate`, `migration`, `cancel`, `post-copy`, `recover`, `reclaim`,
//!   `give-up` or `abandon`. All but `status`, `migration` and `migrate` are answered with
//!   `{"reply":"done","said":…}`, and anything with `{"reply":"refused","why":…}`.
//! * A request has 10 seconds to come, and a line [`LONGEST`] bytes to be long. Fields that are not
//!   known are refused. An answer that nobody takes for 5 seconds is dropped with the connection;
//!   what was asked goes on.
//! * A migration does not end with the connection that asked for it: `cancel` ends it.

use std::{
    io::{self, Read as _, Write as _},
    os::{fd::BorrowedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::line::Line;

/// Bytes of the longest line, its end among them.
pub(crate) const LONGEST: usize = 64 << 10;
/// For a request to come.
pub(crate) const TO_ASK: Duration = Duration::from_secs(10);
/// For an answer to be taken.
const TO_ANSWER: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// How the guest is.
    Status,
    /// Its end; answered when it has ended.
    Stop,
    /// Send it away.
    Migrate(MigrateRequest),
    /// How the migration goes, or went: with [`Line::Progress`] or [`Line::Ended`].
    Migration,
    /// Call the migration off.
    Cancel,
    /// Let the guest move now, and the rest of its memory follow.
    PostCopy,
    /// After a loss: where the other side is (said to the source), or is to be waited for (said to
    /// the destination).
    Recover { at: String },
    /// After a loss, to the source: the destination never ran the guest, and never will.
    Reclaim,
    /// After a loss, to the source: the destination is gone, and the guest with it.
    GiveUp,
    /// After a loss, to the destination: what is missing will never come.
    Abandon,
}

/// What a migration is to be.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrateRequest {
    /// An endpoint.
    pub(crate) to: String,
    /// `pre`, `post` or `hybrid`.
    pub(crate) mode: String,
    /// 0 to 32.
    pub(crate) connections: u16,
    /// 0 to 32.
    pub(crate) demand_connections: u16,
    /// `auto`, `none`, `lz4` or `zstd`.
    pub(crate) compress: String,
    pub(crate) downtime_ms: u64,
    pub(crate) timeout_ms: u64,
    pub(crate) rounds: u32,
    /// `switch`, `post-copy`, `throttle` or `give-up`.
    pub(crate) otherwise: String,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bandwidth: Option<u64>,
    /// The same for post-copy's background.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) background_bandwidth: Option<u64>,
}

/// What is answered.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub(crate) enum Reply {
    Status(Status),
    Done { said: String },
    Refused { why: String },
    Event(Line),
}

/// How a guest is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) name: String,
    pub(crate) pid: u32,
    /// `waiting` and `arriving` (to a receiver), `running`, `completing` (it runs, and memory is
    /// still to come), `moving`, `moved` (its memory is still needed here), `ended`.
    pub(crate) state: String,
    /// 0 while they are not known, and so on.
    pub(crate) vcpus: u16,
    pub(crate) memory_bytes: u64,
    /// Pages touched since it was first started, wherever; the contents of each were checked.
    pub(crate) touches: u64,
    /// Where a receiver listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) listening: Option<String>,
}

/// What came of waiting for a line.
#[derive(Debug)]
pub(crate) enum Heard<T> {
    Line(T),
    /// The other side has gone.
    Closed,
    /// The other descriptor is readable.
    Interrupted,
    TimedOut,
}

/// One end of a control connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Wire {
    /// # Errors
    /// setsockopt(2)'s, or fcntl(2)'s.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(TO_ANSWER))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Says something.
    ///
    /// # Errors
    /// send(2)'s; [`io::ErrorKind::InvalidData`] for what is too long to be read there.
    pub(crate) fn say(&mut self, what: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(what)?;
        text.push(b'\n');
        if text.len() > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line too long to be sent"));
        }
        self.stream.write_all(&text)
    }

    /// Waits for a line, or for `also` to become readable, or until `limit` is over.
    ///
    /// # Errors
    /// recv(2)'s; [`io::ErrorKind::InvalidData`] for what is no such line, or too long.
    pub(crate) fn hear<T: DeserializeOwned>(
        &mut self,
        also: Option<BorrowedFd<'_>>,
        limit: Option<Duration>,
    ) -> io::Result<Heard<T>> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = parse(&self.buffer[..end]);
                self.buffer.drain(..=end);
                return line.map(Heard::Line).map_err(io::Error::from);
            }
            if self.buffer.len() >= LONGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line that is too long"));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
            let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
            fds.extend(also.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(Heard::TimedOut),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if fds.get(1).is_some_and(|also| !also.revents().is_empty()) {
                return Ok(Heard::Interrupted);
            }
            let mut bytes = [0; 4096];
            let room = bytes.len().min(LONGEST - self.buffer.len());
            match self.stream.read(&mut bytes[..room]) {
                Ok(0) => return Ok(Heard::Closed),
                Ok(count) => self.buffer.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Heard::Closed);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// One line. It must be an object: what is taken apart by its tag may be an array otherwise.
fn parse<T: DeserializeOwned>(line: &[u8]) -> serde_json::Result<T> {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line)?;
    serde_json::from_value(object.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Wire, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (Wire::new(here).unwrap(), there)
    }

    #[test]
    fn requests_as_they_are_written() {
        let texts = [
            (r#"{"do":"status"}"#, Some(Request::Status)),
            (r#"{"do":"recover","at":"a:1"}"#, Some(Request::Recover { at: "a:1".into() })),
            (r#"{"do":"recover","at":"a:1","why":"x"}"#, None),
            (r#"{"do":"recover"}"#, None),
            (r#"{"do":"dance"}"#, None),
            (r#"{"do":"migrate","to":"a:1"}"#, None),
            (r#"["status"]"#, None),
            ("", None),
            ("status", None),
        ];
        for (text, expected) in texts {
            assert_eq!(parse(text.as_bytes()).ok(), expected, "{text}");
        }
    }

    #[test]
    fn lines_are_bounded_in_length_and_time() {
        let (mut wire, mut there) = pair();
        let short = Some(Duration::from_millis(10));
        there.write_all(b"{\"do\":\"status\"}\n{\"do\":\"st").unwrap();
        assert!(matches!(wire.hear(None, short), Ok(Heard::Line(Request::Status))));
        assert!(matches!(wire.hear::<Request>(None, short), Ok(Heard::TimedOut)));
        there.write_all(b"op\"}\n").unwrap();
        assert!(matches!(wire.hear(None, short), Ok(Heard::Line(Request::Stop))));
        drop(there);
        assert!(matches!(wire.hear::<Request>(None, None), Ok(Heard::Closed)));

        let (mut wire, mut there) = pair();
        let writer = std::thread::spawn(move || there.write_all(&vec![b' '; LONGEST]));
        let error = wire.hear::<Request>(None, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn something_else_may_be_waited_for_too() {
        let (mut wire, _there) = pair();
        let (other, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(b"x").unwrap();
        let also = std::os::fd::AsFd::as_fd(&other);
        assert!(matches!(wire.hear::<Request>(Some(also), None), Ok(Heard::Interrupted)));
    }
}
