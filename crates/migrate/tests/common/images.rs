//! What the tests of images share: a sink that records, a receiver on a thread, a bad link.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use pageferry_migrate::{
    Endpoint, ImageDescription, ImageInProgress, ImageReceiver, ImageSender, ImageSink,
    ImageStreamError, MigrateError, ReceiveEvent, ReceivedImages, ReceiverOptions, SenderOptions,
    SinkFailure, Stop,
    core::{Frame, ImageBegin, ImageCounts, ImageId, ImageSenderSession, SessionId, Terms},
};

use super::{PAGE, Raw};

pub const FIRST: ImageId = ImageId([1; 16]);
pub const SECOND: ImageId = ImageId([2; 16]);
pub const THIRD: ImageId = ImageId([3; 16]);

/// An image without description.
pub fn plain(id: ImageId, parent: Option<ImageId>) -> ImageDescription {
    ImageDescription { id, parent, page_size: PAGE, metadata: Vec::new(), mappings: Vec::new() }
}

/// What an image says of a run of pages.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    Data(Vec<u8>),
    Zero(u64),
    Poisoned(u64),
    Gone(u64),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Data(bytes) => write!(f, "Data({} bytes, {:?}…)", bytes.len(), &bytes[..4]),
            Self::Zero(count) => write!(f, "Zero({count})"),
            Self::Poisoned(count) => write!(f, "Poisoned({count})"),
            Self::Gone(count) => write!(f, "Gone({count})"),
        }
    }
}

pub type Run = (u64, Content);

/// Appends a run, as part of the last one where it continues that.
pub fn append(runs: &mut Vec<Run>, address: u64, content: Content) {
    let end = runs.last().map(|(start, content)| {
        start
            + match content {
                Content::Data(bytes) => bytes.len() as u64,
                Content::Zero(n) | Content::Poisoned(n) | Content::Gone(n) => n * PAGE,
            }
    });
    if end == Some(address) {
        match (&mut runs.last_mut().unwrap().1, &content) {
            (Content::Data(before), Content::Data(more)) => return before.extend(more),
            (Content::Zero(before), Content::Zero(more))
            | (Content::Poisoned(before), Content::Poisoned(more))
            | (Content::Gone(before), Content::Gone(more)) => return *before += more,
            _ => {}
        }
    }
    runs.push((address, content));
}

/// An image as a sink got it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    pub description: ImageDescription,
    pub runs: Vec<Run>,
    pub counts: ImageCounts,
}

#[derive(Default, Debug)]
pub struct Record {
    /// Those that are finished.
    pub images: Vec<Image>,
    /// Those that are not: which, and why where the sink was told.
    pub dropped: Vec<(ImageId, Option<String>)>,
}

/// Where a sink is to fail.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Begin,
    Pages,
    Zero,
    Finish,
    /// It says that it has stored other pages than came.
    Miscount,
}

type Hook = Box<dyn FnMut(Step) + Send>;

/// A sink that keeps everything in memory.
#[derive(Default)]
pub struct Recorder {
    pub record: Arc<Mutex<Record>>,
    /// From the second image on.
    pub fail: Option<Step>,
    /// Called before a step is taken.
    pub hook: Option<Hook>,
}

impl Recorder {
    fn step(&mut self, step: Step) -> Result<(), SinkFailure> {
        if let Some(hook) = &mut self.hook {
            hook(step);
        }
        let second = !self.record.lock().unwrap().images.is_empty();
        if second && self.fail == Some(step) {
            // The kernel's own "No space left on device".
            std::fs::File::options().write(true).open("/dev/full")?.write_all(&[0])?;
        }
        Ok(())
    }
}

impl ImageSink for Recorder {
    fn begin(
        &mut self,
        image: &ImageDescription,
    ) -> Result<Box<dyn ImageInProgress + '_>, SinkFailure> {
        self.step(Step::Begin)?;
        let image =
            Image { description: image.clone(), runs: Vec::new(), counts: ImageCounts::default() };
        Ok(Box::new(Recording { recorder: self, image: Some(image), why: None }))
    }
}

struct Recording<'a> {
    recorder: &'a mut Recorder,
    image: Option<Image>,
    why: Option<String>,
}

impl Recording<'_> {
    fn image(&mut self) -> &mut Image {
        self.image.as_mut().unwrap()
    }
}

