//! `pageferry image` on images that are cut short, altered, or without their parents.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use common::{expect_code, json, pageferry, run, text};
use pageferry::{
    image::{Image, ImageRange, ImageWriter, Known, WriterOptions},
    memory::{ImageOffset, PageSize},
};
use serde_json::Value;

const PAGE: u64 = 4096;

fn at(page: u64) -> ImageOffset {
    ImageOffset::new(page * PAGE)
}

/// A page of its own for each number.
fn page(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(PAGE as usize / 8)
}

/// Three images of a small memory: the second has one page of its own, one that is zero and one that
/// is gone; the third refers to the first.
fn chain(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut known: Option<Known> = None;
    for number in 0..3 {
        let mut options = WriterOptions::new(PageSize::SIZE_4K);
        if let (Some(parent), Some(known)) = (paths.last(), known.take()) {
            let name = parent.file_name().expect("a name").to_str().expect("UTF-8");
            options = options.parent(&Image::open(parent).expect("the parent"), name).known(known);
        }
        let path = directory.join(format!("{number}.pfi"));
        let mut writer = ImageWriter::create(&path, options).expect("begun");
        let said = match number {
            0 => writer.write(at(0), &(1..7).flat_map(page).collect::<Vec<_>>()),
            1 => writer
                .write(at(1), &page(100))
                .and_then(|()| writer.zero(ImageRange::new(at(2), PAGE)))
                .and_then(|()| writer.gone(ImageRange::new(at(3), PAGE))),
            _ => writer.write(at(2), &[page(6), page(1), page(100)].concat()),
        };
        said.expect("said");
        known = Some(writer.finish_for_child().expect("finished").1);
        paths.push(path);
    }
    paths
}

fn image(command: &str, path: &Path) -> Output {
    run(pageferry(["--json", "image", command]).arg(path))
}

/// The command fails, and names this file.
#[track_caller]
fn refuses(command: &str, path: &Path, named: &Path) -> String {
    let output = image(command, path);
    expect_code(&output, 1);
    let said = format!("{}{}", text(&output), String::from_utf8_lossy(&output.stdout));
    let name = named.file_name().expect("a name").to_str().expect("UTF-8");
    assert!(said.contains(name), "{command} {name}: {said}");
    said
}

#[test]
fn a_chain_whose_images_share_their_blocks() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    let output = image("verify", folder.path());
    expect_code(&output, 0);
    assert_eq!(json(&output)["blocks"], 7);
    let info = json(&image("info", &paths[2]));
    let amounts = ["data_bytes", "stored_bytes", "elsewhere_bytes"].map(|key| &info[key]);
    assert_eq!(amounts, [3 * PAGE, 0, 3 * PAGE].map(Value::from).each_ref());
    let listed = json(&image("ls", folder.path()));
    let shared = |index: usize| listed["images"][index]["elsewhere_bytes"].as_u64();
    assert_eq!([0, 1, 2].map(shared), [Some(0), Some(0), Some(3 * PAGE)]);
    let said = run(pageferry(["image", "info"]).arg(&paths[2]));
    assert!(String::from_utf8_lossy(&said.stdout).contains("12 KiB in images before"), "{said:?}");

    let whole = folder.path().join("whole");
    expect_code(&run(pageferry(["image", "flatten"]).arg(&paths[2]).arg(&whole)), 0);
    let flat = json(&image("info", &whole));
    // Six pages, of three contents.
    let amounts = ["data_bytes", "stored_bytes", "elsewhere_bytes"].map(|key| &flat[key]);
    assert_eq!(amounts, [6 * PAGE, 3 * PAGE, 0].map(Value::from).each_ref());
    let differences = |before: &Path, after: &Path| {
        let output = run(pageferry(["--json", "image", "diff"]).arg(before).arg(after));
        expect_code(&output, 0);
        json(&output)["differences"].clone()
    };
    assert_eq!(differences(&paths[2], &whole), Value::Array(Vec::new()));
    // Page 2 to 4, of which one was zero, one gone and one another.
    let found = differences(&paths[1], &paths[2]);
    let kinds: Vec<_> =
        found.as_array().expect("a list").iter().map(|one| &one["before"]).collect();
    assert_eq!(kinds, ["zero", "absent", "data"], "{found}");
}

