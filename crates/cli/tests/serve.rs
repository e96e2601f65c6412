//! `pageferry serve` as a script and its clients see it.

mod common;

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::fs::FileExt as _,
    path::Path,
    process::ChildStdout,
    sync::Arc,
    thread,
    time::Duration,
};

use common::{Running, expect_code, host::has_userfaultfd, pageferry, run, text, words};
use pageferry::{
    memory::{Backing, Layout, Region, RegionConfig, RegionId},
    migrate::{Endpoint, MigrateError, PeerOptions, PeerReader, PeerSource, core::WireSpan},
    paging::{Delivery, Pager, Prefetch, Status},
};
use rustix::process::Signal;
use serde_json::Value;

const PAGE: u64 = 4096;
/// The image: this many pages, data but for a hole, and a part of a page.
const PAGES: u64 = 1000;
const HOLE: std::ops::Range<u64> = 300..700;
const REST: u64 = 1234;

fn image(folder: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..PAGES * PAGE + REST)
        .map(|at| ((at / PAGE * 31 + at % PAGE * 7) % 251 + 1) as u8)
        .collect();
    bytes[(HOLE.start * PAGE) as usize..(HOLE.end * PAGE) as usize].fill(0);
    let path = folder.join("image");
    let file = File::create_new(&path).expect("a new file");
    file.write_all_at(&bytes[..(HOLE.start * PAGE) as usize], 0).expect("writing the image");
    file.write_all_at(&bytes[(HOLE.end * PAGE) as usize..], HOLE.end * PAGE).expect("writing");
    (path, bytes)
}

/// The command, while it serves.
struct Serving {
    running: Running,
    stdout: BufReader<ChildStdout>,
    endpoint: Endpoint,
    bytes: u64,
}

impl Serving {
    fn start(image: &Path, more: &str) -> Self {
        let mut command = pageferry(["--json", "serve"]);
        command.arg(image).args(words(more));
        let mut running = Running::start_unread(&mut command);
        let mut stdout = BufReader::new(running.take_stdout());
        let listening = next_line(&mut stdout);
        assert_eq!(listening["event"], "listening");
        let endpoint = listening["address"].as_str().expect("an address").parse().expect("valid");
        let bytes = listening["bytes"].as_u64().expect("a length");
        Self { running, stdout, endpoint, bytes }
    }

    /// Tells it to stop; returns what it reports of its work.
    #[track_caller]
    fn stop(mut self, signal: Signal) -> Value {
        self.running.signal(signal);
        let stopped = next_line(&mut self.stdout);
        let mut more = String::new();
        self.stdout.read_to_string(&mut more).expect("the end of its output");
        assert_eq!(more, "");
        let output = self.running.end();
        expect_code(&output, 0);
        assert_eq!(text(&output), "");
        assert_eq!(stopped["event"], "stopped");
        stopped
    }

    fn reader(&self) -> PeerReader {
        PeerReader::connect(&self.endpoint, PeerOptions::default()).expect("a connection")
    }
}

/// One event is one line.
#[track_caller]
fn next_line(from: &mut impl std::io::BufRead) -> Value {
    let mut line = String::new();
    from.read_line(&mut line).expect("a line");
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

fn span(first: u64, count: u64) -> WireSpan {
    WireSpan { region: 0, first, count: u32::try_from(count).expect("few") }
}

/// Reads everything that can be read, a few pages at a time, and compares it.
#[track_caller]
fn read_all(reader: &mut PeerReader, expected: &[u8], step: u64) {
    for first in (0..PAGES).step_by(step as usize) {
        let count = step.min(PAGES - first);
        let mut bytes = vec![0xaa; (count * PAGE) as usize];
        reader.read(span(first, count), &mut bytes).expect("whole pages");
        let from = (first * PAGE) as usize;
        assert!(bytes == expected[from..from + bytes.len()], "pages from {first} on differ");
    }
}

#[test]
fn several_clients_read_everything() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, bytes) = image(folder.path());
    for listen in ["127.0.0.1:0".to_owned(), format!("unix:{}/socket", folder.path().display())] {
        let serving = Serving::start(&path, &format!("--listen {listen}"));
        assert_eq!(serving.bytes, bytes.len() as u64);
        thread::scope(|scope| {
            for step in [1, 7, 64, 1000] {
                let (serving, bytes) = (&serving, &bytes);
                scope.spawn(move || read_all(&mut serving.reader(), bytes, step));
            }
        });
        let stopped = serving.stop(Signal::INT);
        assert_eq!(stopped["sessions"], 4);
        assert_eq!(stopped["failed"], 0, "{stopped}");
        assert_eq!(stopped["granules_zero"], 4 * (HOLE.end - HOLE.start));
        assert_eq!(stopped["granules_data"], 4 * (PAGES - (HOLE.end - HOLE.start)));
        assert_eq!(stopped["granules_poisoned"], 0);
        assert!(!folder.path().join("socket").exists(), "the socket is left behind");
    }
}