impl ImageInProgress for Recording<'_> {
    fn pages(&mut self, address: u64, bytes: &[u8]) -> Result<(), SinkFailure> {
        self.recorder.step(Step::Pages)?;
        assert!(!bytes.is_empty() && (bytes.len() as u64).is_multiple_of(PAGE));
        self.image().counts.data += bytes.len() as u64 / PAGE;
        append(&mut self.image().runs, address, Content::Data(bytes.to_vec()));
        Ok(())
    }

    fn zero(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.recorder.step(Step::Zero)?;
        self.image().counts.zero += count;
        append(&mut self.image().runs, address, Content::Zero(count));
        Ok(())
    }

    fn poisoned(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.image().counts.poisoned += count;
        append(&mut self.image().runs, address, Content::Poisoned(count));
        Ok(())
    }

    fn gone(&mut self, address: u64, count: u64) -> Result<(), SinkFailure> {
        self.image().counts.gone += count;
        append(&mut self.image().runs, address, Content::Gone(count));
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<ImageCounts, SinkFailure> {
        self.recorder.step(Step::Finish)?;
        let mut counts = self.image().counts;
        if self.recorder.fail == Some(Step::Miscount)
            && !self.recorder.record.lock().unwrap().images.is_empty()
        {
            counts.data += 1;
        }
        let image = self.image.take().unwrap();
        self.recorder.record.lock().unwrap().images.push(image);
        Ok(counts)
    }

    fn abort(mut self: Box<Self>, why: &str) {
        self.why = Some(why.to_owned());
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Some(image) = self.image.take() {
            let dropped = (image.description.id, self.why.take());
            self.recorder.record.lock().unwrap().dropped.push(dropped);
        }
    }
}

pub type Outcome = Result<ReceivedImages, ImageStreamError>;

#[derive(Default)]
pub struct Seen {
    /// Events, in short.
    pub events: Vec<String>,
    pub outcomes: Vec<Outcome>,
    pub turned_away: Vec<String>,
}

/// A receiver that serves on a thread of its own, and stops when this is dropped.
pub struct Served {
    pub endpoint: Endpoint,
    pub record: Arc<Mutex<Record>>,
    pub stop: Stop,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    thread: Option<JoinHandle<Result<(), MigrateError>>>,
}

pub fn serve(endpoint: &Endpoint, options: ReceiverOptions, mut sink: Recorder) -> Served {
    let receiver = ImageReceiver::listen(endpoint, options).unwrap();
    let endpoint = receiver.local_endpoint().clone();
    let record = Arc::clone(&sink.record);
    let stop = Stop::new().unwrap();
    let seen = Arc::<(Mutex<Seen>, Condvar)>::default();
    let thread = {
        let (stop, seen) = (stop.clone(), Arc::clone(&seen));
        thread::spawn(move || receiver.serve(&mut sink, &mut |event| note(&seen, &event), &stop))
    };
    Served { endpoint, record, stop, seen, thread: Some(thread) }
}

fn note(seen: &(Mutex<Seen>, Condvar), event: &ReceiveEvent<'_>) {
    let mut inner = seen.0.lock().unwrap();
    match event {
        ReceiveEvent::Connected { .. } => inner.events.push("connected".into()),
        ReceiveEvent::TurnedAway { why, .. } => inner.turned_away.push(why.to_string()),
        ReceiveEvent::Begun { image } => inner.events.push(format!("begun {}", image.id.0[0])),
        ReceiveEvent::Progress { .. } => {}
        ReceiveEvent::Stored { image, .. } => inner.events.push(format!("stored {}", image.0[0])),
        ReceiveEvent::Dropped { image, .. } => {
            inner.events.push(format!("dropped {}", image.0[0]));
        }
        ReceiveEvent::Ended { outcome } => inner.outcomes.push((*outcome).clone()),
        other => panic!("{other:?} is new here"),
    }
    seen.1.notify_all();
}

impl Served {
    /// What was seen, once `enough` of it was.
    pub fn wait(
        &self,
        what: &str,
        enough: impl Fn(&Seen) -> bool,
    ) -> std::sync::MutexGuard<'_, Seen> {
        let until = Instant::now() + Duration::from_secs(20);
        let mut seen = self.seen.0.lock().unwrap();
        while !enough(&seen) {
            let left = until.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("{what} did not come: {:?}", seen.events));
            seen = self.seen.1.wait_timeout(seen, left).unwrap().0;
        }
        seen
    }

    /// How the `n`-th sender ended, counted from 0.
    pub fn outcome(&self, n: usize) -> Outcome {
        let mut outcomes = &self.wait("an outcome", |seen| seen.outcomes.len() > n).outcomes[..];
        outcomes = &outcomes[n..];
        outcomes[0].clone()
    }

    pub fn images(&self) -> Vec<Image> {
        self.record.lock().unwrap().images.clone()
    }

    /// An honest sender is still served, and stores what `id` names.
    pub fn still_serves(&self, id: ImageId) {
        let mut sender = ImageSender::connect(&self.endpoint, SenderOptions::default()).unwrap();
        sender.begin(&plain(id, None)).unwrap();
        sender.pages(7 * PAGE, &page(7)).unwrap();
        sender.finish().unwrap();
        sender.close().unwrap();
        assert_eq!(self.images().last().unwrap().description.id, id);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        let served = self.thread.take().unwrap().join();
        if !thread::panicking() {
            served.unwrap().unwrap();
        }
    }
}