#[test]
fn an_image_that_is_cut_short() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    let bytes = fs::read(&paths[1]).expect("the image");
    for length in [0, 1, 7, 8, 4095, 4096, 4352, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&paths[1], &bytes[..length]).expect("written");
        for (command, path) in [("verify", &paths[2]), ("verify", &paths[1]), ("info", &paths[1])] {
            let said = refuses(command, path, &paths[1]);
            assert!(said.contains("cut short"), "{length}: {said}");
        }
        refuses("verify", folder.path(), &paths[1]);
        refuses("ls", folder.path(), &paths[1]);
        // What does not need it is not touched.
        expect_code(&image("verify", &paths[0]), 0);
    }
}

#[test]
fn an_image_whose_parent_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    let away = folder.path().join("away");
    fs::rename(&paths[0], &away).expect("renamed");
    for command in ["verify", "flatten"] {
        let to = folder.path().join("flat.pfi");
        let mut asked = pageferry(["image", command]);
        asked.arg(&paths[2]);
        if command == "flatten" {
            asked.arg(&to);
        }
        let output = run(&mut asked);
        expect_code(&output, 1);
        assert!(text(&output).contains("is missing: 0.pfi"), "{}", text(&output));
        assert!(!to.exists());
    }
    let output = image("ls", folder.path());
    expect_code(&output, 1);
    let listed = json(&output);
    let states: Vec<&Value> =
        listed["images"].as_array().expect("images").iter().map(|i| &i["parent_state"]).collect();
    assert_eq!(states, ["missing", "present"], "{listed}");
    // It is what it was under another name too, if that is one of an image.
    fs::rename(&away, folder.path().join("renamed.pfi")).expect("renamed");
    expect_code(&image("verify", &paths[2]), 0);
}

/// Of several chains in a directory the newest one is meant, and that is said.
#[test]
fn a_directory_with_several_chains() {
    let folder = tempfile::tempdir().expect("a folder");
    let older = chain(folder.path());
    let other = folder.path().join("other.pfi");
    let mut writer =
        ImageWriter::create(&other, WriterOptions::new(PageSize::SIZE_4K)).expect("begun");
    writer.write(at(0), &page(9)).expect("said");
    writer.finish().expect("finished");
    let whole = folder.path().join("whole");
    for command in ["verify", "info", "flatten", "diff"] {
        let mut asked = pageferry(["--json", "image", command]);
        asked.arg(folder.path());
        match command {
            "flatten" => drop(asked.arg(&whole)),
            "diff" => drop(asked.arg(&other)),
            _ => {}
        }
        let output = run(&mut asked);
        expect_code(&output, 0);
        let said = text(&output);
        assert!(said.contains("2 chains"), "{command}: {said}");
        let of = |path: &Path| said.find(path.to_str().expect("UTF-8"));
        assert!(of(&other).is_some() && of(&other) < of(&older[2]), "{command}: {said}");
        let report = json(&output);
        match command {
            "verify" => assert_eq!(report["images"], 1),
            "info" => assert_eq!(report["path"], other.to_str().expect("UTF-8")),
            "flatten" => assert_eq!(report["data_bytes"], PAGE),
            _ => assert_eq!(report["differing_bytes"], 0),
        }
    }
    // With one there is nothing to say.
    fs::remove_file(&other).expect("removed");
    let output = image("info", folder.path());
    expect_code(&output, 0);
    assert_eq!((text(&output), &json(&output)["ancestors"]), (String::new(), &2.into()));
    expect_code(&image("info", &folder.path().join("nothing")), 1);
    // Where the middle is missing, it is named.
    fs::remove_file(&older[1]).expect("removed");
    for command in ["verify", "flatten"] {
        let mut asked = pageferry(["image", command]);
        asked.arg(folder.path());
        if command == "flatten" {
            asked.arg(folder.path().join("again"));
        }
        let output = run(&mut asked);
        expect_code(&output, 1);
        assert!(text(&output).contains("is missing: 1.pfi"), "{command}: {}", text(&output));
    }
    let output = run(pageferry(["image", "ls"]).arg(folder.path()));
    expect_code(&output, 1);
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("missing: 1.pfi"), "{listed}");
}

