//! Sockets between the programs of one machine; there is no other network.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Brings up `lo`, to which the kernel itself gives 127.0.0.1 then.
#[allow(unsafe_code)]
pub(crate) fn loopback_up() -> io::Result<()> {
    // Bound to the wildcard address, which needs no interface.
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: a C structure of integers and bytes, for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call; netdevice(7).
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
