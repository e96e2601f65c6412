//! Images that name their parents, put together.

mod diff;
mod flatten;
mod link;
mod list;

use std::{ops::ControlFlow, path::Path};

pub use diff::{Difference, diff};
pub use flatten::flatten;
pub use list::{EXTENSION, Listed, ParentState, last_images, list};
use pageferry_memory::{ImageOffset, PageSize};

use crate::{
    Content, Extent, Image, ImageError, ImageRange, Progress, Verified,
    error::Trouble,
    read::{Found, Run},
};

/// An image and all its ancestors: the memory as it was when the newest of them was made.
///
/// At each position, the newest image that says anything counts. Several threads can read at
/// once. Every image is one open file.
#[derive(Debug)]
pub struct Chain {
    /// The newest first.
    images: Vec<Image>,
}

/// What is at a position of a chain.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Spot {
    /// All is alike up to here.
    pub(crate) end: u64,
    pub(crate) content: Content,
    /// Of data: which image has stored it, and in which of its blocks.
    pub(crate) stored: Option<(usize, Run)>,
}

/// What to make of memory that no image has.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Default, Debug)]
#[non_exhaustive]
pub enum Missing {
    /// It cannot be had: reading fails, and a guest that touches it gets a memory error.
    #[default]
    Poison,
    /// It is zero. For images whose writer leaves out what is zero.
    Zero,
}

impl Chain {
    /// More images than this are not held open.
    pub const MOST_IMAGES: usize = 512;

