//! What can go wrong with an image.

use std::{fmt, io, path::PathBuf};

use pageferry_memory::ImageOffset;

use crate::{Content, ImageId, ImageRange};

/// A part of an image file, as its design document names them.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Part {
    /// The first 4096 bytes.
    Header,
    /// The stored block with this number.
    Block(u64),
    /// This leaf of the block table.
    BlockTable(u64),
    /// This leaf of the run table.
    RunTable(u64),
    /// Mappings and metadata.
    Catalog,
    /// The digests of everything that is read in parts.
    Root,
    /// The last 256 bytes.
    Footer,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::Block(number) => write!(f, "block {number}"),
            Self::BlockTable(leaf) => write!(f, "block table, leaf {leaf}"),
            Self::RunTable(leaf) => write!(f, "run table, leaf {leaf}"),
            Self::Catalog => f.write_str("catalog"),
            Self::Root => f.write_str("root"),
            Self::Footer => f.write_str("footer"),
        }
    }
}

/// What was being done when an image could not be written.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Choosing its identity.
    Identify,
    /// Opening the directory it is to appear in.
    OpenDirectory,
    /// Creating the file that has no name yet.
    Create,
    /// Writing the header.
    Header,
    /// Writing blocks.
    Data,
    /// Writing the tables, the catalog and the footer.
    Index,
    /// Bringing it to disk: fsync(2).
    Sync,
    /// Giving it its name. Nothing of that name may exist.
    Publish,
    /// Bringing its name to disk. The image is complete and visible, but might not survive a
    /// crash of the host.
    SyncDirectory,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identify => "choosing the identity",
            Self::OpenDirectory => "opening the directory",
            Self::Create => "creating the file",
            Self::Header => "writing the header",
            Self::Data => "writing data",
            Self::Index => "writing the index",
            Self::Sync => "bringing it to disk",
            Self::Publish => "giving it its name",
            Self::SyncDirectory => "bringing its name to disk",
        })
    }
}