/// A page whose contents tell which it is.
pub fn page(n: u64) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|word| (n << 32 | word).to_le_bytes()).collect()
}

/// Pages `first..first + count`.
pub fn pages(first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(page).collect()
}

/// Short limits, so that what is to time out does so soon.
pub fn impatient_sender() -> SenderOptions {
    let mut options = SenderOptions::default();
    options.connect_timeout = Duration::from_millis(400);
    options.keepalive = Duration::from_millis(60);
    options.idle_timeout = Duration::from_millis(400);
    options.complete_timeout = Duration::from_millis(800);
    options
}

pub fn impatient_receiver() -> ReceiverOptions {
    let mut options = ReceiverOptions::default();
    options.handshake_timeout = Duration::from_millis(300);
    options.busy_timeout = Duration::from_millis(100);
    options.keepalive = Duration::from_millis(60);
    options.idle_timeout = Duration::from_millis(600);
    options.write_timeout = Duration::from_millis(400);
    options
}

/// A raw connection to a receiver, with a state machine at hand that knows what would be right.
pub struct RawSender {
    pub raw: Raw,
    pub session: ImageSenderSession,
}

impl RawSender {
    /// Connects and shakes hands.
    pub fn connect(endpoint: &Endpoint) -> Self {
        let mut raw = Raw::connect(endpoint);
        let mut session = ImageSenderSession::new(Terms::default(), SessionId([9; 16]));
        raw.send_frame(&Frame::Hello(session.offer()));
        session.receive(&raw.receive().expect("a hello")).unwrap();
        Self { raw, session }
    }

    /// Sends a frame that is right.
    pub fn say(&mut self, frame: &Frame) {
        self.session.send(frame).unwrap();
        self.raw.send_frame(frame);
        if let Frame::Data(data) = frame {
            let payload = pages(data.span.first, data.span.count.into());
            self.session.payload(&payload);
            self.raw.send(&payload);
        }
    }

    pub fn begin(&mut self, id: ImageId) {
        let (page_size, metadata_len, mappings_len) = (PAGE, 0, 0);
        let begin = ImageBegin { id, parent: None, page_size, metadata_len, mappings_len };
        self.say(&Frame::ImageBegin(begin));
    }

    pub fn end(&mut self) {
        let end = Frame::ImageEnd(self.session.end().unwrap());
        self.say(&end);
    }

    /// A whole image of a page, and its acknowledgement.
    pub fn image(&mut self, id: ImageId) {
        self.begin(id);
        self.say(&data(3, 1));
        self.end();
        self.hear();
    }

    /// Takes a frame that is to be right.
    pub fn hear(&mut self) -> Frame {
        let frame = self.raw.receive_real().expect("a frame");
        self.session.receive(&frame).unwrap();
        frame
    }
}

pub fn data(first: u64, count: u32) -> Frame {
    let span = super::wire(0, first, count);
    let length = count * PAGE as u32;
    Frame::Data(pageferry_migrate::core::DataHeader { span, length, fragment: None })
}

/// A link to `target` that passes bytes on in pieces whose lengths `split` chooses, and waits
/// `delay` before each.
pub fn bad_link(
    target: &Endpoint,
    split: impl Fn(usize) -> usize + Clone + Send + 'static,
    delay: Duration,
) -> Endpoint {
    let Endpoint::Tcp(target) = target.clone() else { panic!("TCP only") };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap().into();
    thread::spawn(move || {
        let near = listener.accept().unwrap().0;
        let far = TcpStream::connect(target).unwrap();
        for (mut from, mut to) in
            [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)]
        {
            let split = split.clone();
            thread::spawn(move || {
                to.set_nodelay(true).unwrap();
                let mut buffer = vec![0; 64 << 10];
                for n in 0.. {
                    let most = split(n).min(buffer.len());
                    match from.read(&mut buffer[..most]) {
                        Ok(n) if n > 0 => {
                            thread::sleep(delay);
                            if to.write_all(&buffer[..n]).is_err() {
                                break;
                            }
                        }
                        _ => break,
                    }
                }
                // The other side may have ended it already.
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    });
    endpoint
}
