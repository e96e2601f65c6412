//! Where a peer listens.

use std::{fmt, path::PathBuf, str::FromStr};

/// An address to listen at or to connect to: `unix:/path` or `host:port`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Endpoint {
    /// `host:port`; an IPv6 address stands in brackets. Port 0, for listening, lets the kernel
    /// choose.
    Tcp(String),
    /// A Unix stream socket at this path.
    Unix(PathBuf),
}

/// Why a text is no endpoint.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is not an endpoint ({why}): write unix:/path, host:port or [ipv6]:port")]
pub struct EndpointError {
    text: String,
    why: &'static str,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let error = |why| Err(EndpointError { text: text.to_owned(), why });
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { error("no path") } else { Ok(Self::Unix(path.into())) };
        }
        let address = text.strip_prefix("tcp:").unwrap_or(text);
        let Some((host, port)) = address.rsplit_once(':') else { return error("no port") };
        if host.is_empty() {
            return error("no host");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return error("an IPv6 address without brackets");
        }
        if port.parse::<u16>().is_err() {
            return error("the port is no number below 65536");
        }
        Ok(Self::Tcp(address.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<std::net::SocketAddr> for Endpoint {
    fn from(address: std::net::SocketAddr) -> Self {
        Self::Tcp(address.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for good in ["127.0.0.1:80", "[::1]:0", "host.example:65535", "unix:/run/p", "unix:rel"] {
            assert_eq!(good.parse::<Endpoint>().map(|e| e.to_string()).as_deref(), Ok(good));
        }
        assert_eq!("tcp:a:1".parse(), Ok(Endpoint::Tcp("a:1".into())));
        for bad in ["", "unix:", "host", ":80", "host:", "host:65536", "::1:80", "host:http"] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad:?}");
        }
    }
}
