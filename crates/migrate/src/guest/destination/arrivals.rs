//! The other side as a source of pages, for as long as one link lasts.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use pageferry_paging::{Completion, PageSink, PageSource, SourceError, Span, Urgency};

use super::link::{Link, Phase};
use crate::{
    MigrateError,
    core::{Frame, WireSpan},
    guest::{status::add, units::UNIT},
    peer::lock,
};

/// What the pager asks. It does not keep the link alive.
pub(super) struct Arrivals {
    pub(super) link: Weak<Link>,
}

fn lost() -> SourceError {
    SourceError::Lost("the connection to the source is gone".into())
}

impl PageSource for Arrivals {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        let link = self.link.upgrade().ok_or_else(lost)?;
        if link.attached.set(sink).is_err() {
            return Err(SourceError::Mismatch("a link is attached once".into()));
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let link = self.link.upgrade().ok_or_else(lost)?;
        let region = sink
            .layout()
            .get(span.region)
            .ok_or_else(|| SourceError::Mismatch(format!("{span}: no such region")))?;
        let shift = region.granule().shift();
        let units = |granules: u64| (granules << shift) / UNIT;
        let span = WireSpan {
            region: span.region.get(),
            first: units(span.granules.first().get()),
            count: u32::try_from(units(span.granules.count()))
                .map_err(|_| SourceError::Mismatch(format!("{span}: too long to ask for")))?,
        };
        let request = Frame::Request { span, prefetch: urgency == Urgency::Prefetch };
        add(&link.shared.counts.requests, 1);
        // Held back while the guest is neither here nor there.
        let mut held = lock(&link.held);
        if let Some(held) = &mut *held {
            held.push(request);
            return Ok(());
        }
        drop(held);
        link.ask(&request).map_err(|error| {
            let same = error.to_source_error();
            link.fail(error);
            same
        })
    }

    fn complete(&self, _: Completion) -> Result<(), SourceError> {
        let link = self.link.upgrade().ok_or_else(lost)?;
        link.complete().map_err(|error| error.to_source_error())
    }

    fn detach(&self) {
        // What ends the link is the migration's thread, which outlives it; here it only is to be
        // quick, unless it has ended as it should.
        if let Some(link) = self.link.upgrade()
            && !link.is_completed()
        {
            link.fail(MigrateError::Stopped);
        }
    }
}

impl Link {
    /// Agrees with the source that all is there, once it is. Waits for that.
    pub(super) fn complete(&self) -> Result<(), MigrateError> {
        // What the guest discarded while it was on its way still comes, though nobody waits.
        self.wait(None, || lock(&self.shared.session).completion().is_some())?;
        self.send_what(|session| {
            session.completion().filter(|_| session.phase() == Phase::Running)
        })?;
        let after = self.shared.options.idle_timeout;
        self.wait(Some(Instant::now() + after), || self.is_completed()).map_err(|error| match error
        {
            MigrateError::TimedOut { .. } => {
                MigrateError::TimedOut { what: "waiting for the source's counts", after }
            }
            error => error,
        })
    }

    /// Waits until `done`, the end of the link, or the time.
    pub(super) fn wait(
        &self,
        until: Option<Instant>,
        done: impl Fn() -> bool,
    ) -> Result<(), MigrateError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let result = self.wait_counted(until, done);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn wait_counted(
        &self,
        until: Option<Instant>,
        done: impl Fn() -> bool,
    ) -> Result<(), MigrateError> {
        let mut guard = lock(&self.changing);
        loop {
            // Looked at with the lock held: whoever changes it notifies with the lock held.
            if done() {
                return Ok(());
            }
            if self.is_over() {
                return Err(MigrateError::Closed);
            }
            let left = match until {
                // A page that came between two looks is seen soon even so.
                None => Duration::from_secs(1),
                Some(until) => until.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                let after = Duration::ZERO;
                return Err(MigrateError::TimedOut { what: "waiting", after });
            }
            guard = match self.changed.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poison) => poison.into_inner().0,
            };
        }
    }
}