/// Nothing is read for a file that cannot be written.
#[test]
fn what_is_there_is_not_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    let there = folder.path().join("there");
    fs::write(&there, "mine").expect("written");
    // Reading it would find that out.
    fs::write(&paths[0], "damaged").expect("written");
    let output = run(pageferry(["image", "flatten"]).arg(folder.path()).arg(&there));
    expect_code(&output, 1);
    let said = text(&output);
    assert!(said.contains("there is such a file already") && !said.contains("0.pfi"), "{said}");
    assert_eq!(fs::read(&there).expect("the file"), b"mine");
}

/// Where in the file each part begins, by the footer.
fn parts(bytes: &[u8]) -> Vec<(&'static str, usize)> {
    let footer = bytes.len() - 256;
    let field = |at: usize| {
        u64::from_le_bytes(*bytes[footer + at..].first_chunk().expect("a field")) as usize
    };
    let mut parts = vec![("header", 0)];
    parts.extend((0..field(112)).map(|block| ("block", 4096 * (block + 1))));
    parts.extend([
        ("block table", field(104)),
        ("run table", field(120)),
        ("catalog", field(136)),
        ("root", field(152)),
        ("footer", footer),
    ]);
    parts.push(("end", bytes.len()));
    parts
}

/// One bit of every part of every image: the file and the part are named. (Every bit of every byte is
/// tried where it takes no process: in the tests of the crate of images.)
#[test]
fn an_image_with_one_flipped_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    for (number, path) in paths.iter().enumerate() {
        let bytes = fs::read(path).expect("the image");
        for window in parts(&bytes).windows(2) {
            let ((part, from), (_, to)) = (window[0], window[1]);
            // The last image has no blocks of its own.
            if from == to {
                continue;
            }
            for place in [from, (from + to) / 2, to - 1] {
                let mut altered = bytes.clone();
                altered[place] ^= 1 << (place % 8);
                fs::write(path, &altered).expect("written");
                let said = refuses("verify", folder.path(), path);
                let magic = part == "header" && place < 8;
                assert!(
                    said.contains(part) || magic && said.contains("not an image"),
                    "image {number}, {part} at {place}: {said}"
                );
            }
        }
        fs::write(path, &bytes).expect("written");
    }
    expect_code(&image("verify", folder.path()), 0);
}

/// Damage to a block that others refer to: what of them is lost is told too.
#[test]
fn damage_that_is_shared() {
    let folder = tempfile::tempdir().expect("a folder");
    let paths = chain(folder.path());
    let mut bytes = fs::read(&paths[0]).expect("the image");
    // Page 1, which is at position 0 there, and at 3 in the third.
    bytes[4096] ^= 1;
    fs::write(&paths[0], bytes).expect("written");
    let output = image("verify", folder.path());
    expect_code(&output, 1);
    let report = json(&output);
    let damage = &report["damage"][0];
    assert_eq!(damage["lost_bytes"], 2 * PAGE, "{report}");
    let starts: Vec<_> =
        damage["lost"].as_array().expect("a list").iter().map(|range| &range["start"]).collect();
    assert_eq!(starts, [&Value::from(0), &Value::from(3 * PAGE)]);
}
