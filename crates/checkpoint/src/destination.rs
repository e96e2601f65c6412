//! Where images go.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use pageferry_image::{
    EXTENSION, Image, ImageError, ImageId, ImageMapping, ImageRange, ImageWriter, Known,
    WriterOptions,
};
use pageferry_memory::{ImageOffset, PageSize};

/// Why a destination did not take an image. It says what went wrong with what.
pub type DestinationError = Box<dyn std::error::Error + Send + Sync>;

/// What is known of an image when it is begun.
#[derive(Clone, Debug)]
pub struct Head {
    /// Its place in the chain of this checkpoint, from 0 on.
    pub round: u32,
    /// What was mapped when the process was last stopped for it.
    pub mappings: Vec<ImageMapping>,
    /// What else is to be kept with it, by key.
    pub metadata: Vec<(String, Vec<u8>)>,
}

/// What became of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored {
    /// Where it is, in words: a path, or a peer and the name it has there.
    pub place: String,
    /// Its identity.
    pub id: ImageId,
    /// Bytes of memory whose contents it has.
    pub data: u64,
    /// Bytes of memory that are zero, and take no room.
    pub zero: u64,
    /// Bytes of page contents stored: equal ones once, and none that an image before has.
    pub stored: u64,
}

/// Takes the images of a chain, one after the other.
pub trait Destination {
    /// Begins the next image; its parent is the one completed before, if any was.
    ///
    /// # Errors
    ///
    /// Why that cannot be.
    fn begin(&mut self, head: Head) -> Result<Box<dyn InProgress + '_>, DestinationError>;

    /// No other image follows: the chain is complete.
    ///
    /// # Errors
    ///
    /// It is not, as far as the other side knows. Images that were stored stay.
    fn close(&mut self) -> Result<(), DestinationError>;
}

/// An image that is being made. What is said of it comes by ascending address, and nothing is said
/// twice. Dropped before it is finished, it leaves nothing behind.
pub trait InProgress {
    /// These bytes, whole pages, are the memory from `at` on.
    ///
    /// # Errors
    ///
    /// Why they could not be taken. The image cannot be finished then.
    fn write(&mut self, at: ImageOffset, bytes: &[u8]) -> Result<(), DestinationError>;

    /// The range is zero.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn zero(&mut self, range: ImageRange) -> Result<(), DestinationError>;

    /// The range cannot be read: its memory is broken.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn poison(&mut self, range: ImageRange) -> Result<(), DestinationError>;

    /// The range is no longer memory of the process's own, whatever the images before say.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    fn gone(&mut self, range: ImageRange) -> Result<(), DestinationError>;

    /// Completes the image: when this returns, it is where it belongs and stays there.
    ///
    /// # Errors
    ///
    /// Why it could not be completed.
    fn finish(self: Box<Self>) -> Result<Stored, DestinationError>;
}

/// Images in a directory: `checkpoint-0000.pfi` and on. Other images there are left alone; the
/// numbers go on after theirs.
#[derive(Debug)]
pub struct Directory {
    directory: PathBuf,
    next: u32,
    /// The newest image of this chain, and its file name.
    parent: Option<(Image, String)>,
    /// What this chain has stored, from image to image.
    known: Option<Known>,
}

const PREFIX: &str = "checkpoint-";

impl Directory {
    /// In the directory at this path, which is made if it is not there.
    ///
    /// # Errors
    ///
    /// [`DirectoryError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DirectoryError> {
        let directory = path.as_ref().to_owned();
        let failed = |source| DirectoryError { directory: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let mut next = 0;
        for entry in directory.read_dir().map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(EXTENSION))
                .and_then(|number| number.strip_suffix('.')?.parse::<u32>().ok());
            if let Some(number) = number {
                next = next.max(number.saturating_add(1));
            }
        }
        Ok(Self { directory, next, parent: None, known: None })
    }
}

/// A directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the directory {} for images: {source}", directory.display())]
pub struct DirectoryError {
    /// Which one.
    pub directory: PathBuf,
    /// The reason.
    pub source: std::io::Error,
}

impl Destination for Directory {
    fn begin(&mut self, head: Head) -> Result<Box<dyn InProgress + '_>, DestinationError> {
        self.begin_with(head, PageSize::base(), None)
    }

    /// Each image is complete by itself.
    fn close(&mut self) -> Result<(), DestinationError> {
        Ok(())
    }
}

impl Directory {
    /// The newest image of this chain.
    pub(crate) fn newest(&self) -> Option<ImageId> {
        self.parent.as_ref().map(|(image, _)| image.id())
    }

    /// The next image begins another chain.
    pub(crate) fn begin_chain(&mut self) {
        self.parent = None;
        self.known = None;
    }

    /// As [`Destination::begin`], of other pages, and with an identity and a time from elsewhere.
    pub(crate) fn begin_with(
        &mut self,
        head: Head,
        page: PageSize,
        identity: Option<(ImageId, SystemTime)>,
    ) -> Result<Box<dyn InProgress + '_>, DestinationError> {
        let name = format!("{PREFIX}{:04}.{EXTENSION}", self.next);
        let path = self.directory.join(&name);
        let mut options = WriterOptions::new(page);
        if let Some((parent, name)) = &self.parent {
            options = options.parent(parent, name.clone());
        }
        if let Some(known) = self.known.take() {
            options = options.known(known);
        }
        if let Some((id, created)) = identity {
            options = options.identity(id, created);
        }
        let mut writer = ImageWriter::create(&path, options)?;
        writer.set_mappings(head.mappings)?;
        for (key, value) in head.metadata {
            writer.set_metadata(key, value)?;
        }
        Ok(Box::new(InDirectory { writer, path, name, directory: self }))
    }
}

struct InDirectory<'a> {
    writer: ImageWriter,
    path: PathBuf,
    name: String,
    directory: &'a mut Directory,
}

impl fmt::Debug for InDirectory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InDirectory").field("path", &self.path).finish_non_exhaustive()
    }
}

impl InProgress for InDirectory<'_> {
    fn write(&mut self, at: ImageOffset, bytes: &[u8]) -> Result<(), DestinationError> {
        Ok(self.writer.write(at, bytes)?)
    }

    fn zero(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        Ok(self.writer.zero(range)?)
    }

    fn poison(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        Ok(self.writer.poison(range)?)
    }

    fn gone(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        Ok(self.writer.gone(range)?)
    }

    fn finish(self: Box<Self>) -> Result<Stored, DestinationError> {
        let Self { writer, path, name, directory } = *self;
        let (written, known) = writer.finish_for_child()?;
        let opened: Result<Image, ImageError> = Image::open(&path);
        directory.parent = Some((opened?, name));
        directory.known = Some(known);
        directory.next = directory.next.saturating_add(1);
        Ok(Stored {
            place: path.display().to_string(),
            id: written.id,
            data: written.amounts.data,
            zero: written.amounts.zero,
            stored: written.amounts.stored,
        })
    }
}
