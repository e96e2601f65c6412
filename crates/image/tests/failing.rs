//! Writing that fails: nothing is to be seen, and what was there before stays.

mod common;

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use common::{PAGE, at, go_on, options, page, pages};
use pageferry_image::{Chain, Encoder, Image, ImageError, ImageWriter, Step, WriterOptions};
use pageferry_testing::child::{self, End};
use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    process::{Resource, Rlimit, setrlimit},
    thread::UnshareFlags,
};

type Create = fn(&Path, WriterOptions) -> Result<ImageWriter, ImageError>;

/// With unnamed files, and as on a file system that has none.
const WAYS: [(&str, Create); 2] = [
    ("unnamed", |path, options| ImageWriter::create(path, options)),
    ("named", |path, options| ImageWriter::create_named(path, options)),
];

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// `count` different pages from this one on.
fn different(first: u64, count: u64) -> Vec<u8> {
    (first..first + count)
        .flat_map(|number| {
            let mut bytes = page(5);
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes
        })
        .collect()
}

fn base(directory: &Path) -> Image {
    let path = directory.join("base.pfi");
    let mut writer = ImageWriter::create(&path, options()).unwrap();
    writer.write(at(1), &page(1)).unwrap();
    writer.finish().unwrap();
    Image::open(path).unwrap()
}

fn assert_only_base(directory: &Path) {
    assert_eq!(entries(directory), ["base.pfi"]);
    let chain = Chain::open(directory).unwrap();
    assert_eq!(chain.images().len(), 1);
    assert!(chain.verify(&mut go_on).unwrap().is_intact());
}

#[track_caller]
fn assert_write_error(error: &ImageError, path: &Path, steps: &[Step], errno: Errno) {
    match error {
        ImageError::Write { path: named, step, error, .. } => {
            assert_eq!(named, path);
            assert!(steps.contains(step), "{step:?}");
            assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{error}");
        }
        other => panic!("{other}"),
    }
    assert!(error.to_string().contains(&path.display().to_string()));
}

#[test]
fn a_writer_dropped_at_any_step_leaves_nothing() {
    type Tell = fn(&mut ImageWriter);
    let steps: [Tell; 5] = [
        |_| {},
        |writer| writer.write(at(0), &page(3)).unwrap(),
        |writer| writer.write(at(9), &different(0, 600)).unwrap(),
        |writer| writer.zero(pages(700, 5)).unwrap(),
        |writer| writer.set_metadata("pid", "1").unwrap(),
    ];
    for (way, create) in WAYS {
        let directory = tempfile::tempdir().unwrap();
        let parent = base(directory.path());
        for count in 0..=steps.len() {
            let path = directory.path().join("new.pfi");
            let mut writer = create(&path, options().parent(&parent, "base.pfi")).unwrap();
            for step in &steps[..count] {
                step(&mut writer);
                assert!(!path.exists(), "{way}");
                // Not even while it is written is it taken for an image.
                assert_eq!(Chain::open(directory.path()).unwrap().images().len(), 1, "{way}");
            }
            drop(writer);
            assert_only_base(directory.path());
        }
    }
}

#[test]
fn a_finished_image_appears_at_once_and_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    for (way, create) in WAYS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new.pfi");
        let mut writer = create(&path, options()).unwrap();
        writer.write(at(9), &different(0, 600)).unwrap();
        let written = writer.finish().unwrap();
        assert_eq!(entries(directory.path()), ["new.pfi"], "{way}");
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), written.length, "{way}");
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{way}");
        let image = Image::open(&path).unwrap();
        assert_eq!((image.id(), image.seal()), (written.id, written.seal));
        assert!(image.verify(&mut go_on).unwrap().is_intact());
    }
}

#[test]
fn what_is_there_is_never_replaced() {
    for (way, create) in WAYS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken.pfi");
        let mut writer = create(&path, options()).unwrap();
        writer.write(at(0), &page(3)).unwrap();
        fs::write(&path, "precious").unwrap();
        let error = writer.finish().unwrap_err();
        assert_write_error(&error, &path, &[Step::Publish], Errno::EXIST);
        assert_eq!(fs::read(&path).unwrap(), b"precious", "{way}");
        assert_eq!(entries(directory.path()), ["taken.pfi"], "{way}");
    }
}

#[test]
fn a_directory_that_goes_away() {
    for (_, create) in WAYS {
        let outer = tempfile::tempdir().unwrap();
        let directory = outer.path().join("images");
        let path = directory.join("new.pfi");
        let error = create(&path, options()).unwrap_err();
        assert_write_error(&error, &path, &[Step::OpenDirectory], Errno::NOENT);

        fs::create_dir(&directory).unwrap();
        let mut writer = create(&path, options()).unwrap();
        writer.write(at(0), &different(0, 300)).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        // Another of the same name is not the one it was.
        fs::create_dir(&directory).unwrap();
        writer.write(at(300), &different(300, 300)).unwrap();
        let error = writer.finish().unwrap_err();
        assert_write_error(&error, &path, &[Step::Publish], Errno::NOENT);
        assert!(entries(&directory).is_empty());
    }
    let error = ImageWriter::create("/", options()).unwrap_err();
    assert_write_error(&error, Path::new("/"), &[Step::Create], Errno::ISDIR);
}