    /// Opens the image at `path` and all its ancestors, which lie in the same directory. A path
    /// of a directory means the last image in it: the one that is nobody's parent. There must be
    /// one chain only; of several, [`last_images`] tells the last images.
    ///
    /// A parent is looked for under the name it had when its child was made, and if that is not
    /// it, among all images (`*.pfi`) of the directory.
    ///
    /// # Errors
    /// Those of [`Image::open`], for any of the images; [`ImageError::MissingParent`],
    /// [`ImageError::WrongParent`], [`ImageError::AlteredParent`], [`ImageError::Cycle`],
    /// [`ImageError::TooLong`]. For a directory also [`ImageError::List`],
    /// [`ImageError::NoImages`] and [`ImageError::Ambiguous`]; and if any image there cannot be
    /// opened, what is wrong with it, because it could have been the last.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        if path.is_dir() { link::open(&list::last(path)?) } else { link::open(path) }
    }

    /// Puts images together that have been opened: the newest first, each followed by its parent.
    ///
    /// # Errors
    /// [`ImageError::MissingParent`], [`ImageError::WrongParent`],
    /// [`ImageError::AlteredParent`], [`ImageError::Cycle`], [`ImageError::TooLong`];
    /// [`ImageError::Unfit`] if there are none.
    pub fn new(images: Vec<Image>) -> Result<Self, ImageError> {
        link::check(&images)?;
        Ok(Self { images })
    }

    /// Its images, the newest first.
    #[must_use]
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// The newest image. Its mappings and its metadata are those of the chain.
    #[must_use]
    pub fn newest(&self) -> &Image {
        // There is at least one.
        &self.images[0]
    }

    /// The size of the smallest blocks in it.
    #[must_use]
    pub fn block_size(&self) -> PageSize {
        self.images.iter().map(Image::block_size).min().unwrap_or(PageSize::SIZE_4K)
    }

    /// Reads all of the index: see [`Image::preload`].
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Corrupt`].
    pub fn preload(&self) -> Result<(), ImageError> {
        self.images.iter().try_for_each(Image::preload)
    }

    /// What is at `at`, and how far all is like that.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Corrupt`].
    ///
    /// # Panics
    /// If `at` is the last position there could be, of which nothing can be known.
    pub fn extent_at(&self, at: ImageOffset) -> Result<Extent, ImageError> {
        assert!(at.get() < u64::MAX, "no image has a byte there");
        let spot = self.spot(at.get(), u64::MAX).map_err(|trouble| self.named(trouble))?;
        let range = ImageRange::new(at, spot.end - at.get());
        Ok(Extent { range, content: spot.content })
    }

    /// What is in `range`: all that is not absent, in ascending order. Neighbours may be alike.
    pub fn extents(
        &self,
        range: ImageRange,
    ) -> impl Iterator<Item = Result<Extent, ImageError>> + use<'_> {
        let (mut at, end) = (range.start().get(), range.end().get());
        std::iter::from_fn(move || {
            while at < end {
                match self.spot(at, end) {
                    Ok(spot) => {
                        let range = ImageRange::new(ImageOffset::new(at), spot.end - at);
                        at = spot.end;
                        if spot.content != Content::Absent {
                            return Some(Ok(Extent { range, content: spot.content }));
                        }
                    }
                    Err(trouble) => {
                        at = end;
                        return Some(Err(self.named(trouble)));
                    }
                }
            }
            None
        })
    }

    /// Fills `bytes` with the memory from `at` on. Every block that is read is compared with its
    /// digest.
    ///
    /// # Errors
    /// [`ImageError::NoBytes`] where it is poisoned, or absent and `missing` says so;
    /// [`ImageError::Read`], [`ImageError::Corrupt`]. What `bytes` have then must not be used.
    pub fn read_at(
        &self,
        at: ImageOffset,
        bytes: &mut [u8],
        missing: Missing,
    ) -> Result<(), ImageError> {
        self.fill(at.get(), bytes, missing).map_err(|trouble| self.named(trouble))
    }

    /// Reads all of every image and compares it with its digests: see [`Image::verify`]. The
    /// oldest comes first.
    ///
    /// # Errors
    /// Those of [`Image::verify`].
    pub fn verify(
        &self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Verified, ImageError> {
        let total = self.images.iter().map(|image| image.info().file_length).sum();
        let mut before = 0;
        let mut verified = Verified::default();
        for (level, image) in self.images.iter().enumerate().rev() {
            let mut found =
                image.verify(&mut |now| progress(Progress { done: before + now.done, total }))?;
            for (younger, child) in self.images[..level].iter().enumerate().rev() {
                found.lose_in(child, level - younger);
            }
            found.check_references(image, |up| self.images.get(level + up));
            before += image.info().file_length;
            verified.add(found);
        }
        Ok(verified)
    }

    /// What is at `at`, looking no further than `end`. Reads and allocates nothing once the index
    /// has been read there.
    pub(crate) fn spot(&self, at: u64, end: u64) -> Result<Spot, At> {
        let mut end = end;
        for (level, image) in self.images.iter().enumerate() {
            match image.find(at).map_err(|trouble| At { level, trouble })? {
                Found::Hole(next) => end = end.min(next),
                Found::Run(run) => {
                    let end = end.min(run.end);
                    let (content, stored) = match run.content {
                        Content::Data => (Content::Data, Some(self.stored(level, run)?)),
                        Content::Gone => (Content::Absent, None),
                        other => (other, None),
                    };
                    return Ok(Spot { end, content, stored });
                }
            }
        }
        Ok(Spot { end, content: Content::Absent, stored: None })
    }

    /// Which image has stored the blocks of a run of the image at `level`.
    fn stored(&self, level: usize, run: Run) -> Result<(usize, Run), At> {
        let child = &self.images[level];
        let holder = level + usize::from(run.ancestor);
        match self.images.get(holder) {
            Some(image) if holder == level || image.serves(child, &run) => Ok((holder, run)),
            _ => Err(At { level, trouble: child.bad_reference(&run) }),
        }
    }

    pub(crate) fn fill(&self, at: u64, bytes: &mut [u8], missing: Missing) -> Result<(), At> {
        let no_bytes = |at, content| At { level: 0, trouble: Trouble::NoBytes { at, content } };
        let Some(end) = at.checked_add(bytes.len() as u64) else {
            return Err(no_bytes(u64::MAX, Content::Absent));
        };
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let spot = self.spot(at, end)?;
            let (piece, after) = rest.split_at_mut((spot.end - at) as usize);
            match (spot.stored, spot.content) {
                (Some((level, run)), _) => self.images[level]
                    .read_run(&run, at, piece)
                    .map_err(|trouble| At { level, trouble })?,
                (None, Content::Zero) => piece.fill(0),
                (None, Content::Absent) if missing == Missing::Zero => piece.fill(0),
                (None, content) => return Err(no_bytes(at, content)),
            }
            at = spot.end;
            rest = after;
        }
        Ok(())
    }

    pub(crate) fn named(&self, At { level, trouble }: At) -> ImageError {
        trouble.named(self.images[level].label())
    }
}

/// Trouble, and with which image.
#[derive(Debug)]
pub(crate) struct At {
    pub(crate) level: usize,
    pub(crate) trouble: Trouble,
}
