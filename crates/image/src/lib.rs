//! Memory images as page sources.
//!
//! [`RawImage`] is a file whose bytes are the memory's, granule by granule, at each region's image
//! offset: what `dd` of the memory would give.

#![deny(unsafe_code)]

mod error;
mod extents;
mod raw;

pub use error::ImageError;
pub use raw::RawImage;
