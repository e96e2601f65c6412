//! Where the control sockets of guests are: one for each guest that runs here, by its name.
//!
//! The directory is this user's alone, and so are the sockets in it (0600): whoever can connect may
//! stop a guest and send its memory anywhere. A socket that nobody listens at was left behind by a
//! process that was killed; it is removed by whoever comes across it.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, bail};
use rustix::fs::{FlockOperation, Mode, OFlags};

/// The end of a socket's file name.
const SUFFIX: &str = ".sock";
/// A path with it still fits into a socket's address (108 bytes, unix(7)) in most directories.
const LONGEST_NAME: usize = 48;

/// The name of a guest: it becomes a file's.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Name(String);

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if text.is_empty() || text.len() > LONGEST_NAME {
            return Err(format!("a name has 1 to {LONGEST_NAME} characters"));
        }
        if !text.bytes().all(known) || !text.as_bytes()[0].is_ascii_alphanumeric() {
            return Err("a name has letters, digits, - _ and ., and a letter or digit first".into());
        }
        Ok(Self(text.to_owned()))
    }
}

/// The directory of the control sockets.
#[derive(Debug)]
pub(crate) struct Place {
    directory: PathBuf,
}

impl Place {
    /// The directory, made if it is not there: `pageferry` in `$XDG_RUNTIME_DIR`, or
    /// `/tmp/pageferry-UID`. It must be a directory of this user that nobody else can write to:
    /// in /tmp anybody might have made it first.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let user = rustix::process::geteuid().as_raw();
        let directory = match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(runtime) if Path::new(&runtime).is_absolute() => {
                PathBuf::from(runtime).join("pageferry")
            }
            _ => PathBuf::from(format!("/tmp/pageferry-{user}")),
        };
        let shown = directory.display();
        match fs::DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("making {shown}"));
            }
            _ => {}
        }
        let found = fs::symlink_metadata(&directory).with_context(|| format!("reading {shown}"))?;
        if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
            bail!(
                "{shown} is no directory that is only this user's: remove it, or set \
                   XDG_RUNTIME_DIR"
            );
        }
        Ok(Self { directory })
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(format!("{name}{SUFFIX}"))
    }

    /// Keeps others from making and removing sockets until it is dropped.
    fn lock(&self) -> anyhow::Result<OwnedFd> {
        let shown = self.directory.display();
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty())
            .with_context(|| format!("opening {shown}"))?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&directory, FlockOperation::LockExclusive))
            .with_context(|| format!("locking {shown}"))?;
        Ok(directory)
    }

    /// Makes the control socket of a guest.
    pub(crate) fn take(&self, name: &Name) -> anyhow::Result<Control> {
        let path = self.path(name);
        let _locked = self.lock()?;
        if connect(&path)?.is_some() {
            bail!("there is a guest of the name {name} already");
        }
        remove(&path)?;
        let what = || format!("making the control socket {}", path.display());
        let listener = UnixListener::bind(&path).with_context(what)?;
        let control = Control { listener, path: path.clone() };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).with_context(what)?;
        control.listener.set_nonblocking(true).with_context(what)?;
        Ok(control)
    }

    /// Connects to the process of a guest; `None` if there is no such guest.
    pub(crate) fn connect(&self, name: &Name) -> anyhow::Result<Option<UnixStream>> {
        let path = self.path(name);
        if let Some(stream) = connect(&path)? {
            return Ok(Some(stream));
        }
        // Once more, when nobody is in between making it and listening.
        let _locked = self.lock()?;
        let stream = connect(&path)?;
        if stream.is_none() {
            remove(&path)?;
        }
        Ok(stream)
    }

    /// The names of all sockets there are, those left behind among them.
    pub(crate) fn names(&self) -> anyhow::Result<Vec<Name>> {
        let what = || format!("reading {}", self.directory.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).with_context(what)? {
            let file = entry.with_context(what)?.file_name();
            let name = file.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            names.extend(name.and_then(|name| name.parse::<Name>().ok()));
        }
        names.sort();
        Ok(names)
    }
}

/// `None` if nobody listens there.
fn connect(path: &Path) -> anyhow::Result<Option<UnixStream>> {
    match UnixStream::connect(path) {
        Ok(stream) => Ok(Some(stream)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("connecting to {}", path.display())),
    }
}

/// Removes a socket that nobody listens at.
fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A control socket. It is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) listener: UnixListener,
    pub(crate) path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("pageferry: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names_that_stay_in_the_directory() {
        for good in ["a", "db-1", "A.b_c", "0"] {
            assert_eq!(good.parse::<Name>().as_ref().map(Name::as_str), Ok(good));
        }
        let long = "a".repeat(LONGEST_NAME + 1);
        for bad in ["", ".", "..", "../a", "a/b", "-a", ".a", "a b", "ä", "a\0", &long] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_was_left_behind_is_removed_and_what_is_alive_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { directory: folder.path().to_owned() };
        let name: Name = "guest".parse().unwrap();
        // A listener's file stays when it is closed.
        drop(UnixListener::bind(place.path(&name)).unwrap());
        assert_eq!(place.names().unwrap(), std::slice::from_ref(&name));
        assert!(place.connect(&name).unwrap().is_none());
        assert_eq!(place.names().unwrap(), []);
        drop(UnixListener::bind(place.path(&name)).unwrap());
        let control = place.take(&name).unwrap();
        let mode = fs::metadata(&control.path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = place.take(&name).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        assert!(place.connect(&name).unwrap().is_some());
        drop(control);
        assert_eq!(place.names().unwrap(), []);
    }
}
