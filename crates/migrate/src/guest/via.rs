//! How the other side is reached.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    fd::AsFd,
    io::Errno,
    net::{AddressFamily, Shutdown, SocketFlags, SocketType, socketpair},
};

use crate::{
    Endpoint, MigrateError, Stop,
    net::{Stream, Timeouts},
};

/// How the other side is reached.
#[derive(Debug)]
#[non_exhaustive]
pub enum Via {
    /// By connecting to it, as often as there are to be connections.
    Endpoint(Endpoint),
    /// By one connected stream socket, which carries everything.
    Socket(OwnedFd),
    /// By one stream each way (pipes, say, of which ssh holds the other ends), which carry
    /// everything.
    Pipes {
        /// What the other side says comes here.
        input: OwnedFd,
        /// What the other side is to hear goes here.
        output: OwnedFd,
    },
    /// By nothing any more: what there was has been used up.
    Used,
}

impl Via {
    /// Whether there can be one connection only.
    pub(crate) fn is_single(&self) -> bool {
        !matches!(self, Self::Endpoint(_))
    }

    /// Makes one more connection.
    pub(crate) fn open(
        &mut self,
        limit: Duration,
        timeouts: Timeouts,
        stop: Option<&Stop>,
    ) -> Result<Stream, MigrateError> {
        let taken = |error| MigrateError::Io { what: "taking a stream over", error };
        match self {
            Self::Endpoint(endpoint) => {
                Stream::connect(endpoint, limit, timeouts, stop).map_err(|error| {
                    match error.kind() {
                        io::ErrorKind::Interrupted => MigrateError::Cancelled,
                        _ => MigrateError::Connect { endpoint: endpoint.clone(), error },
                    }
                })
            }
            _ => match std::mem::replace(self, Self::Used) {
                Self::Socket(socket) => Stream::new(socket, timeouts).map_err(taken),
                Self::Pipes { input, output } => bridge(input, output)
                    .and_then(|socket| Stream::new(socket, timeouts))
                    .map_err(taken),
                _ => Err(MigrateError::Misuse("the stream has been used up")),
            },
        }
    }
}

impl From<Endpoint> for Via {
    fn from(endpoint: Endpoint) -> Self {
        Self::Endpoint(endpoint)
    }
}

/// A socket that stands for two streams which may be anything: two threads copy what comes and
/// goes. They end with the streams or the socket.
fn bridge(input: OwnedFd, output: OwnedFd) -> io::Result<OwnedFd> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let other = theirs.try_clone()?;
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(name.into()).spawn(body)
    };
    spawn("pf-bridge-in", Box::new(move || copy(&input, &theirs, &theirs)))?;
    spawn("pf-bridge-out", Box::new(move || copy(&other, &output, &other)))?;
    Ok(ours)
}

/// Copies until either end is closed, and closes the socket's side of it then.
fn copy(from: &OwnedFd, to: &OwnedFd, socket: &OwnedFd) {
    let mut buffer = vec![0; 256 << 10];
    'all: loop {
        let mut rest = match rustix::io::read(from, &mut buffer[..]) {
            Ok(0) => break,
            Ok(n) => &buffer[..n],
            Err(Errno::INTR) => continue,
            Err(error) => {
                tracing::debug!(%error, "a stream ended");
                break;
            }
        };
        while !rest.is_empty() {
            match rustix::io::write(to.as_fd(), rest) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::debug!(%error, "a stream ended");
                    break 'all;
                }
            }
        }
    }
    // Whoever is at the other end of the socket notices; that it is closed already is no matter.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}
