//! The images of a directory, in the order of their chains.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use crate::{Image, ImageError, ImageId, ImageInfo};

/// What the names of images end in.
pub const EXTENSION: &str = "pfi";

/// An image that was found in a directory.
#[derive(Debug)]
#[non_exhaustive]
pub struct Listed {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself, or what is wrong with it.
    pub info: Result<ImageInfo, ImageError>,
    /// What is known of its parent.
    pub parent: ParentState,
}

/// What is known of the parent of an image in the same directory.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ParentState {
    /// It has none.
    None,
    /// It is there.
    Present,
    /// It is there, and not what it was when the child was made.
    Altered,
    /// It is not there.
    Missing,
    /// It cannot be known, because the image cannot be opened.
    Unknown,
}

/// The images (`*.pfi`) of a directory: every chain from its oldest image on, the chain begun
/// first coming first. A child follows its parent, or the children of an older sibling. Images
/// whose parent is not there, and then those that cannot be opened, come last.
///
/// # Errors
/// [`ImageError::List`].
pub fn list(directory: impl AsRef<Path>) -> Result<Vec<Listed>, ImageError> {
    let mut sound = Vec::new();
    let mut broken = Vec::new();
    for path in paths(directory.as_ref())? {
        match Image::open(&path) {
            Ok(image) => sound.push((path, image.info())),
            Err(error) => {
                let (info, parent) = (Err(error), ParentState::Unknown);
                broken.push(Listed { path, info, parent });
            }
        }
    }
    sound.sort_by_key(|(_, info)| info.created);
    let seals: HashMap<ImageId, _> = sound.iter().map(|(_, info)| (info.id, info.seal)).collect();
    let state = |info: &ImageInfo| match &info.parent {
        None => ParentState::None,
        Some(link) => match seals.get(&link.id) {
            None => ParentState::Missing,
            Some(seal) if *seal == link.seal => ParentState::Present,
            Some(_) => ParentState::Altered,
        },
    };

    let mut children: HashMap<ImageId, Vec<usize>> = HashMap::new();
    let mut begun = Vec::new();
    let mut orphans = Vec::new();
    for (index, (_, info)) in sound.iter().enumerate() {
        match &info.parent {
            None => begun.push(index),
            Some(link) if seals.contains_key(&link.id) => {
                children.entry(link.id).or_default().push(index);
            }
            Some(_) => orphans.push(index),
        }
    }
    begun.extend(orphans);
    let mut order = Vec::new();
    let mut placed = vec![false; sound.len()];
    // Behind them, what is its own ancestor, and so is no one's descendant.
    for start in begun.into_iter().chain(0..sound.len()) {
        let mut waiting = vec![start];
        while let Some(index) = waiting.pop() {
            if std::mem::replace(&mut placed[index], true) {
                continue;
            }
            order.push(index);
            let id = sound[index].1.id;
            waiting.extend(children.get(&id).into_iter().flatten().rev());
        }
    }
    let mut sound: Vec<_> = sound.into_iter().map(Some).collect();
    let mut listed: Vec<Listed> = order
        .into_iter()
        .filter_map(|index| sound[index].take())
        .map(|(path, info)| {
            let parent = state(&info);
            Listed { path, info: Ok(info), parent }
        })
        .collect();
    listed.extend(broken);
    Ok(listed)
}

/// Files of a directory that should be images, by name.
pub(super) fn paths(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let failed = |error| ImageError::List { directory: directory.to_owned(), error };
    let mut paths = Vec::new();
    for entry in directory.read_dir().map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The last images of the chains in a directory: those that are nobody's parent, the newest first.
///
/// With more than one, several chains lie there, or some have a common beginning; or the image
/// that joined two pieces is missing, which opening the newer piece finds out.
///
/// # Errors
/// [`ImageError::List`], [`ImageError::NoImages`]; and if any image there cannot be opened, what is
/// wrong with it, because it could have been a last one.
pub fn last_images(directory: impl AsRef<Path>) -> Result<Vec<PathBuf>, ImageError> {
    let directory = directory.as_ref();
    let mut images = Vec::new();
    for listed in list(directory)? {
        images.push((listed.path, listed.info?));
    }
    let parents: HashSet<ImageId> =
        images.iter().filter_map(|(_, info)| Some(info.parent.as_ref()?.id)).collect();
    let any = images.first().map(|(path, _)| path.clone());
    images.retain(|(_, info)| !parents.contains(&info.id));
    // Of the same moment, the one that is listed last.
    images.reverse();
    images.sort_by_key(|(_, info)| std::cmp::Reverse(info.created));
    match (images.is_empty(), any) {
        (true, None) => Err(ImageError::NoImages { directory: directory.to_owned() }),
        // Every one is some other's parent: whichever is opened, that is found out.
        (true, Some(any)) => Ok(vec![any]),
        (false, _) => Ok(images.into_iter().map(|(path, _)| path).collect()),
    }
}

/// The last image of the only chain.
pub(super) fn last(directory: &Path) -> Result<PathBuf, ImageError> {
    let mut last = last_images(directory)?.into_iter();
    match (last.next(), last.next()) {
        (Some(only), None) => Ok(only),
        (Some(newest), Some(other)) => {
            // If a piece is missing, that is what is wrong.
            super::link::open(&newest)?;
            let directory = directory.to_owned();
            Err(ImageError::Ambiguous { directory, first: other, second: newest })
        }
        (None, _) => Err(ImageError::NoImages { directory: directory.to_owned() }),
    }
}
