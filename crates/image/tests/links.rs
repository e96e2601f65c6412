//! Chains in directories: parents that are missing, wrong, altered or in a circle.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{at, encode, go_on, identity, options, page};
use pageferry_image::{
    Chain, Digest, Encoder, Image, ImageError, ImageInfo, ImageWriter, Missing, ParentState, Part,
    WriterOptions, flatten, last_images, list,
};
use pageferry_memory::PageSize;

/// A chain of so many images, `0.pfi` the oldest; each writes its own number at its own page and
/// at page 0.
fn chain(directory: &Path, length: u8) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for number in 0..length {
        let (id, created) = identity(number + 1);
        let mut options = options().identity(id, created);
        if let Some(parent) = paths.last() {
            let name = parent.file_name().unwrap().to_str().unwrap();
            options = options.parent(&Image::open(parent).unwrap(), name);
        }
        let path = directory.join(format!("{number}.pfi"));
        let mut writer = ImageWriter::create(&path, options).unwrap();
        writer.write(at(0), &page(number + 1)).unwrap();
        writer.write(at(u64::from(number) + 1), &page(number + 1)).unwrap();
        writer.finish().unwrap();
        paths.push(path);
    }
    paths
}

fn read(chain: &Chain, number: u64) -> u8 {
    let mut buffer = page(0);
    chain.read_at(at(number), &mut buffer, Missing::Poison).unwrap();
    buffer[0]
}

#[test]
fn a_chain_is_opened_by_its_directory_or_by_any_image() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 4);
    let whole = Chain::open(directory.path()).unwrap();
    assert_eq!(whole.images().len(), 4);
    assert_eq!([0, 1, 2, 3, 4].map(|number| read(&whole, number)), [4, 1, 2, 3, 4]);
    assert!(whole.verify(&mut go_on).unwrap().is_intact());
    let older = Chain::open(&paths[1]).unwrap();
    assert_eq!([0, 1, 2].map(|number| read(&older, number)), [2, 1, 2]);
    let infos: Vec<ImageInfo> = whole.images().iter().map(Image::info).collect();
    assert_eq!(infos.iter().map(|info| info.ancestors).collect::<Vec<_>>(), [3, 2, 1, 0]);
    assert_eq!(infos[0].parent.as_ref().unwrap().name(), "2.pfi");
    assert_eq!(infos[0].parent.as_ref().unwrap().seal(), infos[1].seal);
}

#[test]
fn a_renamed_parent_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 3);
    fs::rename(&paths[1], directory.path().join("other.pfi")).unwrap();
    assert_eq!(read(&Chain::open(&paths[2]).unwrap(), 2), 2);
    // Even where another image has taken its name, or something that is none.
    for instead in [fs::read(&paths[0]).unwrap(), b"no image".to_vec()] {
        fs::write(&paths[1], instead).unwrap();
        assert_eq!(read(&Chain::open(&paths[2]).unwrap(), 2), 2);
    }
}

#[test]
fn what_is_wrong_with_a_parent_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 3);
    let bytes = fs::read(&paths[1]).unwrap();
    let open = || Chain::open(&paths[2]).unwrap_err();

    fs::remove_file(&paths[1]).unwrap();
    match open() {
        ImageError::MissingParent { child, id, name } => {
            assert_eq!(child, paths[2].display().to_string());
            assert_eq!((id, &*name), (identity(2).0, "1.pfi"));
        }
        other => panic!("{other}"),
    }

    fs::copy(&paths[0], &paths[1]).unwrap();
    match open() {
        ImageError::WrongParent { parent, expected, found, .. } => {
            assert_eq!(parent, paths[1].display().to_string());
            assert_eq!((expected, found), (identity(2).0, identity(1).0));
        }
        other => panic!("{other}"),
    }

    fs::write(&paths[1], &bytes[..bytes.len() - 1]).unwrap();
    let error = open();
    assert!(matches!(error, ImageError::Incomplete { .. }), "{error}");
    assert!(error.to_string().contains("1.pfi"), "{error}");

    let mut damaged = bytes.clone();
    damaged[50] ^= 1;
    fs::write(&paths[1], damaged).unwrap();
    let error = open();
    assert!(matches!(error, ImageError::Corrupt { part: Part::Header, .. }), "{error}");

    // Of the same identity, and intact, but not the same.
    let (id, created) = identity(2);
    let parent = Image::open(&paths[0]).unwrap();
    let other = encode(options().parent(&parent, "0.pfi").identity(id, created), |encoder| {
        encoder.write(at(0), &page(77)).unwrap();
    });
    fs::write(&paths[1], other).unwrap();
    match open() {
        ImageError::AlteredParent { child, parent } => {
            assert_eq!(child, paths[2].display().to_string());
            assert_eq!(parent, paths[1].display().to_string());
        }
        other => panic!("{other}"),
    }

    // One flipped bit in the data of an ancestor is found by verifying, and the image named.
    let mut damaged = bytes;
    damaged[5000] ^= 1;
    fs::write(&paths[1], damaged).unwrap();
    let verified = Chain::open(&paths[2]).unwrap().verify(&mut go_on).unwrap();
    assert_eq!(verified.damaged, 1);
    match &verified.damage[0].error {
        ImageError::Corrupt { label, part: Part::Block(0), offset: 4096, .. } => {
            assert_eq!(*label, paths[1].display().to_string());
        }
        other => panic!("{other}"),
    }
}

