//! Memory images: snapshots in files that can be read at any page, chains of them, and images as
//! page sources.
//!
//! * [`ImageWriter`] makes an image of what it is told, in a file that appears when it is complete;
//!   an [`Encoder`] writes one to anything.
//! * [`Image`] is one image, [`Chain`] an image with all its ancestors: each holds what has changed
//!   since its parent. Everything read is compared with its digest first.
//! * [`list`], [`diff`] and [`flatten`] work on chains; [`Image::verify`] finds every flipped bit.
//! * [`ChainSource`] serves a chain to a pager.
//! * [`RawImage`] is a file whose bytes are the memory's, granule by granule, at each region's image
//!   offset: what `dd` of the memory would give. It is a page source as well.
//!
//! `docs/design.md` draws the format of images byte by byte.

#![deny(unsafe_code)]

mod chain;
mod content;
mod error;
mod extents;
mod format;
#[doc(hidden)]
pub mod fuzz;
mod id;
mod raw;
mod read;
mod serve;
mod source;
mod space;
mod storage;
mod write;

pub use chain::{
    Chain, Difference, EXTENSION, Listed, Missing, ParentState, diff, flatten, last_images, list,
};
pub use content::{Amounts, Content, Extent};
pub use error::{ImageError, Part, Step};
pub use format::{
    ParentLink, VERSION,
    catalog::{ImageMapping, MappingFlags},
};
pub use id::{Digest, ImageId};
pub use raw::RawImage;
pub use read::{Damage, Image, ImageInfo, Progress, Verified};
pub use source::ChainSource;
pub use space::ImageRange;
pub use storage::Storage;
pub use write::{Encoder, ImageWriter, Known, WriterOptions, Written};
