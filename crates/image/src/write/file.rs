//! An image in a file that appears when it is complete.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufWriter, Write},
    mem,
    ops::{Deref, DerefMut},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::{
    fd::{AsRawFd, OwnedFd},
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::{Encoder, Known, WriterOptions, Written};
use crate::{ImageError, ImageId, Step, read::peek};

/// Only the owner can read it: it has what a process kept in its memory.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Large enough to make calls cheap.
const BUFFER: usize = 1 << 20;

/// Writes an image to a file. Nothing is to be seen under its name until all of it is on disk;
/// what is not finished leaves nothing behind when this is dropped. Only on a file system that
/// has no unnamed files (`O_TMPFILE` of open(2)) a killed process leaves a hidden file whose name
/// ends in `.partial`; it is never taken for an image.
///
/// It can be told everything that its [`Encoder`] can.
#[derive(Debug)]
pub struct ImageWriter {
    encoder: Encoder<BufWriter<File>>,
    place: Place,
}

/// Where the file is to appear.
#[derive(Debug)]
struct Place {
    directory: OwnedFd,
    name: OsString,
    /// The name it has until then, where it cannot be without one.
    partial: Option<OsString>,
}

impl ImageWriter {
    /// Begins the image that is to appear at `path`, where nothing may be by then.
    ///
    /// # Errors
    /// [`ImageError::Write`]; those of [`Encoder::new`]; for an image with a parent, what
    /// [`Image::open`](crate::Image::open) says of it, [`ImageError::MissingParent`] or [`ImageError::WrongParent`] if
    /// it is not in the same directory.
    pub fn create(path: impl AsRef<Path>, options: WriterOptions) -> Result<Self, ImageError> {
        Self::begin(path.as_ref(), options, true)
    }

    /// As [`create`](Self::create), on a file system without unnamed files.
    #[doc(hidden)]
    pub fn create_named(
        path: impl AsRef<Path>,
        options: WriterOptions,
    ) -> Result<Self, ImageError> {
        Self::begin(path.as_ref(), options, false)
    }

    fn begin(path: &Path, options: WriterOptions, unnamed: bool) -> Result<Self, ImageError> {
        let failed = |step, error: io::Error| ImageError::Write {
            path: path.to_owned(),
            step,
            offset: 0,
            error,
        };
        let name =
            path.file_name().ok_or_else(|| failed(Step::Create, Errno::ISDIR.into()))?.to_owned();
        check_parent(path, &options)?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let directory = rustix::fs::open(directory_of(path), flags, Mode::empty())
            .map_err(|error| failed(Step::OpenDirectory, error.into()))?;
        let mut place = Place { directory, name, partial: None };
        let file = place.create(unnamed).map_err(|error| failed(Step::Create, error.into()))?;
        let out = BufWriter::with_capacity(BUFFER, file);
        Ok(Self { encoder: Encoder::new(out, path, options)?, place })
    }

    /// Completes the image, brings it to disk and gives it its name.
    ///
    /// # Errors
    /// Those of [`Encoder::finish`]. After [`Step::SyncDirectory`] the image is there
    /// nevertheless, complete.
    pub fn finish(self) -> Result<Written, ImageError> {
        self.finish_for_child().map(|(written, _)| written)
    }

    /// As [`finish`](Self::finish), and says what the writer of a child has to
    /// [know](WriterOptions::known) in order to store none of it again.
    ///
    /// # Errors
    /// Those of [`finish`](Self::finish).
    pub fn finish_for_child(self) -> Result<(Written, Known), ImageError> {
        let Self { encoder, mut place } = self;
        let path = encoder.path().to_owned();
        let (mut out, written, known) = encoder.finish_for_child()?;
        let failed = |step, error| {
            let (path, offset) = (path.clone(), written.length);
            ImageError::Write { path, step, offset, error }
        };
        out.flush().map_err(|error| failed(Step::Index, error))?;
        out.get_ref().sync_all().map_err(|error| failed(Step::Sync, error))?;
        place.publish(out.get_ref()).map_err(|error| failed(Step::Publish, error.into()))?;
        rustix::fs::fsync(&place.directory)
            .map_err(|error| failed(Step::SyncDirectory, error.into()))?;
        Ok((written, known))
    }
}

impl Deref for ImageWriter {
    type Target = Encoder<BufWriter<File>>;

    fn deref(&self) -> &Self::Target {
        &self.encoder
    }
}

impl DerefMut for ImageWriter {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.encoder
    }
}