/// The image with this parent id in its header, otherwise as it was.
fn with_parent(bytes: &[u8], parent: u8, name: &str, ancestors: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[48..64].fill(parent);
    bytes[108..112].copy_from_slice(&ancestors.to_le_bytes());
    bytes[112..114].copy_from_slice(&(name.len() as u16).to_le_bytes());
    bytes[128..384].fill(0);
    bytes[128..128 + name.len()].copy_from_slice(name.as_bytes());
    pageferry_image::fuzz::reseal(&mut bytes);
    bytes
}

#[test]
fn circles_are_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 3);
    let oldest = fs::read(&paths[0]).unwrap();
    // Whose parent the oldest claims to have, by identity and name.
    for (parent, name) in [(1, "0.pfi"), (2, "1.pfi"), (3, "2.pfi")] {
        fs::write(&paths[0], with_parent(&oldest, parent, name, 7)).unwrap();
        for path in [&paths[2], &directory.path().to_owned()] {
            match Chain::open(path).unwrap_err() {
                ImageError::Cycle { label, id } => {
                    assert_eq!((label, id), (paths[0].display().to_string(), identity(parent).0));
                }
                // Where all are in it, none is nobody's parent, and any is opened.
                other => panic!("{name}: {other}"),
            }
            if parent == 3 {
                break;
            }
        }
        assert_eq!(list(directory.path()).unwrap().len(), 3);
    }
}