#[test]
fn a_page_cut_short_by_the_end_of_the_image_is_poisoned_and_the_rest_is_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, expected) = image(folder.path());
    let serving = Serving::start(&path, "--listen 127.0.0.1:0");
    let mut reader = serving.reader();
    let mut bytes = vec![0xaa; 2 * PAGE as usize];
    match reader.read(span(PAGES - 1, 2), &mut bytes) {
        Err(MigrateError::Poisoned { granule, .. }) => assert_eq!(granule, PAGES),
        other => panic!("{other:?}"),
    }
    let last = ((PAGES - 1) * PAGE) as usize;
    assert!(bytes[..PAGE as usize] == expected[last..last + PAGE as usize]);
    // The same connection goes on.
    read_all(&mut reader, &expected, 100);
    drop(reader);
    let stopped = serving.stop(Signal::TERM);
    assert_eq!(stopped["granules_poisoned"], 1);
    assert_eq!(stopped["failed"], 0, "{stopped}");
}

#[test]
fn granules_of_any_size() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, expected) = image(folder.path());
    let size = 1 << 20;
    let serving = Serving::start(&path, "--listen 127.0.0.1:0 --granule 1MiB");
    let mut reader = serving.reader();
    assert_eq!(reader.regions()[0].granule, size);
    let whole = expected.len() as u64 / size;
    let mut bytes = vec![0; (whole * size) as usize];
    reader.read(span(0, whole), &mut bytes).expect("whole granules");
    assert!(bytes == expected[..bytes.len()]);
    let mut last = vec![0; size as usize];
    let cut = reader.read(span(whole, 1), &mut last);
    assert!(matches!(cut, Err(MigrateError::Poisoned { .. })), "{cut:?}");
}

/// A whole post-copy from the image, by an engine in this process, while others read.
#[test]
fn pagers_are_served_at_the_same_time() {
    if !has_userfaultfd() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (path, expected) = image(folder.path());
    let serving = Serving::start(&path, "--listen 127.0.0.1:0");
    thread::scope(|scope| {
        for (delivery, backing, prefetch) in [
            (Delivery::Queue, Backing::Anonymous, Prefetch::SWEEP),
            (Delivery::Signal, Backing::Memfd, Prefetch::SWEEP),
            (Delivery::ByThread(2), Backing::Memfd, Prefetch::NONE),
        ] {
            let (serving, expected) = (&serving, &expected);
            scope.spawn(move || {
                let region = Region::new(&RegionConfig::new(PAGES * PAGE, backing));
                let layout = Layout::new(vec![Arc::new(region.expect("memory"))]).expect("one");
                let source = PeerSource::connect(&serving.endpoint, PeerOptions::default());
                let pager = Pager::builder(layout)
                    .delivery(delivery)
                    .prefetch(prefetch)
                    .start(Arc::new(source.expect("a connection")))
                    .expect("a pager");
                let region = pager.layout().get(RegionId::new(0)).expect("the region");
                let mut bytes = vec![0xaa; (PAGES * PAGE) as usize];
                region.guest_view().read_at(0, &mut bytes).expect("within the region");
                assert!(bytes == expected[..bytes.len()], "{delivery} {backing}");
                let status = pager.wait_complete(Duration::from_secs(30));
                let Status::Complete(counts) = status else { panic!("{delivery}: {status:?}") };
                assert_eq!(counts.granules_from_source, PAGES, "{delivery}");
            });
        }
        let (serving, expected) = (&serving, &expected);
        scope.spawn(move || read_all(&mut serving.reader(), expected, 50));
    });
    let stopped = serving.stop(Signal::INT);
    assert_eq!(stopped["sessions"], 4);
    assert_eq!(stopped["failed"], 0, "{stopped}");
    let served = ["granules_zero", "granules_data"].map(|field| stopped[field].as_u64());
    assert_eq!(served[0].and_then(|zero| Some(zero + served[1]?)), Some(4 * PAGES));
}

#[test]
fn it_stops_while_clients_are_connected() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, _) = image(folder.path());
    for signal in [Signal::INT, Signal::TERM] {
        let socket = folder.path().join("socket");
        let listen = format!("--listen unix:{} --delay-us 60000000", socket.display());
        let serving = Serving::start(&path, &listen);
        // One that waits for an answer, which is a minute away, and one that does nothing.
        let (mut waiting, idle) = (serving.reader(), serving.reader());
        let waiter = thread::spawn(move || waiting.read(span(0, 1), &mut [0; PAGE as usize]));
        let stopped = serving.stop(signal);
        assert_eq!(stopped["sessions"], 2);
        let ended = waiter.join().expect("no panic");
        assert!(ended.is_err(), "no answer can have come");
        assert!(!socket.exists());
        drop(idle);
    }
}

