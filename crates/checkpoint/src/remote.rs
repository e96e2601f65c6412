//! Images that go to another host: the sender's end is a [`Destination`], the receiver's a sink
//! that writes them to a directory.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use pageferry_image::{ImageId, ImageMapping, ImageRange, MappingFlags};
use pageferry_memory::{ImageOffset, PageSize};
use pageferry_migrate::{
    Endpoint, ImageDescription, ImageInProgress, ImageSender, ImageSink, ImageStreamError,
    MigrateError, SenderOptions, SinkFailure,
    core::{ImageCounts, ImageId as WireId},
};
use serde::{Deserialize, Serialize};

use crate::{Destination, DestinationError, Directory, Head, InProgress, Stored};

/// What is sent of an image before its pages: postcard's format, like [`WireMapping`].
#[derive(Serialize, Deserialize)]
struct WireMetadata {
    /// Nanoseconds since 1970.
    created: u64,
    entries: Vec<(String, Vec<u8>)>,
}

#[derive(Serialize, Deserialize)]
struct WireMapping {
    start: u64,
    len: u64,
    flags: u32,
    page_size: u64,
    file_offset: u64,
    device: (u32, u32),
    inode: u64,
    name: Vec<u8>,
}

impl WireMapping {
    fn of(mapping: &ImageMapping) -> Self {
        Self {
            start: mapping.range.start().get(),
            len: mapping.range.len(),
            flags: mapping.flags.bits(),
            page_size: mapping.page_size.bytes(),
            file_offset: mapping.file_offset,
            device: mapping.device,
            inode: mapping.inode,
            name: mapping.name.clone(),
        }
    }

    fn read(self) -> Result<ImageMapping, SinkFailure> {
        let range = ImageRange::try_new(ImageOffset::new(self.start), self.len)
            .ok_or("a mapping that does not fit into an address space")?;
        let page_size = PageSize::try_new(self.page_size)
            .ok_or_else(|| format!("a mapping of pages of {} bytes", self.page_size))?;
        Ok(ImageMapping {
            range,
            flags: MappingFlags::from_bits_retain(self.flags),
            page_size,
            file_offset: self.file_offset,
            device: self.device,
            inode: self.inode,
            name: self.name,
        })
    }
}

/// Sends images to a peer that [receives](Receiving) them.
#[derive(Debug)]
pub struct Remote {
    sender: ImageSender,
    endpoint: Endpoint,
}

impl Remote {
    /// Connects to a peer.
    ///
    /// # Errors
    ///
    /// [`MigrateError`].
    pub fn connect(endpoint: &Endpoint, options: SenderOptions) -> Result<Self, MigrateError> {
        let sender = ImageSender::connect(endpoint, options)?;
        Ok(Self { sender, endpoint: endpoint.clone() })
    }
}

/// An image could not be sent. Which one is the last that the peer has is for
/// [`CheckpointError`](crate::CheckpointError) to say, with where that is.
#[derive(Debug)]
pub struct SendingError {
    /// What went wrong, and what is left of it.
    pub stream: ImageStreamError,
}

impl fmt::Display for SendingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ImageStreamError { image, in_doubt, error, .. } = &self.stream;
        match image {
            Some(id) if *in_doubt => {
                write!(f, "image {id} was sent, whether it is stored is not known: {error}")
            }
            Some(id) => write!(f, "image {id} is not complete: {error}"),
            None => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for SendingError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.stream.source()
    }
}

impl From<ImageStreamError> for SendingError {
    fn from(stream: ImageStreamError) -> Self {
        Self { stream }
    }
}

impl Destination for Remote {
    fn begin(&mut self, head: Head) -> Result<Box<dyn InProgress + '_>, DestinationError> {
        let created = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
        let metadata = WireMetadata { created, entries: head.metadata };
        let mappings: Vec<WireMapping> = head.mappings.iter().map(WireMapping::of).collect();
        let id = ImageId::random()?;
        let image = ImageDescription {
            id: WireId(id.bytes()),
            parent: if head.round == 0 { None } else { self.sender.last_stored() },
            page_size: PageSize::base().bytes(),
            metadata: postcard::to_stdvec(&metadata)?,
            mappings: postcard::to_stdvec(&mappings)?,
        };
        self.sender.begin(&image).map_err(SendingError::from)?;
        Ok(Box::new(Sending { remote: self, id, finished: false }))
    }

    /// Both sides agree on how many images there were.
    fn close(&mut self) -> Result<(), DestinationError> {
        self.sender.complete().map_err(SendingError::from)?;
        Ok(())
    }
}

struct Sending<'a> {
    remote: &'a mut Remote,
    id: ImageId,
    finished: bool,
}

impl fmt::Debug for Sending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sending").field("id", &self.id).finish_non_exhaustive()
    }
}

fn pages(bytes: u64) -> u64 {
    bytes >> PageSize::base().shift()
}

