//! Where bytes come from ([`PageSource`]) and where they go ([`PageSink`]).
//!
//! A source pushes into a sink. A page that was asked for and a page that was pushed unasked
//! take the same path from the sink on; that is what makes post-copy, lazy restore, prefetch and
//! pre-copy one engine.

use std::{fmt, io, sync::Arc};

use pageferry_memory::{GranuleRange, Layout, RegionId};

/// A contiguous run of granules of one region: the unit of a request and of an answer.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Span {
    /// The region.
    pub region: RegionId,
    /// The granules, never empty in a request or an answer.
    pub granules: GranuleRange,
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "region {} granules {}+{}",
            self.region.get(),
            self.granules.first().get(),
            self.granules.count()
        )
    }
}

/// How badly a span is wanted. Demand overtakes prefetch: separate queue, separate connection.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Urgency {
    /// A guest thread is stopped on it.
    Demand,
    /// Nobody waits for it yet.
    Prefetch,
}

/// Why a source could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The source is gone (connection lost, process dead). The guest stalls until another source
    /// takes over; nothing is poisoned.
    #[error("page source lost: {0}")]
    Lost(String),
    /// The peer broke the protocol. Treated as a loss, and named.
    #[error("page source sent something it must not: {0}")]
    Protocol(String),
    /// Reading failed.
    #[error("page source: {what}: {error}")]
    Io {
        /// What was being done to what.
        what: String,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// The source does not fit the memory it is to fill.
    #[error("page source does not fit: {0}")]
    Mismatch(String),
}

/// Why the sink did not take something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// The span lies outside the memory. Nothing was touched.
    #[error("{0} is outside the memory")]
    OutOfRange(Span),
    /// The bytes do not match the span's size. Nothing was touched.
    #[error("{span}: {got} bytes given where {expected} are needed")]
    WrongLength {
        /// The span answered.
        span: Span,
        /// Bytes the span has.
        expected: u64,
        /// Bytes given.
        got: u64,
    },
    /// The closure that was to fill the memory failed; what it had not filled stays requested.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The kernel refused the install for good; the rest of the span was poisoned.
    #[error("{span}: install failed: {why}")]
    Install {
        /// The span.
        span: Span,
        /// What the kernel said.
        why: String,
    },
    /// The pager has been stopped.
    #[error("the pager has stopped")]
    Stopped,
}

/// What both sides must agree on for "complete": a message with counts, never an end of file.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// Granules that this source's data or zero answers filled.
    pub granules_from_source: u64,
    /// Granules answered as poisoned.
    pub granules_poisoned: u64,
}

/// Where bytes come from: an image file, a peer over the network, zeros.
///
/// # Exactly one answer
/// The engine calls [`request`](Self::request) for a granule only after winning its claim, so at
/// most one request for a granule is outstanding, and a source answers each granule of a request
/// exactly once (data, zero or poison) through the sink, before `request` returns or later from a
/// thread of its own, in any order and in any split. What a peer sends beyond that is for the source to refuse.
pub trait PageSource: Send + Sync {
    /// Called once before any request. The source may keep the sink and call it until
    /// [`detach`](Self::detach) returns. It checks here that it fits `sink.layout()`.
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError>;

    /// Asks for `span`. An error means that none of it will be answered.
    ///
    /// With `sink` the caller lends its own end of the engine for answers given before returning.
    /// Never blocks for longer than the I/O itself takes.
    fn request(&self, span: Span, urgency: Urgency, sink: &dyn PageSink)
    -> Result<(), SourceError>;

    /// A thread now waits for `span`, which was requested as [`Urgency::Prefetch`]. A hint: the
    /// span must still be answered exactly once.
    fn expedite(&self, _span: Span) -> Result<(), SourceError> {
        Ok(())
    }

    /// Whether `request` may be called from a SIGBUS handler: it allocates nothing and takes no
    /// lock that a thread touching guest memory could hold.
    fn signal_safe(&self) -> bool {
        false
    }

    /// Whether `request` answers before it returns (a file), so that more requesters, not more
    /// requests in flight, are what makes it faster.
    fn answers_inline(&self) -> bool {
        false
    }

    /// Everything is present (or poisoned): agree with the other side on the counts.
    fn complete(&self, _counts: Completion) -> Result<(), SourceError> {
        Ok(())
    }

    /// No request will follow. When this returns, the source will not call its sink again, and
    /// its threads and sockets are gone. Safe to call more than once.
    fn detach(&self);
}

/// The closure that [`PageSink::fill`] calls with consecutive pieces of the span's memory.
pub type Fill<'a> = dyn FnMut(&mut [u8]) -> Result<(), SourceError> + 'a;

/// Where answers go. Implemented by the engine.
pub trait PageSink: Send + Sync {
    /// The memory being filled: regions, granule sizes, image offsets.
    fn layout(&self) -> &Layout;

    /// Answers `span` with its bytes: granule size times count.
    fn page(&self, span: Span, bytes: &[u8]) -> Result<(), SinkError>;

    /// Answers `span` by letting `fill` write the bytes where they are needed: straight into the
    /// fill view or a staging page, whichever the install uses. `fill` is called with consecutive
    /// pieces, in order, each a whole number of granules, and must fill each piece completely. Pieces
    /// filled before an error are installed; the rest stays requested.
    fn fill(&self, span: Span, fill: &mut Fill<'_>) -> Result<(), SinkError>;

    /// Answers `span`: all zero.
    fn zero(&self, span: Span) -> Result<(), SinkError>;

    /// Answers `span`: the source has a memory error there, or cannot read it, for good.
    ///
    /// Whoever touches it gets SIGBUS, as for a memory error; a system call fails with EHWPOISON or
    /// EFAULT. A kernel without UFFDIO_POISON (before Linux 6.6) cannot do that: there the granules
    /// are made inaccessible (`PROT_NONE`), and it is SIGSEGV (SEGV_ACCERR), and EFAULT in system
    /// calls and from KVM_RUN (with delivery by signal, SIGBUS for an access that meets it first); [`Counts::closed`](crate::Counts::closed) tells. Should a region come
    /// to more than 8192 such stretches, or the process to its most mappings (`vm.max_map_count`),
    /// all of the region becomes inaccessible, with what is there. The same holds for
    /// whatever else the pager poisons.
    fn poison(&self, span: Span) -> Result<(), SinkError>;

    /// Bytes nobody asked for: installed where the granules are still absent, dropped elsewhere.
    /// Returns how many granules were taken.
    fn push(&self, span: Span, bytes: &[u8]) -> Result<u64, SinkError>;

    /// The source is gone. What it still owed stays requested until another source is attached
    /// or the pager is told to abandon.
    fn lost(&self, why: SourceError);
}
