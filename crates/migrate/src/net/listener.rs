//! A listening TCP or Unix socket that can be told to stop.

use std::{
    fs, io,
    net::TcpListener,
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

use crate::Endpoint;

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf, identity: (u64, u64) },
}

/// Accepts connections until it is stopped; removes its Unix socket when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Socket,
    stop: OwnedFd,
}

impl Listener {
    /// Listens at `endpoint`. A Unix socket file that nobody listens at any more is replaced.
    pub(crate) fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        let socket = match endpoint {
            Endpoint::Tcp(address) => {
                let listener = TcpListener::bind(address.as_str())?;
                listener.set_nonblocking(true)?;
                Socket::Tcp(listener)
            }
            Endpoint::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && stale(path) => {
                        fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    other => other?,
                };
                listener.set_nonblocking(true)?;
                Socket::Unix { listener, path: path.clone(), identity: identity(path)? }
            }
        };
        Ok(Self { socket, stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Where it listens: with the port that the kernel chose.
    pub(crate) fn endpoint(&self) -> io::Result<Endpoint> {
        Ok(match &self.socket {
            Socket::Tcp(listener) => listener.local_addr()?.into(),
            Socket::Unix { path, .. } => Endpoint::Unix(path.clone()),
        })
    }

    /// The next connection with its peer's name; `None` when `limit` passed or
    /// [`stop`](Self::stop) was called.
    pub(crate) fn accept(&self, limit: Duration) -> io::Result<Option<(OwnedFd, String)>> {
        let listener = self.as_fd();
        let mut fds =
            [PollFd::new(&listener, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[0].revents().is_empty() {
            return Ok(None);
        }
        let accepted = match &self.socket {
            Socket::Tcp(listener) => listener.accept().and_then(|(stream, peer)| {
                stream.set_nonblocking(false)?;
                Ok((OwnedFd::from(stream), peer.to_string()))
            }),
            Socket::Unix { listener, path, .. } => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok((OwnedFd::from(stream), format!("unix:{}", path.display())))
            }),
        };
        match accepted {
            Ok(connection) => Ok(Some(connection)),
            // The peer has left again, or was never there.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether [`stop`](Self::stop) was called.
    pub(crate) fn is_stopped(&self) -> bool {
        self.wait_stopped(Duration::ZERO)
    }

    /// Waits for that, at most for `limit`; tells whether it came.
    pub(crate) fn wait_stopped(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut fds = [PollFd::new(&self.stop, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
    }

    /// Makes [`accept`](Self::accept) return, now and from now on.
    pub(crate) fn stop(&self) {
        // EAGAIN: the counter is full, so it is readable.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix { listener, .. } => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix { path, identity: ours, .. } = &self.socket
            // Somebody else's socket may have taken the place meanwhile.
            && identity(path).is_ok_and(|found| found == *ours)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "the socket file stays behind");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Whether `path` is a socket at which nobody listens.
fn stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
