//! Finding the ancestors of an image, and making sure that it is them.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

use super::{Chain, list};
use crate::{
    Image, ImageError, ParentLink, Part, format::HEADER_LEN, read::peek, write::directory_of,
};

/// Opens an image and all its ancestors.
pub(super) fn open(path: &Path) -> Result<Chain, ImageError> {
    let directory = directory_of(path);
    let mut images = vec![Image::open(path)?];
    let mut seen = HashSet::from([images[0].id()]);
    while let Some((child, parent)) = images.last().and_then(|child| Some((child, child.parent()?)))
    {
        if !seen.insert(parent.id) {
            return Err(cycle(child, parent));
        }
        if images.len() == Chain::MOST_IMAGES {
            return Err(too_long(&images[0]));
        }
        let found = find(directory, child, parent)?;
        images.push(found);
    }
    Chain::new(images)
}

/// Finds the parent of `child`: under its old name, else under any.
fn find(directory: &Path, child: &Image, parent: &ParentLink) -> Result<Image, ImageError> {
    let place = directory.join(&parent.name);
    let instead = match Image::open(&place) {
        Ok(image) if image.id() == parent.id => return Ok(image),
        Ok(image) => ImageError::WrongParent {
            child: child.label().to_owned(),
            parent: image.label().to_owned(),
            expected: parent.id,
            found: image.id(),
        },
        Err(ImageError::Open { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            missing(child, parent)
        }
        Err(error) => error,
    };
    for path in list::paths(directory)? {
        // What cannot be read may be anything, but is no parent.
        if path != place && peek(&path).is_ok_and(|found| found.id == parent.id) {
            return Image::open(path);
        }
    }
    Err(instead)
}

/// Checks that each image is followed by its parent, as it was when the child was made.
pub(super) fn check(images: &[Image]) -> Result<(), ImageError> {
    let Some(newest) = images.first() else {
        return Err(ImageError::Unfit {
            path: PathBuf::new(),
            why: "a chain has at least one image".to_owned(),
        });
    };
    if images.len() > Chain::MOST_IMAGES {
        return Err(too_long(newest));
    }
    let mut seen = HashSet::new();
    for (index, child) in images.iter().enumerate() {
        seen.insert(child.id());
        let Some(link) = child.parent() else {
            return match images.get(index + 1) {
                None => Ok(()),
                Some(other) => Err(ImageError::Unfit {
                    path: other.label().into(),
                    why: format!("it is not the parent of {}, which has none", child.label()),
                }),
            };
        };
        if seen.contains(&link.id) {
            return Err(cycle(child, link));
        }
        let Some(parent) = images.get(index + 1) else { return Err(missing(child, link)) };
        if parent.id() != link.id {
            return Err(ImageError::WrongParent {
                child: child.label().to_owned(),
                parent: parent.label().to_owned(),
                expected: link.id,
                found: parent.id(),
            });
        }
        if parent.seal() != link.seal {
            return Err(ImageError::AlteredParent {
                child: child.label().to_owned(),
                parent: parent.label().to_owned(),
            });
        }
        if parent.info().ancestors != link.ancestors {
            return Err(ImageError::Corrupt {
                label: child.label().to_owned(),
                part: Part::Header,
                offset: 0,
                length: HEADER_LEN,
                why: "it has another number of ancestors than it says",
            });
        }
    }
    Ok(())
}

fn missing(child: &Image, parent: &ParentLink) -> ImageError {
    let (child, name) = (child.label().to_owned(), parent.name.clone());
    ImageError::MissingParent { child, id: parent.id, name }
}

fn cycle(child: &Image, parent: &ParentLink) -> ImageError {
    ImageError::Cycle { label: child.label().to_owned(), id: parent.id }
}

fn too_long(newest: &Image) -> ImageError {
    ImageError::TooLong { label: newest.label().to_owned(), limit: Chain::MOST_IMAGES }
}