/// Why an image could not be opened, read or written.
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
    /// The file does not begin as an image does.
    #[error("{label} is not an image: its first 8 bytes are not those of one")]
    NotAnImage {
        /// The file.
        label: String,
    },
    /// The image is of a later version of the format.
    #[error(
        "the image {label} has version {found} of the format; version {known} is the latest known"
    )]
    Version {
        /// The image.
        label: String,
        /// Its version.
        found: u32,
        /// The latest version that can be read.
        known: u32,
    },
    /// The image cannot be read without knowing features that are not known.
    #[error("the image {label} needs unknown features of the format: bits {bits:#x}")]
    Features {
        /// The image.
        label: String,
        /// The unknown feature bits that it requires.
        bits: u64,
    },
    /// The file does not end as an image does.
    #[error(
        "the image {label} is incomplete: what its {length} bytes end with is not the end of an \
         image (cut short?)"
    )]
    Incomplete {
        /// The image.
        label: String,
        /// Length of the file in bytes.
        length: u64,
    },
    /// Bytes of the image are not those that were written.
    #[error("the image {label} is damaged: {part}, {length} bytes at {offset:#x}: {why}")]
    Corrupt {
        /// The image.
        label: String,
        /// What is damaged.
        part: Part,
        /// Where the part begins in the file.
        offset: u64,
        /// Length of the part in bytes.
        length: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The bytes at a position cannot be had: nobody has stored them, or they could not be read
    /// when the image was made.
    #[error("the image {label} has no bytes at {at}: {content}")]
    NoBytes {
        /// The image, the newest of its chain.
        label: String,
        /// The first position without bytes.
        at: ImageOffset,
        /// What is there instead.
        content: Content,
    },
    /// The parent of an image is not there.
    #[error("the parent of the image {child} is missing: {name}, identity {id}")]
    MissingParent {
        /// The image that needs it.
        child: String,
        /// The parent's identity.
        id: ImageId,
        /// The file name it had when the child was made.
        name: String,
    },
    /// Where an image's parent was, another image is.
    #[error("the parent of the image {child} is {expected}, but {parent} is {found}")]
    WrongParent {
        /// The image that needs it.
        child: String,
        /// The image in its place.
        parent: String,
        /// Identity of the parent.
        expected: ImageId,
        /// Identity of the image in its place.
        found: ImageId,
    },
    /// An image's parent is not what it was when the child was made.
    #[error("{parent}, the parent of the image {child}, is not what it was when {child} was made")]
    AlteredParent {
        /// The image that needs it.
        child: String,
        /// The parent.
        parent: String,
    },
    /// An image is among its own ancestors.
    #[error("the image {label} is among its own ancestors (identity {id})")]
    Cycle {
        /// The image.
        label: String,
        /// Its identity.
        id: ImageId,
    },
    /// A chain has more images than can be held open.
    #[error("the chain of the image {label} has more than {limit} images; flatten it in parts")]
    TooLong {
        /// The newest image.
        label: String,
        /// How many images a chain may have.
        limit: usize,
    },
    /// A directory has no images.
    #[error("there are no images in {directory}", directory = directory.display())]
    NoImages {
        /// The directory.
        directory: PathBuf,
    },
    /// A directory has several images that are nobody's parent: more than one chain.
    #[error(
        "there is more than one chain in {directory}: {first} is the last of one, {second} of \
         another; name the image",
        directory = directory.display(), first = first.display(), second = second.display()
    )]
    Ambiguous {
        /// The directory.
        directory: PathBuf,
        /// The last image of one.
        first: PathBuf,
        /// The last image of the newest.
        second: PathBuf,
    },
    /// A directory cannot be listed.
    #[error("listing the directory {directory}: {error}", directory = directory.display())]
    List {
        /// The directory.
        directory: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// An image cannot be written.
    #[error("writing the image {path}: {step}, at {offset:#x}: {error}", path = path.display())]
    Write {
        /// The file that was to be.
        path: PathBuf,
        /// What was being done.
        step: Step,
        /// Bytes of the image written before.
        offset: u64,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Writing had failed before; the image can no longer be completed.
    #[error("writing the image {path} has failed before", path = path.display())]
    Failed {
        /// The file that was to be.
        path: PathBuf,
    },
    /// What was to be written cannot be part of an image.
    #[error("writing the image {path}: {why}", path = path.display())]
    Unfit {
        /// The file that was to be.
        path: PathBuf,
        /// What does not fit, and why.
        why: String,
    },
    /// What was to be written does not consist of whole blocks.
    #[error(
        "writing the image {path}: {length} bytes at {at} are not whole blocks of {block} bytes",
        path = path.display()
    )]
    Unaligned {
        /// The file that was to be.
        path: PathBuf,
        /// First position.
        at: ImageOffset,
        /// Bytes to be written there.
        length: u64,
        /// Bytes a block has.
        block: u64,
    },
    /// A mapping lies where another one does.
    #[error("writing the image {path}: the mappings {first} and {second} overlap", path = path.display())]
    Overlap {
        /// The file that was to be.
        path: PathBuf,
        /// The mapping that begins lower.
        first: ImageRange,
        /// The other one.
        second: ImageRange,
    },
    /// The caller's progress function asked to stop.
    #[error("{what} was cancelled")]
    Cancelled {
        /// What was being done.
        what: &'static str,
    },
}

/// What can go wrong while reading one image, without the image's name: making one allocates
/// nothing.
#[derive(Debug)]
pub(crate) enum Trouble {
    Io { offset: u64, length: u64, error: io::Error },
    Corrupt { part: Part, offset: u64, length: u64, why: &'static str },
    NoBytes { at: u64, content: Content },
}

impl Trouble {
    pub(crate) fn named(self, label: &str) -> ImageError {
        let label = label.to_owned();
        match self {
            Self::Io { offset, length, error } => ImageError::Read { label, offset, length, error },
            Self::Corrupt { part, offset, length, why } => {
                ImageError::Corrupt { label, part, offset, length, why }
            }
            Self::NoBytes { at, content } => {
                ImageError::NoBytes { label, at: ImageOffset::new(at), content }
            }
        }
    }
}