/// A sink that takes so many bytes.
struct Full {
    room: usize,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room == 0 {
            return Err(Errno::NOSPC.into());
        }
        let taken = bytes.len().min(self.room);
        self.room -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn every_step_can_fail_and_is_named() {
    let path = PathBuf::from("full");
    let write = |room: usize| {
        let mut encoder = Encoder::new(Full { room }, &path, options())?;
        let told = encoder.write(at(0), &different(0, 3));
        if told.is_err() {
            // Nothing it says from now on can be true.
            for again in [encoder.write(at(9), &page(0)), encoder.zero(pages(0, 1))] {
                assert!(matches!(again, Err(ImageError::Failed { .. })), "{again:?}");
            }
            told?;
        }
        encoder.finish().map(|(_, written)| written)
    };
    let length = write(usize::MAX).unwrap().length as usize;
    for room in 0..length {
        let step = match room {
            0..4096 => Step::Header,
            4096..16384 => Step::Data,
            _ => Step::Index,
        };
        assert_write_error(&write(room).unwrap_err(), &path, &[step], Errno::NOSPC);
    }
    assert!(write(length).is_ok());
}

/// Runs `test` in a directory on a file system of its own of one mebibyte, if that can be had.
fn on_a_small_disk(test: impl FnOnce(&Path) + Send) {
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: only this thread's view of the file system changes, and nobody else's:
            // this has no say about memory or descriptors.
            let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
            let mounted = unshared
                .and_then(|()| {
                    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                    rustix::mount::mount_change("/", flags)
                })
                .and_then(|()| {
                    let options = Some(c"size=1m");
                    rustix::mount::mount(
                        "none",
                        place.path(),
                        "tmpfs",
                        MountFlags::empty(),
                        options,
                    )
                });
            if let Err(error) = mounted {
                println!("skipped: needs root to mount: {error}");
                return;
            }
            test(place.path());
            rustix::mount::unmount(place.path(), UnmountFlags::empty()).unwrap();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_full_disk() {
    for (way, create) in WAYS {
        on_a_small_disk(|directory| {
            let parent = base(directory);
            let path = directory.join("new.pfi");
            let mut number = 0;
            let mut writer = create(&path, options().parent(&parent, "base.pfi")).unwrap();
            let error = loop {
                match writer.write(at(number), &different(number, 64)) {
                    Ok(()) => number += 64,
                    Err(error) => break error,
                }
                assert!(number * PAGE <= 2 << 20, "it is never full: {way}");
            };
            assert_write_error(&error, &path, &[Step::Data], Errno::NOSPC);
            assert!(matches!(writer.finish(), Err(ImageError::Failed { .. })));
            assert_only_base(directory);

            // Full at the very end: everything but the buffered rest fits.
            let room = (1 << 20) / PAGE - 3 - 8;
            fs::write(directory.join("ballast"), vec![1; (room * PAGE) as usize]).unwrap();
            let mut writer = create(&path, options().parent(&parent, "base.pfi")).unwrap();
            writer.write(at(0), &different(0, 20)).unwrap();
            let error = writer.finish().unwrap_err();
            assert_write_error(&error, &path, &[Step::Index], Errno::NOSPC);
            fs::remove_file(directory.join("ballast")).unwrap();
            assert_only_base(directory);

            // With room again, the chain goes on.
            let mut writer = create(&path, options().parent(&parent, "base.pfi")).unwrap();
            writer.write(at(0), &different(0, 20)).unwrap();
            writer.finish().unwrap();
            assert_eq!(Chain::open(directory).unwrap().images().len(), 2);
        });
    }
}

#[test]
fn a_limit_on_the_size_of_files() {
    if child::case().is_some() {
        let directory = tempfile::tempdir().unwrap();
        base(directory.path());
        // The signal that comes with it is ignored by Rust's runtime no more than others.
        // SAFETY: no handler runs; the call then fails with EFBIG.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let limit = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
        setrlimit(Resource::Fsize, limit).unwrap();
        child::reached();
        let path = directory.path().join("new.pfi");
        let mut writer = ImageWriter::create(&path, options()).unwrap();
        let error = writer.write(at(0), &different(0, 400)).unwrap_err();
        assert_write_error(&error, &path, &[Step::Data], Errno::FBIG);
        drop(writer);
        assert_only_base(directory.path());
        return;
    }
    child::expect("a_limit_on_the_size_of_files", "limited", End::Exit(0));
}

#[test]
fn a_killed_writer_leaves_no_image() {
    if let Some(case) = child::case() {
        let (way, directory) = case.split_once(' ').unwrap();
        let (_, create) = WAYS.iter().find(|(name, _)| *name == way).unwrap();
        let mut writer = create(&Path::new(directory).join("new.pfi"), options()).unwrap();
        writer.write(at(0), &different(0, 600)).unwrap();
        child::reached();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .unwrap();
        unreachable!("it was killed");
    }
    for (way, _) in WAYS {
        let directory = tempfile::tempdir().unwrap();
        base(directory.path());
        let case = format!("{way} {}", directory.path().display());
        child::expect("a_killed_writer_leaves_no_image", &case, End::Signal(9));
        assert_eq!(Chain::open(directory.path()).unwrap().images().len(), 1);
        let left = entries(directory.path());
        match way {
            "unnamed" => assert_eq!(left, ["base.pfi"]),
            _ => assert!(left.len() == 2 && left[0].ends_with(".partial"), "{left:?}"),
        }
        assert_eq!(pageferry_image::list(directory.path()).unwrap().len(), 1);
    }
}
