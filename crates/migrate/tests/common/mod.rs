//! What the socket tests share: a recording sink, memory to serve, and peers that follow a script.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

pub mod images;

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

use pageferry_memory::{
    Backing, GranuleIndex, GranuleRange, GuestAddress, ImageOffset, Layout, PageSize, Region,
    RegionConfig, RegionId,
};
use pageferry_migrate::{
    Endpoint, PeerOptions, PeerSource,
    core::{Channel, Decoder, Encoder, Frame, Hello, Item, RegionInfo, Role, Terms, WireSpan},
};
use pageferry_paging::{Fill, PageSink, PageSource, SinkError, SourceError, Span, Urgency};

pub const PAGE: u64 = 4096;

/// A layout of these (granules, granule bytes); bases apart, image offsets one after the other.
pub fn layout(regions: &[(u64, u64)]) -> Arc<Layout> {
    let mut image_offset = 0;
    let regions = regions
        .iter()
        .enumerate()
        .map(|(n, (granules, granule))| {
            let mut config = RegionConfig::new(granules * granule, Backing::Anonymous);
            config.guest_base = GuestAddress::new((n as u64) << 40);
            config.granule = PageSize::try_new(*granule);
            config.image_offset = ImageOffset::new(image_offset);
            image_offset += granules * granule;
            Arc::new(Region::new(&config).expect("anonymous memory"))
        })
        .collect();
    Arc::new(Layout::new(regions).expect("regions apart"))
}

/// Contents that differ in every granule; every fifth is zero.
pub fn pattern(region: usize, granule: u64, size: u64) -> Vec<u8> {
    if granule % 5 == 4 {
        return vec![0; size as usize];
    }
    let seed = granule.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ region as u64;
    (0..size / 8)
        .flat_map(|n| (seed.wrapping_add(n * 0x0101_0101_0101) | 1).to_le_bytes())
        .collect()
}

/// Fills a layout with the pattern.
pub fn fill(layout: &Layout) {
    for (id, region) in layout.iter() {
        let size = region.granule().bytes();
        for granule in 0..region.granules() {
            let bytes = pattern(usize::from(id.get()), granule, size);
            region.guest_view().write_at(granule * size, &bytes).expect("within the region");
        }
    }
}

pub fn span(region: u16, first: u64, count: u64) -> Span {
    Span {
        region: RegionId::new(region),
        granules: GranuleRange::new(GranuleIndex::new(first), count),
    }
}

pub fn wire(region: u16, first: u64, count: u32) -> WireSpan {
    WireSpan { region, first, count }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Data,
    Zero,
    Poison,
}

#[derive(Default)]
pub struct Recorded {
    /// Bytes by region.
    pub memory: Vec<Vec<u8>>,
    /// All answers a granule got, by region and granule.
    pub answers: Vec<Vec<Vec<Answer>>>,
    pub answered: u64,
    pub lost: Vec<String>,
}

/// Collects what a source pushes into it.
pub struct RecordingSink {
    layout: Arc<Layout>,
    pub recorded: Mutex<Recorded>,
    changed: Condvar,
    /// Granules in one piece given to a fill's closure.
    pub piece: u64,
    /// Refuses to install this granule of region 0 without reading its bytes.
    pub refuse: Option<u64>,
    /// Is detached from within `lost`, as no engine should.
    pub detach_on_loss: OnceLock<Arc<PeerSource>>,
}

impl RecordingSink {
    pub fn new(layout: &Arc<Layout>) -> Self {
        let recorded = Recorded {
            memory: layout.iter().map(|(_, r)| vec![0xaa; r.len() as usize]).collect(),
            answers: layout.iter().map(|(_, r)| vec![vec![]; r.granules() as usize]).collect(),
            ..Recorded::default()
        };
        Self {
            layout: Arc::clone(layout),
            recorded: Mutex::new(recorded),
            changed: Condvar::new(),
            piece: 3,
            refuse: None,
            detach_on_loss: OnceLock::new(),
        }
    }

    pub fn arc(layout: &Arc<Layout>) -> Arc<Self> {
        Arc::new(Self::new(layout))
    }

    fn answer(&self, span: Span, answer: Answer) {
        let mut recorded = self.recorded.lock().unwrap();
        for granule in span.granules.iter() {
            recorded.answers[usize::from(span.region.get())][granule.get() as usize].push(answer);
        }
        recorded.answered += span.granules.count();
        self.changed.notify_all();
    }

    fn bytes(&self, span: Span) -> std::ops::Range<usize> {
        let size = self.layout.get(span.region).expect("checked").granule().bytes();
        let first = span.granules.first().get() * size;
        first as usize..(first + span.granules.count() * size) as usize
    }