impl InProgress for Sending<'_> {
    fn write(&mut self, at: ImageOffset, bytes: &[u8]) -> Result<(), DestinationError> {
        let page = PageSize::base().bytes() as usize;
        // What is zero is said, not sent. Runs of a kind go together.
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let mut at = at.get();
        let mut rest = bytes;
        while !rest.is_empty() {
            let zero = is_zero(&rest[..page.min(rest.len())]);
            let run = rest.chunks(page).take_while(|next| is_zero(next) == zero).map(<[u8]>::len);
            let (now, later) = rest.split_at(run.sum());
            let sender = &mut self.remote.sender;
            let sent = match zero {
                true => sender.zero(at, pages(now.len() as u64)),
                false => sender.pages(at, now),
            };
            sent.map_err(SendingError::from)?;
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn zero(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        let sent = self.remote.sender.zero(range.start().get(), pages(range.len()));
        Ok(sent.map_err(SendingError::from)?)
    }

    fn poison(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        let sent = self.remote.sender.poisoned(range.start().get(), pages(range.len()));
        Ok(sent.map_err(SendingError::from)?)
    }

    fn gone(&mut self, range: ImageRange) -> Result<(), DestinationError> {
        let sent = self.remote.sender.gone(range.start().get(), pages(range.len()));
        Ok(sent.map_err(SendingError::from)?)
    }

    fn finish(mut self: Box<Self>) -> Result<Stored, DestinationError> {
        self.finished = true;
        let counts = self.remote.sender.finish().map_err(SendingError::from)?;
        let bytes = |count: u64| count << PageSize::base().shift();
        Ok(Stored {
            place: format!("{} at {}", self.id, self.remote.endpoint),
            id: self.id,
            data: bytes(counts.data),
            zero: bytes(counts.zero),
            // What of it is equal only the peer knows.
            stored: bytes(counts.data),
        })
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        // A peer that cannot be told finds out by the connection's end.
        if !self.finished {
            let _ = self.remote.sender.abort("given up");
        }
    }
}

/// Writes images that come from elsewhere to a directory.
#[derive(Debug)]
pub struct Receiving {
    directory: Directory,
}

impl Receiving {
    /// Into this directory.
    pub fn new(directory: Directory) -> Self {
        Self { directory }
    }
}

impl ImageSink for Receiving {
    fn begin(
        &mut self,
        image: &ImageDescription,
    ) -> Result<Box<dyn ImageInProgress + '_>, SinkFailure> {
        let id = ImageId::new(image.id.0).ok_or("an image without an identity")?;
        match (image.parent, self.directory.newest()) {
            (None, _) => self.directory.begin_chain(),
            (Some(parent), Some(newest)) if parent.0 == newest.bytes() => {}
            (Some(parent), _) => {
                return Err(format!("its parent {parent} is not the image stored last").into());
            }
        }
        let page = PageSize::try_new(image.page_size)
            .ok_or_else(|| format!("pages of {} bytes", image.page_size))?;
        let metadata: WireMetadata = postcard::from_bytes(&image.metadata)?;
        let mappings: Vec<WireMapping> = postcard::from_bytes(&image.mappings)?;
        let mappings: Result<Vec<_>, _> = mappings.into_iter().map(WireMapping::read).collect();
        let created = SystemTime::UNIX_EPOCH + Duration::from_nanos(metadata.created);
        let head = Head { round: 0, mappings: mappings?, metadata: metadata.entries };
        let writing = self.directory.begin_with(head, page, Some((id, created)))?;
        Ok(Box::new(Writing { writing, page, counts: ImageCounts::default() }))
    }
}

struct Writing<'a> {
    writing: Box<dyn InProgress + 'a>,
    page: PageSize,
    counts: ImageCounts,
}

impl Writing<'_> {
    fn range(&self, address: u64, count: u64) -> Result<ImageRange, SinkFailure> {
        count
            .checked_mul(self.page.bytes())
            .and_then(|len| ImageRange::try_new(ImageOffset::new(address), len))
            .ok_or_else(|| "pages beyond the end of the address space".into())
    }
}

impl ImageInProgress for Writing<'_> {
    fn pages(&mut self, address: u64, bytes: &[u8]) -> Result<(), SinkFailure> {
        self.counts.data += bytes.len() as u64 / self.page.bytes();
        self.writing.write(ImageOffset::new(address), bytes)
    }

    fn zero(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.counts.zero += count;
        self.writing.zero(self.range(address, count)?)
    }

    fn poisoned(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.counts.poisoned += count;
        self.writing.poison(self.range(address, count)?)
    }

    fn gone(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.counts.gone += count;
        self.writing.gone(self.range(address, count)?)
    }

    fn finish(self: Box<Self>) -> Result<ImageCounts, SinkFailure> {
        let Self { writing, counts, .. } = *self;
        writing.finish()?;
        Ok(counts)
    }
}
