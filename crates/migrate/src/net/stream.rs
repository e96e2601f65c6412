//! A connected TCP or Unix stream socket.

use std::{
    io,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::{AsFd, OwnedFd},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
        sockopt::{self, Timeout},
    },
};

use super::{
    Piece, Place, Stop, Woken,
    piece::{read_places, send_pieces},
};
use crate::Endpoint;

/// How long a call on a stream may block.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Timeouts {
    /// Until a read gives up, and the reader looks around.
    pub(crate) read: Duration,
    /// Without a byte of progress, until a write gives up.
    pub(crate) write: Duration,
}

/// A connected socket in blocking mode.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
}

/// Send buffer asked for on Unix sockets, whose buffers do not grow by themselves.
const UNIX_BUFFER: usize = 1 << 20;

/// Buffers of a connection that somebody may wait for.
const SHORT_QUEUE: usize = 512 << 10;

impl Stream {
    /// Connects within `limit`; with an error of kind `Interrupted` when `stop` is called for
    /// before.
    pub(crate) fn connect(
        endpoint: &Endpoint,
        limit: Duration,
        timeouts: Timeouts,
        stop: Option<&Stop>,
    ) -> io::Result<Self> {
        let socket = match endpoint {
            Endpoint::Tcp(address) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "no address of that name");
                let mut connected = None;
                for address in address.as_str().to_socket_addrs()? {
                    match connect_tcp(&address, limit, stop) {
                        Ok(socket) => {
                            connected = Some(socket);
                            break;
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                            return Err(error);
                        }
                        Err(error) => last = error,
                    }
                }
                connected.ok_or(last)?
            }
            Endpoint::Unix(path) => connect_unix(path, limit, stop)?,
        };
        Self::new(socket, timeouts)
    }

    /// Takes a connected socket.
    pub(crate) fn new(socket: OwnedFd, timeouts: Timeouts) -> io::Result<Self> {
        if sockopt::socket_domain(&socket)? == AddressFamily::UNIX {
            // The kernel caps this at its own limit; less is only slower.
            sockopt::set_socket_send_buffer_size(&socket, UNIX_BUFFER)?;
        } else {
            sockopt::set_tcp_nodelay(&socket, true)?;
        }
        sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeouts.write))?;
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(timeouts.read))?;
        Ok(Self { socket })
    }

    pub(crate) fn set_read_timeout(&self, limit: Duration) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.socket, Timeout::Recv, Some(limit))?)
    }

    /// Reads into `place` and, what is more, into `after`; 0 at the end, `None` when the read
    /// timeout passed.
    pub(crate) fn read(&self, mut place: Place<'_>, after: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match read_places(self.socket.as_fd(), place.rest(0), after) {
                Ok(n) => return Ok(Some(n)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends all of `bytes`. Allocates nothing, so that it can be called from a signal handler.
    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        self.send_flags(bytes, SendFlags::NOSIGNAL)
    }

    /// Sends `bytes` if there is room for them now; the connection is about to be closed.
    pub(crate) fn send_last(&self, bytes: &[u8]) -> Result<(), Errno> {
        self.send_flags(bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_flags(&self, mut bytes: &[u8], flags: SendFlags) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.socket, bytes, flags) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Errno::TIMEDOUT),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends all of `pieces`, using them up.
    pub(crate) fn send_pieces(&self, mut pieces: &mut [Piece<'_>]) -> io::Result<()> {
        loop {
            while pieces.first().is_some_and(Piece::is_empty) {
                pieces = &mut pieces[1..];
            }
            if pieces.is_empty() {
                return Ok(());
            }
            let mut sent = match send_pieces(self.socket.as_fd(), pieces) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Errno::TIMEDOUT.into());
                }
                Err(error) => return Err(error),
            };
            while sent > 0 {
                let n = sent.min(pieces[0].len());
                pieces[0] = pieces[0].slice(n..pieces[0].len());
                sent -= n;
                if pieces[0].is_empty() {
                    pieces = &mut pieces[1..];
                }
            }
        }
    }

    /// Lets no more than a moment's worth of bytes wait on the way: on a connection behind whose
    /// bytes somebody may wait, more would only be more to wait for.
    pub(crate) fn shorten_queue(&self) {
        for set in [
            sockopt::set_socket_send_buffer_size(&self.socket, SHORT_QUEUE),
            sockopt::set_socket_recv_buffer_size(&self.socket, SHORT_QUEUE),
        ] {
            if let Err(error) = set {
                tracing::debug!(%error, "a buffer stays as it is");
            }
        }
    }

    /// Whether a small frame can be sent without waiting.
    pub(crate) fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Waits until there is something to read, at most for `limit`.
    pub(crate) fn wait_readable(&self, stop: &Stop, limit: Duration) -> io::Result<Woken> {
        stop.wait(&[self.socket.as_fd()], PollFlags::IN, limit)
    }

    /// Ends both directions: every blocked call on the socket returns, here and at the peer.
    pub(crate) fn shutdown(&self) {
        // ENOTCONN says that the peer was faster; there is nothing else it could say.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Ends the sending direction and reads away what the peer sent, at most until `limit` has
    /// passed. A socket closed with unread bytes resets the connection, and the peer would lose
    /// the last frame sent to it.
    pub(crate) fn linger(&self, limit: Duration) {
        if rustix::net::shutdown(&self.socket, Shutdown::Write).is_err()
            || self.set_read_timeout(limit / 4).is_err()
        {
            return;
        }
        let until = std::time::Instant::now() + limit;
        let mut bin = [0; 4096];
        while std::time::Instant::now() < until {
            match rustix::net::recv(&self.socket, &mut bin[..], RecvFlags::empty()) {
                Ok((0, _)) => return,
                Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => return,
            }
        }
    }
}

fn connect_tcp(address: &SocketAddr, limit: Duration, stop: Option<&Stop>) -> io::Result<OwnedFd> {
    let Some(stop) = stop else {
        return TcpStream::connect_timeout(address, limit).map(OwnedFd::from);
    };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            let until = Instant::now() + limit;
            loop {
                let left = until.saturating_duration_since(Instant::now());
                match stop.wait(&[socket.as_fd()], PollFlags::OUT, left)? {
                    Woken::Ready => break,
                    Woken::Stopped => return Err(io::ErrorKind::Interrupted.into()),
                    // A signal ends a wait early.
                    Woken::TimedOut if Instant::now() >= until => {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Woken::TimedOut => {}
                }
            }
            sockopt::socket_error(&socket)??;
        }
        Err(error) => return Err(error.into()),
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// How often a connect to a busy Unix socket looks whether it is to stop.
const UNIX_TICK: Duration = Duration::from_millis(100);

fn connect_unix(path: &Path, limit: Duration, stop: Option<&Stop>) -> io::Result<OwnedFd> {
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let tick = if stop.is_some() { left.min(UNIX_TICK) } else { left };
        // unix(7): a connect to a full backlog waits for the send timeout.
        sockopt::set_socket_timeout(&socket, Timeout::Send, Some(tick))?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN) if stop.is_some_and(Stop::is_stopped) => {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Err(Errno::AGAIN) if Instant::now() < until => {}
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}