    /// Waits until `done`; panics after ten seconds.
    pub fn wait(&self, what: &str, done: impl Fn(&Recorded) -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        let mut recorded = self.recorded.lock().unwrap();
        while !done(&recorded) {
            let left = until
                .checked_duration_since(Instant::now())
                .unwrap_or_else(|| panic!("timed out: {what}; lost: {:?}", recorded.lost));
            recorded = self.changed.wait_timeout(recorded, left).unwrap().0;
        }
    }

    pub fn wait_answered(&self, count: u64) {
        self.wait("answers", |recorded| recorded.answered >= count || !recorded.lost.is_empty());
        let recorded = self.recorded.lock().unwrap();
        assert_eq!((recorded.answered, &recorded.lost[..]), (count, &[][..]));
    }

    pub fn wait_lost(&self) -> String {
        self.wait("loss", |recorded| !recorded.lost.is_empty());
        self.recorded.lock().unwrap().lost[0].clone()
    }

    /// Every granule was answered exactly once, and holds the pattern.
    pub fn verify(&self) {
        let recorded = self.recorded.lock().unwrap();
        for (id, region) in self.layout.iter() {
            let index = usize::from(id.get());
            let size = region.granule().bytes();
            for granule in 0..region.granules() {
                let at = (granule * size) as usize;
                let want = pattern(index, granule, size);
                assert_eq!(recorded.answers[index][granule as usize].len(), 1, "{id:?} {granule}");
                assert!(
                    recorded.memory[index][at..at + size as usize] == want[..],
                    "contents of {id:?} {granule}"
                );
            }
        }
    }
}

impl PageSink for RecordingSink {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn page(&self, _span: Span, _bytes: &[u8]) -> Result<(), SinkError> {
        panic!("payloads are received in place")
    }

    fn fill(&self, span: Span, fill: &mut Fill<'_>) -> Result<(), SinkError> {
        if let Some(refuse) = self.refuse
            && span.region.get() == 0
            && span.granules.contains(GranuleIndex::new(refuse))
        {
            return Err(SinkError::Install { span, why: "on purpose".into() });
        }
        let size = self.layout.get(span.region).expect("checked").granule().bytes();
        let range = self.bytes(span);
        let mut bytes = vec![0; range.len()];
        for piece in bytes.chunks_mut((self.piece * size) as usize) {
            fill(piece)?;
        }
        self.recorded.lock().unwrap().memory[usize::from(span.region.get())][range]
            .copy_from_slice(&bytes);
        self.answer(span, Answer::Data);
        Ok(())
    }

    fn zero(&self, span: Span) -> Result<(), SinkError> {
        let range = self.bytes(span);
        self.recorded.lock().unwrap().memory[usize::from(span.region.get())][range].fill(0);
        self.answer(span, Answer::Zero);
        Ok(())
    }

    fn poison(&self, span: Span) -> Result<(), SinkError> {
        self.answer(span, Answer::Poison);
        Ok(())
    }

    fn push(&self, _span: Span, _bytes: &[u8]) -> Result<u64, SinkError> {
        panic!("version 1 pushes nothing")
    }

    fn lost(&self, why: SourceError) {
        if let Some(source) = self.detach_on_loss.get() {
            source.detach();
        }
        self.recorded.lock().unwrap().lost.push(why.to_string());
        self.changed.notify_all();
    }
}

/// Short limits, so that what is to time out does so soon.
pub fn impatient() -> PeerOptions {
    let mut options = PeerOptions::default();
    options.connect_timeout = Duration::from_millis(400);
    options.write_timeout = Duration::from_millis(400);
    options.keepalive = Duration::from_millis(60);
    options.idle_timeout = Duration::from_millis(300);
    options.complete_timeout = Duration::from_millis(800);
    options
}

pub trait Duplex: Read + Write + Send {
    fn limit(&self, limit: Duration);
    fn end(&self);
}