impl Place {
    fn create(&mut self, unnamed: bool) -> Result<File, Errno> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        if unnamed {
            match rustix::fs::openat(&self.directory, ".", flags | OFlags::TMPFILE, MODE) {
                // The last two: a kernel or file system that does not know of it.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOSYS) => {}
                file => return file.map(File::from),
            }
        }
        // Random, so that two writers never share one, whatever the host's other processes do.
        let mut partial = OsString::from(".");
        partial.push(&self.name);
        partial.push(format!(".{}.partial", ImageId::random()?));
        let flags = flags | OFlags::CREATE | OFlags::EXCL;
        let file = rustix::fs::openat(&self.directory, &partial, flags, MODE)?;
        self.partial = Some(partial);
        Ok(file.into())
    }

    /// Gives the file its name, unless something has it.
    fn publish(&mut self, file: &File) -> Result<(), Errno> {
        match &self.partial {
            Some(partial) => {
                self.rename(partial)?;
                // There is nothing to remove any more.
                self.partial = None;
                Ok(())
            }
            None => self.link(file),
        }
    }

    /// Gives a file that has no name its name.
    fn link(&self, file: &File) -> Result<(), Errno> {
        match self.link_descriptor(file) {
            // The kernel wants a capability for that, and says so in this way.
            Err(Errno::NOENT) => self.link_proc(file),
            done => done,
        }
    }

    /// linkat(2) of the descriptor. Until Linux 6.10 it takes `CAP_DAC_READ_SEARCH`.
    fn link_descriptor(&self, file: &File) -> Result<(), Errno> {
        rustix::fs::linkat(file, "", &self.directory, &self.name, AtFlags::EMPTY_PATH)
    }

    /// linkat(2) by way of /proc, as open(2) shows it for those without the capability.
    fn link_proc(&self, file: &File) -> Result<(), Errno> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, path, &self.directory, &self.name, AtFlags::SYMLINK_FOLLOW)
    }

    fn rename(&self, partial: &OsStr) -> Result<(), Errno> {
        let (directory, name) = (&self.directory, &self.name);
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(directory, partial, directory, name, flags) {
            // A file system that cannot; then both names are there for a moment.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(directory, partial, directory, name, AtFlags::empty())?;
                rustix::fs::unlinkat(directory, partial, AtFlags::empty())
            }
            done => done,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(partial) = mem::take(&mut self.partial)
            && let Err(error) = rustix::fs::unlinkat(&self.directory, &partial, AtFlags::empty())
            // With its directory, perhaps.
            && error != Errno::NOENT
        {
            tracing::warn!(
                file = %partial.as_bytes().escape_ascii(),
                %error,
                "an unfinished image could not be removed"
            );
        }
    }
}

/// The directory that a path lies in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether the parent is where a reader will look for it.
fn check_parent(path: &Path, options: &WriterOptions) -> Result<(), ImageError> {
    let Some(parent) = &options.parent else { return Ok(()) };
    let place: PathBuf = directory_of(path).join(&parent.name);
    let child = path.display().to_string();
    match peek(&place) {
        Ok(found) if found.id == parent.id => Ok(()),
        Ok(found) => Err(ImageError::WrongParent {
            child,
            parent: place.display().to_string(),
            expected: parent.id,
            found: found.id,
        }),
        Err(ImageError::Open { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            Err(ImageError::MissingParent { child, id: parent.id, name: parent.name.clone() })
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(directory: &Path) -> Place {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty()).unwrap();
        Place { directory, name: "named".into(), partial: None }
    }

    /// Which one is taken depends on the kernel and on who asks.
    #[test]
    fn both_ways_to_name_a_file() {
        for (way, link) in [
            ("descriptor", Place::link_descriptor as fn(&Place, &File) -> Result<(), Errno>),
            ("proc", Place::link_proc),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let mut place = place(directory.path());
            let mut file = place.create(true).unwrap();
            if place.partial.is_some() {
                println!("skipped: needs a file system with unnamed files");
                return;
            }
            file.write_all(b"contents").unwrap();
            match link(&place, &file) {
                Err(Errno::NOENT) if way == "descriptor" => {
                    println!("skipped: needs CAP_DAC_READ_SEARCH or Linux 6.10");
                    continue;
                }
                linked => linked.unwrap(),
            }
            let path = directory.path().join("named");
            assert_eq!(std::fs::read(&path).unwrap(), b"contents", "{way}");
            assert_eq!(link(&place, &file), Err(Errno::EXIST), "{way}");
        }
    }
}
