//! Pageferry's engine as a contender, with a source that has every page at hand.

use std::{fmt::Write as _, str::FromStr, sync::Arc};

use anyhow::Context as _;
use pageferry::{
    memory::{
        GuestAddress, HostAddress, HostRange, ImageOffset, Layout, Mapping, PageSize, Region,
    },
    paging::{
        self, Events, InstallMethod, PageSink, PageSource, Pager, Prefetch, SinkError, SourceError,
        Span, Urgency,
    },
};

use super::{
    case::{Case, Contender, Delivery, Kind, Measurement, PAGE},
    guest,
    memory::Memory,
};
use crate::size;

/// How the engine is set up.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Setup {
    /// Every fault is one request for one page: comparable with the references.
    SinglePages,
    /// As an embedder gets it, except that nothing is swept: only what faults bring is counted.
    Defaults,
    /// Single pages but for blocks of this many bytes around each fault.
    Around(u64),
}

impl FromStr for Setup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("around:")) {
            ("single", _) => Ok(Self::SinglePages),
            ("defaults", _) => Ok(Self::Defaults),
            (_, Some(bytes)) => match size::parse(bytes)? {
                0 => Err("a block of nothing: use single".into()),
                bytes if bytes % PAGE as u64 != 0 => {
                    Err(format!("a block of {bytes} bytes is no multiple of {PAGE}"))
                }
                bytes => Ok(Self::Around(bytes)),
            },
            _ => Err(format!("{text:?} is not single, defaults or around:SIZE")),
        }
    }
}

/// The engine.
#[derive(Debug)]
pub(crate) struct Engine {
    setup: Setup,
    name: String,
}

impl Engine {
    pub(crate) fn new(setup: Setup) -> Self {
        let mut name = "pageferry".to_owned();
        match setup {
            Setup::SinglePages => {}
            Setup::Defaults => name.push_str("-defaults"),
            // Writing to a string cannot fail.
            Setup::Around(bytes) => _ = write!(name, "-around-{}k", bytes >> 10),
        }
        Self { setup, name }
    }
}

impl Contender for Engine {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&mut self, case: &Case) -> anyhow::Result<Measurement> {
        let memory = Arc::new(Memory::new(case)?);
        let base = memory.guest();
        let layout = layout(case, &memory)?;
        let workers = u16::try_from(case.workers).context("more workers than can be had")?;
        let delivery = match case.delivery {
            Delivery::Queue => paging::Delivery::Queue,
            Delivery::QueueN => paging::Delivery::QueueN(workers),
            Delivery::ByThread => paging::Delivery::ByThread(workers),
            Delivery::ByCpu => paging::Delivery::ByCpu(workers),
            Delivery::Sharded => paging::Delivery::Sharded(workers),
            Delivery::Signal => paging::Delivery::Signal,
        };
        let install = match case.kind {
            Kind::Missing => InstallMethod::Copy,
            Kind::Minor => InstallMethod::Continue,
        };
        let prefetch = match self.setup {
            Setup::SinglePages => Prefetch::NONE,
            Setup::Defaults => Prefetch { sweep: false, ..Prefetch::default() },
            Setup::Around(bytes) => Prefetch::around(bytes),
        };
        let pager = Pager::builder(layout)
            .delivery(delivery)
            .install(Some(install))
            .prefetch(prefetch)
            // The references follow no events either.
            .events(Events::Ignore)
            .batch(case.batch)
            .start(Arc::new(FixedPage::new()))?;
        // SAFETY: `memory` is mapped until the end of this function, and no reference to its
        // contents is ever made; the pager serves it until it is dropped below.
        let measured = unsafe { guest::run(base, case) };
        drop(pager);
        measured
    }
}

fn layout(case: &Case, memory: &Arc<Memory>) -> anyhow::Result<Layout> {
    let view = |start: *mut u8| {
        let range = HostRange::new(HostAddress::from_ptr(start.cast_const()), memory.len() as u64);
        // SAFETY: the range is one whole mapping of `memory`, which the keepalive holds.
        Arc::new(unsafe { Mapping::from_raw(range, Arc::clone(memory) as _) })
    };
    let alias = (case.kind == Kind::Minor).then(|| memory.alias()).flatten();
    let region = Region::external(
        view(memory.guest()),
        alias.map(view),
        PageSize::SIZE_4K,
        None,
        GuestAddress::new(0),
        ImageOffset::new(0),
    )?;
    Ok(Layout::new(vec![Arc::new(region)])?)
}

/// Answers every request from one buffer, before it returns.
struct FixedPage {
    pages: Box<[u8]>,
}

/// Pages in the buffer: as many as any request is likely to ask for at once.
const PAGES: usize = 64;

impl FixedPage {
    fn new() -> Self {
        Self { pages: guest::page_contents().repeat(PAGES).into_boxed_slice() }
    }
}

impl PageSource for FixedPage {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let mut rest = span.granules;
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.count().min(PAGES as u64));
            let bytes = &self.pages[..part.count() as usize * PAGE];
            match sink.page(Span { granules: part, ..span }, bytes) {
                Ok(()) | Err(SinkError::Stopped) => {}
                Err(error) => return Err(SourceError::Mismatch(error.to_string())),
            }
            rest = after;
        }
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {}
}