impl Duplex for TcpStream {
    fn limit(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).unwrap();
    }

    fn end(&self) {
        // The other side may have ended it already.
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Duplex for UnixStream {
    fn limit(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).unwrap();
    }

    fn end(&self) {
        // The other side may have ended it already.
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// One end of a raw connection, which sends and receives whatever the test wants.
pub struct Raw {
    stream: Box<dyn Duplex>,
    decoder: Decoder,
    buffered: Vec<u8>,
}

impl Raw {
    pub fn new(stream: Box<dyn Duplex>) -> Self {
        stream.limit(Duration::from_secs(5));
        Self { stream, decoder: Decoder::new(4 << 20), buffered: Vec::new() }
    }

    pub fn connect(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Tcp(address) => Self::new(Box::new(TcpStream::connect(address).unwrap())),
            Endpoint::Unix(path) => Self::new(Box::new(UnixStream::connect(path).unwrap())),
            other => panic!("{other}"),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        // The other side may have had enough already; what it answers is what counts.
        let _ = self.stream.write_all(bytes);
    }

    pub fn send_frame(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        self.send(&bytes);
    }

    /// The next frame (payloads are dropped), or `None` when the connection has ended.
    pub fn receive(&mut self) -> Option<Frame> {
        loop {
            let (taken, frame) = match self.decoder.feed(&self.buffered).unwrap() {
                (taken, Some(Item::Frame(frame))) => (taken, Some(frame)),
                (taken, Some(Item::Payload(_))) => {
                    self.buffered.drain(..taken);
                    continue;
                }
                (taken, None) => (taken, None),
            };
            self.buffered.drain(..taken);
            if frame.is_some() {
                return frame;
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(n) => self.buffered.extend(&bytes[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    panic!("neither a frame nor an end within five seconds")
                }
                Err(_) => return None,
            }
        }
    }

    /// The next frame that is no keep-alive.
    pub fn receive_real(&mut self) -> Option<Frame> {
        loop {
            match self.receive() {
                Some(Frame::Ping { .. } | Frame::Pong { .. }) => {}
                other => return other,
            }
        }
    }

    /// Sends no more, and reads away what comes until the other side closes: closing with unread
    /// bytes would reset the connection, and what was sent could be lost.
    pub fn finish(&mut self) {
        self.stream.end();
        let mut bin = [0; 4096];
        while self.stream.read(&mut bin).is_ok_and(|n| n > 0) {}
    }

    /// Sends no more.
    pub fn end(&mut self) {
        self.stream.end();
    }

    /// Reads until the connection ends; returns the refusal, if one came.
    pub fn refusal(&mut self) -> Option<pageferry_migrate::core::Refusal> {
        let mut refusal = None;
        while let Some(frame) = self.receive() {
            if let Frame::Error(error) = frame {
                refusal = Some(error);
            }
        }
        // So that the other side need not linger.
        self.end();
        refusal
    }

    /// As a source: takes the hello and answers it properly.
    pub fn welcome(&mut self, regions: &[RegionInfo]) -> Hello {
        let Some(Frame::Hello(offer)) = self.receive() else { panic!("no hello") };
        self.send_frame(&Frame::Hello(Terms::default().answer(&offer).unwrap()));
        if offer.channel == Channel::Demand {
            self.send_frame(&Frame::Regions(regions.to_vec()));
        }
        offer
    }

    /// As a client: says hello properly.
    pub fn greet(&mut self, role: Role, channel: Channel, id: [u8; 16]) {
        let id = pageferry_migrate::core::SessionId(id);
        self.send_frame(&Frame::Hello(Terms::default().offer(role, channel, id)));
        let Some(Frame::Hello(_)) = self.receive() else { panic!("no hello") };
        if channel == Channel::Demand {
            let Some(Frame::Regions(_)) = self.receive() else { panic!("no regions") };
        }
    }
}

/// Both transports: names, and endpoints to listen at within `folder`.
pub fn transports(folder: &Path) -> [Endpoint; 2] {
    ["127.0.0.1:0".parse().unwrap(), Endpoint::Unix(folder.join("socket"))]
}

/// A source that follows `script` on a thread of its own; joined by the returned guard.
pub fn fake_source(
    endpoint: &Endpoint,
    script: impl FnOnce(&mut dyn FnMut() -> Raw) + Send + 'static,
) -> (Endpoint, Joined) {
    let (endpoint, mut accept): (_, Box<dyn FnMut() -> Raw + Send>) = match endpoint {
        Endpoint::Tcp(address) => {
            let listener = TcpListener::bind(address).unwrap();
            let local = listener.local_addr().unwrap().into();
            (local, Box::new(move || Raw::new(Box::new(listener.accept().unwrap().0))))
        }
        Endpoint::Unix(path) => {
            let _ = std::fs::remove_file(path);
            let listener = UnixListener::bind(path).unwrap();
            let accept = move || Raw::new(Box::new(listener.accept().unwrap().0));
            (endpoint.clone(), Box::new(accept))
        }
        other => panic!("{other}"),
    };
    (endpoint, Joined(Some(thread::spawn(move || script(&mut *accept)))))
}

pub struct Joined(Option<thread::JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(Err(panic)) = self.0.take().map(thread::JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

pub fn regions(layout: &Layout) -> Vec<RegionInfo> {
    layout
        .iter()
        .map(|(id, region)| RegionInfo {
            id: id.get(),
            flags: 0,
            guest_base: region.guest_base().get(),
            length: region.len(),
            granule: region.granule().bytes(),
            page_size: PAGE,
        })
        .collect()
}

pub fn request(source: &PeerSource, sink: &RecordingSink, span: Span, urgency: Urgency) {
    source.request(span, urgency, sink).unwrap();
}
