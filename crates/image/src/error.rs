//! What can go wrong with an image.

use std::{io, path::PathBuf};

/// Why an image could not be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("opening the image {path}: {error}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Its length or its holes cannot be learnt.
    #[error("examining the image {label}: {error}")]
    Examine {
        /// The image.
        label: String,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Bytes of it cannot be read.
    #[error("reading {length} bytes at {offset:#x} of the image {label}: {error}")]
    Read {
        /// The image.
        label: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// What the kernel said; `UnexpectedEof` where the file has ended.
        #[source]
        error: io::Error,
    },
}