#[test]
fn for_people_the_address_is_the_first_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, bytes) = image(folder.path());
    let mut command = pageferry(["serve"]);
    command.arg(&path).args(["--listen", "127.0.0.1:0"]);
    let mut running = Running::start_unread(&mut command);
    let mut line = String::new();
    BufReader::new(running.take_stdout()).read_line(&mut line).expect("a line");
    let address = line.strip_prefix("listening on ").and_then(|rest| rest.split_once(": "));
    let endpoint: Endpoint = address.expect("an address").0.parse().expect("a valid address");
    let mut reader = PeerReader::connect(&endpoint, PeerOptions::default()).expect("it listens");
    read_all(&mut reader, &bytes, 500);
    running.signal(Signal::INT);
    expect_code(&running.end(), 0);
}

#[test]
fn what_cannot_be_served_or_listened_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, _) = image(folder.path());
    let empty = folder.path().join("empty");
    File::create_new(&empty).expect("a new file");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let taken_socket = folder.path().join("taken");
    let _listener = std::os::unix::net::UnixListener::bind(&taken_socket).expect("a socket");
    let at_file = format!("unix:{}", path.display());
    let at_taken = format!("unix:{}", taken_socket.display());
    let (image, missing) = (path.to_str().expect("text"), folder.path().join("missing"));
    let (missing, empty) = (missing.to_str().expect("text"), empty.to_str().expect("text"));
    let directory = folder.path().to_str().expect("text");
    let any = "127.0.0.1:0";
    // Image, address, granule; exit code, and what the text says.
    let cases: [(&str, &str, &str, i32, &[&str]); 13] = [
        (missing, any, "4KiB", 1, &[missing, "No such file"]),
        (directory, any, "4KiB", 1, &[directory, "neither a regular file nor a block device"]),
        ("/dev/null", any, "4KiB", 1, &["/dev/null", "neither a regular file"]),
        (empty, any, "4KiB", 1, &[empty, "empty"]),
        (image, &taken, "4KiB", 1, &[&taken, "in use"]),
        (image, &at_taken, "4KiB", 1, &[&at_taken, "in use"]),
        (image, &at_file, "4KiB", 1, &[&at_file, "in use"]),
        (image, "unix:/no/such/folder/socket", "4KiB", 1, &["No such file"]),
        (image, any, "5000", 2, &["--granule 5000", "power of two"]),
        (image, any, "2KiB", 2, &["--granule 2048", "4KiB"]),
        (image, any, "2GiB", 2, &["1GiB"]),
        (image, any, "large", 2, &["--granule", "512MiB for example"]),
        (image, "nowhere", "4KiB", 2, &["--listen", "nowhere", "host:port"]),
    ];
    for (image, listen, granule, code, expected) in cases {
        let args = ["serve", image, "--listen", listen, "--granule", granule];
        let output = run(&mut pageferry(args));
        expect_code(&output, code);
        assert!(output.stdout.is_empty(), "{args:?}");
        for word in expected {
            assert!(text(&output).contains(word), "{args:?}: {word} is not in {}", text(&output));
        }
        assert_eq!(
            text(&output).matches("listening").count(),
            usize::from(text(&output).contains("listening")),
            "{}",
            text(&output)
        );
        // Said once, not once for every layer.
        assert!(text(&output).matches("os error").count() <= 1, "{}", text(&output));
    }
    assert!(path.exists() && taken_socket.exists(), "nothing of others was removed");
    expect_code(&run(&mut pageferry(["serve"])), 2);
    let help = run(&mut pageferry(["serve", "--help"])).stdout;
    let help = String::from_utf8(help).expect("text");
    assert!(help.contains("    0  stopped by SIGINT or SIGTERM"), "{help}");
    assert!(!help.contains("130"), "{help}");
}

#[test]
fn a_socket_that_nobody_listens_at_any_more_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, bytes) = image(folder.path());
    let socket = folder.path().join("socket");
    let listen = format!("--listen unix:{}", socket.display());
    let killed = Serving::start(&path, &listen);
    killed.running.signal(Signal::KILL);
    drop(killed);
    assert!(socket.exists(), "a killed server cannot remove it");
    let serving = Serving::start(&path, &listen);
    read_all(&mut serving.reader(), &bytes, 500);
    serving.stop(Signal::INT);
    assert!(!socket.exists());
}