#[test]
fn lies_about_ancestors_are_noticed() {
    let parent = common::small();
    let child = common::small_child(&common::open(parent.clone()));
    // What the header says: ancestors, name, what is wrong with it.
    for (ancestors, name, part) in [
        (5, "small.pfi", "another number of ancestors"),
        (0, "small.pfi", "a parent and no ancestors"),
        (1, "../small.pfi", "not a file name"),
        (1, "", "not a file name"),
    ] {
        let bytes = with_parent(&child, 1, name, ancestors);
        let error = Image::from_storage(Box::new(bytes), "child")
            .and_then(|child| Chain::new(vec![child, common::open(parent.clone())]))
            .unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    let error = Chain::new(vec![common::open(child.clone())]).unwrap_err();
    assert!(matches!(error, ImageError::MissingParent { .. }), "{error}");
    let error = Chain::new(vec![common::open(child.clone()), common::open(child)]).unwrap_err();
    assert!(matches!(error, ImageError::WrongParent { .. }), "{error}");
    let error = Chain::new(vec![common::open(parent.clone()), common::open(parent)]).unwrap_err();
    assert!(matches!(error, ImageError::Unfit { .. }), "{error}");
    assert!(Chain::new(Vec::new()).is_err());
}

#[test]
fn too_many_images_are_refused() {
    let mut images: Vec<Vec<u8>> = Vec::new();
    for _ in 0..=Chain::MOST_IMAGES {
        let mut options = options();
        if let Some(parent) = images.last() {
            options = options.parent(&common::open(parent.clone()), "x.pfi");
        }
        images.push(encode(options, |_| {}));
    }
    let open = |count: usize| {
        Chain::new(images[..count].iter().rev().map(|bytes| common::open(bytes.clone())).collect())
    };
    assert!(open(Chain::MOST_IMAGES).is_ok());
    let error = open(Chain::MOST_IMAGES + 1).unwrap_err();
    assert!(matches!(error, ImageError::TooLong { limit: Chain::MOST_IMAGES, .. }), "{error}");
}

#[test]
fn a_directory_is_listed_in_the_order_of_chains() {
    let directory = tempfile::tempdir().unwrap();
    let error = Chain::open(directory.path()).unwrap_err();
    assert!(matches!(error, ImageError::NoImages { .. }), "{error}");
    assert!(list(directory.path()).unwrap().is_empty());

    let paths = chain(directory.path(), 3);
    fs::write(directory.path().join("notes.txt"), "not an image").unwrap();
    fs::write(directory.path().join(".x.pfi.0123.partial"), "not finished").unwrap();
    // In another order by name.
    fs::rename(&paths[0], directory.path().join("z.pfi")).unwrap();
    let names = |listed: Vec<pageferry_image::Listed>| {
        listed
            .into_iter()
            .map(|listed| {
                let name = listed.path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, listed.info.is_ok(), listed.parent)
            })
            .collect::<Vec<_>>()
    };
    let expected = |list: &[(&str, bool, ParentState)]| {
        list.iter().map(|(name, ok, state)| ((*name).to_owned(), *ok, *state)).collect::<Vec<_>>()
    };
    let sound = [
        ("z.pfi", true, ParentState::None),
        ("1.pfi", true, ParentState::Present),
        ("2.pfi", true, ParentState::Present),
    ];
    assert_eq!(names(list(directory.path()).unwrap()), expected(&sound));

    // A second head: which one is meant?
    let (id, created) = identity(9);
    let base = Image::open(directory.path().join("z.pfi")).unwrap();
    let branch = directory.path().join("branch.pfi");
    let options = options().parent(&base, "z.pfi").identity(id, created);
    ImageWriter::create(&branch, options).unwrap().finish().unwrap();
    let error = Chain::open(directory.path()).unwrap_err();
    assert!(matches!(error, ImageError::Ambiguous { .. }), "{error}");
    let of = |path: &Path| Image::open(path).unwrap().info().created;
    let last = last_images(directory.path()).unwrap();
    assert_eq!(last.len(), 2);
    assert!(of(&last[0]) >= of(&last[1]), "the newest first");
    assert!(last.contains(&branch) && last.contains(&directory.path().join("2.pfi")));
    assert_eq!(Chain::open(&branch).unwrap().images().len(), 2);
    let with_branch = [&sound[..], &[("branch.pfi", true, ParentState::Present)]].concat();
    assert_eq!(names(list(directory.path()).unwrap()), expected(&with_branch));
    fs::remove_file(&branch).unwrap();

    // One that cannot be read could be the last: nothing is guessed, and the rest is still told.
    fs::write(&branch, "broken").unwrap();
    let error = Chain::open(directory.path()).unwrap_err();
    assert!(matches!(error, ImageError::NotAnImage { .. }), "{error}");
    let with_broken = [&sound[..], &[("branch.pfi", false, ParentState::Unknown)]].concat();
    assert_eq!(names(list(directory.path()).unwrap()), expected(&with_broken));
    fs::remove_file(&branch).unwrap();

    // The middle is missing: what there is seems to be two chains.
    let (middle, away) = (directory.path().join("1.pfi"), directory.path().join("away"));
    fs::rename(&middle, &away).unwrap();
    let error = Chain::open(directory.path()).unwrap_err();
    assert!(matches!(&error, ImageError::MissingParent { name, .. } if name == "1.pfi"), "{error}");
    fs::rename(&away, &middle).unwrap();

    fs::remove_file(directory.path().join("z.pfi")).unwrap();
    let orphans = [("1.pfi", true, ParentState::Missing), ("2.pfi", true, ParentState::Present)];
    assert_eq!(names(list(directory.path()).unwrap()), expected(&orphans));
    let error = list(directory.path().join("nowhere")).unwrap_err();
    assert!(matches!(error, ImageError::List { .. }), "{error}");
}

#[test]
fn a_parent_is_checked_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let paths = chain(directory.path(), 2);
    let parent = Image::open(&paths[1]).unwrap();
    let create = |directory: &Path, name: &str| {
        ImageWriter::create(directory.join("new.pfi"), options().parent(&parent, name))
    };
    let error = create(elsewhere.path(), "1.pfi").unwrap_err();
    assert!(matches!(error, ImageError::MissingParent { .. }), "{error}");
    let error = create(directory.path(), "0.pfi").unwrap_err();
    assert!(matches!(error, ImageError::WrongParent { .. }), "{error}");
    create(directory.path(), "1.pfi").unwrap();
}

#[test]
fn a_chain_flattened_into_a_file() {
    let directory = tempfile::tempdir().unwrap();
    chain(directory.path(), 4);
    let whole = Chain::open(directory.path()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("flat.pfi");
    let options = WriterOptions::new(PageSize::SIZE_4K);
    let mut writer = ImageWriter::create(&path, options.clone()).unwrap();
    let mut last = None;
    flatten(&whole, &mut writer, &mut |progress| {
        last = Some(progress);
        go_on(progress)
    })
    .unwrap();
    assert_eq!(last.map(|progress| (progress.done, progress.total)), Some((5 * 4096, 5 * 4096)));
    writer.finish().unwrap();
    let flat = Chain::open(&path).unwrap();
    assert_eq!(flat.images().len(), 1);
    assert_eq!([0, 1, 2, 3, 4].map(|number| read(&flat, number)), [4, 1, 2, 3, 4]);
    assert_eq!(Digest::of(&fs::read(&path).unwrap()).to_string().len(), 64);

    let mut encoder = Encoder::new(Vec::new(), "cancelled", options).unwrap();
    let error =
        flatten(&whole, &mut encoder, &mut |_| std::ops::ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled { .. }), "{error}");
}
