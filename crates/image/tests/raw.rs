//! A raw image as a source: real files, whole, short, sparse, and unreadable in the middle.

#[path = "common/sink.rs"]
mod sink;

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use pageferry_image::{ImageError, RawImage};
use pageferry_paging::{PageSource, SourceError, Urgency};
use pageferry_testing::{OwnMemory, PAGE};
use sink::{Answer, Sink, layout, span};

/// A file of `pages` pages, each filled with its number plus one.
fn image(pages: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all_at(&contents(page), page * PAGE).unwrap();
    }
    file
}

fn contents(page: u64) -> Vec<u8> {
    vec![page as u8 + 1; PAGE as usize]
}

fn data(pages: std::ops::Range<u8>) -> Vec<Answer> {
    pages.map(|page| Answer::Data(page + 1)).collect()
}

#[test]
fn several_regions_in_one_file() {
    let image = RawImage::from_file(image(24), "image").unwrap();
    assert_eq!((image.length(), image.label()), (24 * PAGE, "image"));
    assert!(image.signal_safe() && image.answers_inline());
    for piece in [1, 3, 100] {
        let sink =
            Sink::new(layout(&[(8, PAGE, 8 * PAGE), (8, PAGE, 0), (8, PAGE, 16 * PAGE)]), piece);
        image.attach(sink.clone()).unwrap();
        assert_eq!(image.shortfall(), 0);
        for region in 0..3 {
            image.request(span(region, 0, 5), Urgency::Demand, &*sink).unwrap();
            image.request(span(region, 5, 3), Urgency::Prefetch, &*sink).unwrap();
        }
        assert_eq!(*sink.calls.lock().unwrap(), 6, "a contiguous run is one answer");
        assert_eq!(sink.by_granule(0), data(8..16));
        assert_eq!(sink.by_granule(1), data(0..8));
        assert_eq!(sink.by_granule(2), data(16..24));
        image.detach();
    }
}

#[test]
fn shorter_than_the_memory() {
    let file = image(6);
    // The sixth page is cut in half: it cannot come, and must not come half.
    file.set_len(5 * PAGE + PAGE / 2).unwrap();
    let image = RawImage::from_file(file, "short").unwrap();
    let sink = Sink::new(layout(&[(10, PAGE, 0), (4, PAGE, 100 * PAGE)]), 4);
    image.attach(sink.clone()).unwrap();
    assert_eq!(image.shortfall(), 9 * PAGE);
    image.request(span(0, 0, 10), Urgency::Demand, &*sink).unwrap();
    image.request(span(1, 0, 4), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0), [data(0..5), vec![Answer::Poison; 5]].concat());
    assert_eq!(sink.by_granule(1), [Answer::Poison; 4]);
}

#[test]
fn an_empty_image() {
    let image = RawImage::from_file(tempfile::tempfile().unwrap(), "empty").unwrap();
    let sink = Sink::new(layout(&[(3, PAGE, 0)]), 1);
    image.attach(sink.clone()).unwrap();
    image.request(span(0, 0, 3), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0), [Answer::Poison; 3]);
}

#[test]
fn holes_are_zero_without_being_read() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(40 * PAGE).unwrap();
    for page in [3u64, 4, 20] {
        file.write_all_at(&contents(page), page * PAGE).unwrap();
    }
    let image = RawImage::from_file(file, "sparse").unwrap();
    // What the file system says is what counts; one that keeps no holes makes it all data.
    let sparse = image.holes(0, PAGE, 40) == (true, 3);
    if !sparse {
        println!("skipped: needs a file system with SEEK_HOLE at page granularity");
        return;
    }
    let sink = Sink::new(layout(&[(40, PAGE, 0)]), 7);
    image.attach(sink.clone()).unwrap();
    image.request(span(0, 0, 40), Urgency::Prefetch, &*sink).unwrap();
    let mut want = vec![Answer::Zero; 40];
    for page in [3u8, 4, 20] {
        want[usize::from(page)] = Answer::Data(page + 1);
    }
    assert_eq!(sink.by_granule(0), want);
    assert_eq!(*sink.calls.lock().unwrap(), 5);

    // A granule that is part hole and part data is data.
    let sink = Sink::new(layout(&[(2, 4 * PAGE, 8 * PAGE)]), 1);
    image.request(span(0, 0, 2), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0), [Answer::Zero; 2]);
}

/// This process's own memory as an image, with a gap in it that no read gets over (EIO).
fn memory_image(pages: u64, gap: std::ops::Range<u64>) -> (RawImage, OwnMemory) {
    let memory = OwnMemory::new(pages, gap, contents);
    (RawImage::from_file_sized(memory.file(), "own memory", i64::MAX as u64), memory)
}

#[test]
fn unreadable_in_the_middle() {
    for piece in [1, 4, 5, 32] {
        let (image, memory) = memory_image(20, 7..9);
        let mut byte = [0];
        let error = image.read_at(memory.offset() + 7 * PAGE, &mut byte).unwrap_err();
        assert!(matches!(&error, ImageError::Read { .. }), "{error}");
        assert_eq!(
            std::error::Error::source(&error).map(|e| e.to_string()).as_deref(),
            Some("Input/output error (os error 5)")
        );

        let sink = Sink::new(layout(&[(20, PAGE, memory.offset())]), piece);
        image.attach(sink.clone()).unwrap();
        image.request(span(0, 0, 20), Urgency::Demand, &*sink).unwrap();
        let want = [data(0..7), vec![Answer::Poison; 2], data(9..20)].concat();
        assert_eq!(sink.by_granule(0), want, "pieces of {piece}");
    }
}

/// A sink that cannot install one granule still gets all the others; one that has stopped gets
/// nothing more.
#[test]
fn sinks_that_refuse() {
    let (image, memory) = memory_image(20, 7..9);
    let mut sink = Sink::new(layout(&[(20, PAGE, memory.offset())]), 4);
    Arc::get_mut(&mut sink).unwrap().refuse = Some(6);
    image.request(span(0, 0, 20), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0).len(), 20);

    let mut sink = Sink::new(layout(&[(20, PAGE, memory.offset())]), 1);
    Arc::get_mut(&mut sink).unwrap().stop_at = Some(12);
    image.request(span(0, 0, 20), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0).len(), 12);
}

#[test]
fn what_cannot_be_an_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none");
    let error = RawImage::open(&path).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    let error = RawImage::open("/dev/null").unwrap_err();
    assert!(matches!(error, ImageError::Examine { .. }), "{error}");

    let image = RawImage::from_file(image(1), "small").unwrap();
    let sink = Sink::new(layout(&[(1, PAGE, i64::MAX as u64 - PAGE + 1)]), 1);
    assert!(matches!(image.attach(sink), Err(SourceError::Mismatch(_))));
    let sink = Sink::new(layout(&[(1, PAGE, 0)]), 1);
    for outside in [span(0, 0, 2), span(0, 5, 1), span(3, 0, 1)] {
        let answer = image.request(outside, Urgency::Demand, &*sink);
        assert!(matches!(answer, Err(SourceError::Mismatch(_))));
    }
    assert!(sink.answers.lock().unwrap().is_empty());
}
