//! Which blocks are stored already, in an image and in its ancestors.

use pageferry_memory::PageSize;

use super::seen::Seen;
use crate::{Digest, ImageId};

/// The digests of blocks that an image and its ancestors have stored, in bounded memory: what the
/// writer of its child needs to store none of them again. It comes from the image's writer
/// ([`Encoder::finish_for_child`](crate::Encoder::finish_for_child)).
///
/// Blocks are numbered through all the images, the oldest first.
#[derive(Clone)]
pub struct Known {
    block: PageSize,
    /// Identity and seal of the youngest image, once that is complete.
    of: Option<(ImageId, Digest)>,
    /// For each image that has blocks here: the number of its first one, and how many ancestors
    /// it has. Ascending.
    images: Vec<(u64, u32)>,
    next: u64,
    seen: Seen,
}

/// Where a block is stored.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// How many ancestors its image has.
    pub(crate) ancestors: u32,
    /// Its number in there.
    pub(crate) block: u64,
    /// How many blocks numbered from here on are of that image.
    pub(crate) more: u64,
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").field("of", &self.of).finish_non_exhaustive()
    }
}

impl Known {
    /// Nothing yet; remembers so many digests.
    pub(crate) fn new(block: PageSize, remembered: usize) -> Self {
        Self { block, of: None, images: Vec::new(), next: 0, seen: Seen::new(remembered) }
    }

    /// Whether it is of use to a child of this image, in blocks of this size.
    pub(crate) fn fits(&self, block: PageSize, parent: ImageId, seal: Digest) -> bool {
        self.block == block && self.of == Some((parent, seal))
    }

    /// The blocks that come now are those of an image with so many ancestors.
    pub(crate) fn begin(&mut self, ancestors: u32) {
        self.of = None;
        self.images.push((self.next, ancestors));
    }

    /// The image is complete.
    pub(crate) fn complete(&mut self, id: ImageId, seal: Digest) {
        self.of = Some((id, seal));
    }

    /// The number of a stored block with this digest, if it is remembered.
    pub(crate) fn get(&mut self, digest: &Digest) -> Option<u64> {
        self.seen.get(digest)
    }

    /// Remembers the next block that is stored, and gives it its number.
    pub(crate) fn add(&mut self, digest: Digest) -> u64 {
        let number = self.next;
        self.next += 1;
        self.seen.insert(digest, number);
        number
    }

    /// Where the block with this number is, which has been given.
    pub(crate) fn place(&self, number: u64) -> Place {
        // The first image begins at 0.
        let behind = self.images.partition_point(|(first, _)| *first <= number);
        let (first, ancestors) = self.images[behind - 1];
        let end = self.images.get(behind).map_or(self.next, |(first, _)| *first);
        Place { ancestors, block: number - first, more: end - number }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_from_image_to_image() {
        let mut known = Known::new(PageSize::SIZE_4K, 100);
        let digest = |number: u8| Digest::of(&[number]);
        // The second has no block of its own; the fourth generation is not known.
        for (ancestors, blocks) in [(0, 0..3), (1, 3..3), (2, 3..5), (4, 5..6)] {
            known.begin(ancestors);
            for number in blocks {
                assert_eq!(known.get(&digest(number)), None);
                assert_eq!(known.add(digest(number)), u64::from(number));
            }
        }
        let place = |number: u8| {
            let place = known.place(known.clone().get(&digest(number)).unwrap());
            (place.ancestors, place.block, place.more)
        };
        let found: Vec<_> = (0..6).map(place).collect();
        assert_eq!(found, [(0, 0, 3), (0, 1, 2), (0, 2, 1), (2, 0, 2), (2, 1, 1), (4, 0, 1)]);
    }

    #[test]
    fn fits_only_the_child_of_what_it_is_of() {
        let mut known = Known::new(PageSize::SIZE_4K, 100);
        let id = |number| ImageId::new([number; 16]).unwrap();
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        known.begin(0);
        assert!(!known.fits(PageSize::SIZE_4K, id(1), one), "it is not complete");
        known.complete(id(1), one);
        assert!(known.fits(PageSize::SIZE_4K, id(1), one));
        assert!(!known.fits(PageSize::SIZE_2M, id(1), one));
        assert!(!known.fits(PageSize::SIZE_4K, id(2), one));
        assert!(!known.fits(PageSize::SIZE_4K, id(1), other));
    }
}
