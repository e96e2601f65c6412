//! A raw memory image as a page source.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use pageferry_memory::{GranuleIndex, GranuleRange, Region};
use pageferry_paging::{PageSink, PageSource, SourceError, Span, Urgency};
use rustix::fs::FileType;

use crate::{
    ImageError,
    extents::Extents,
    serve::{answered, region_of, serve_data},
    storage::pread,
};

/// A file whose bytes are the memory's.
///
/// A granule lies at its region's image offset plus its place in the region. Holes of the file
/// are answered as zero without being read; they are learnt once, when the image is opened, so
/// the file must not be written while it is in use. What lies beyond the end of the file, and
/// what cannot be read, is answered as poisoned, granule by granule; everything else is served.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    label: String,
    length: u64,
    extents: Extents,
    shortfall: AtomicU64,
}

impl RawImage {
    /// Opens the image at `path`, read-only.
    ///
    /// # Errors
    /// [`ImageError::Open`], [`ImageError::Examine`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let file =
            File::open(path).map_err(|error| ImageError::Open { path: path.to_owned(), error })?;
        Self::from_file(file, path.display().to_string())
    }

    /// Takes an open file or block device; `label` names it in messages. Reads do not move the
    /// file's offset, looking for holes here does.
    ///
    /// # Errors
    /// [`ImageError::Examine`].
    pub fn from_file(file: File, label: impl Into<String>) -> Result<Self, ImageError> {
        let label = label.into();
        match examine(&file) {
            Ok((length, extents)) => Ok(Self::new(file, label, length, extents)),
            Err(error) => Err(ImageError::Examine { label, error }),
        }
    }

    /// Takes an open file that cannot tell its own length, such as `/proc/PID/mem`. All of its
    /// `length` bytes count as data.
    #[must_use]
    pub fn from_file_sized(file: File, label: impl Into<String>, length: u64) -> Self {
        Self::new(file, label.into(), length, Extents::unknown())
    }

    fn new(file: File, label: String, length: u64, extents: Extents) -> Self {
        Self { file, label, length, extents, shortfall: AtomicU64::new(0) }
    }

    /// What the image is called in messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Length of the image in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of the attached memory that the image is too short for: poisoned when they are
    /// touched. 0 before a pager attaches.
    #[must_use]
    pub fn shortfall(&self) -> u64 {
        self.shortfall.load(Ordering::Relaxed)
    }

    /// How many of `count` pieces of `size` bytes, from `offset` on, are alike: `(true, n)` if
    /// the first `n` lie in holes and so are zero, `(false, n)` if they have to be read. `n` is
    /// at least 1 unless `count` is 0.
    ///
    /// # Panics
    /// If `size` is 0 or the pieces go beyond the address space.
    #[must_use]
    pub fn holes(&self, offset: u64, size: u64, count: u64) -> (bool, u64) {
        assert!(
            size > 0
                && size.checked_mul(count).is_some_and(|all| offset.checked_add(all).is_some())
        );
        if count == 0 { (true, 0) } else { self.extents.run(offset, size, count) }
    }

    /// Reads exactly `bytes` from `offset` on.
    ///
    /// # Errors
    /// [`ImageError::Read`], also where the file has ended; part of `bytes` may have been
    /// written then.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ImageError> {
        let length = bytes.len() as u64;
        pread(&self.file, offset, bytes).map_err(|error| ImageError::Read {
            label: self.label.clone(),
            offset,
            length,
            error,
        })
    }

    /// The granules of `region` that lie wholly within the image.
    fn backed(&self, region: &Region) -> u64 {
        let bytes = self.length.saturating_sub(region.image_offset().get());
        (bytes / region.granule().bytes()).min(region.granules())
    }
}

/// Length and data extents of a file.
fn examine(file: &File) -> io::Result<(u64, Extents)> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let length = u64::try_from(stat.st_size).unwrap_or(0);
            Ok((length, Extents::of(file, length)?))
        }
        FileType::BlockDevice => {
            Ok((rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?, Extents::unknown()))
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a regular file nor a block device",
        )),
    }
}

impl PageSource for RawImage {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        let mut shortfall = 0;
        for (id, region) in sink.layout().iter() {
            let end = region.image_offset().get().checked_add(region.len());
            if end.is_none_or(|end| end > i64::MAX as u64) {
                return Err(SourceError::Mismatch(format!(
                    "region {} lies at offsets of {} that no file can have",
                    id.get(),
                    self.label
                )));
            }
            shortfall += (region.granules() - self.backed(region)) * region.granule().bytes();
        }
        self.shortfall.store(shortfall, Ordering::Relaxed);
        if shortfall > 0 {
            tracing::warn!(
                image = self.label,
                length = self.length,
                shortfall,
                "image shorter than the memory: what is missing will be poisoned"
            );
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        _urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let region = region_of(sink, span)?;
        let granule = region.granule().bytes();
        let backed = self.backed(region);
        let mut rest = span.granules;
        while !rest.is_empty() {
            let first = rest.first().get();
            let (count, answer);
            if first >= backed {
                count = rest.count();
                answer = sink.poison(Span { granules: rest, ..span });
            } else {
                let limit = rest.count().min(backed - first);
                let (start, _) = region.image_range(rest);
                let (hole, alike) = self.extents.run(start.get(), granule, limit);
                count = alike;
                let run =
                    Span { granules: GranuleRange::new(GranuleIndex::new(first), alike), ..span };
                answer = if hole {
                    sink.zero(run)
                } else {
                    serve_data(run, region, sink, &|offset, bytes| {
                        pread(&self.file, offset, bytes).map_err(|error| SourceError::Io {
                            what: format!("reading {}", self.label),
                            error,
                        })
                    })
                };
            }
            answered(answer)?;
            rest = rest.split_at(count).1;
        }
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {}
}
