//! The engine's end of a source: what it is handed when it is attached, and what it is lent with
//! each request.

use std::sync::{Arc, Weak, atomic::Ordering::*};

use pageferry_memory::Layout;

use crate::{
    Fill, PageSink, SinkError, SourceError, Span,
    core::{AddressSpaceChanging, Core, WaitForReader},
};

/// The sink handed to a source of one generation: what an older one still says is not heard. A
/// source that keeps it for longer than the pager lives does not keep the userfaultfd open.
pub(crate) struct AttachedSink {
    core: Weak<Core>,
    layout: Layout,
    generation: u64,
}

impl AttachedSink {
    pub(crate) fn new(core: &Arc<Core>, generation: u64) -> Self {
        Self { core: Arc::downgrade(core), layout: core.layout.clone(), generation }
    }

    fn with(
        &self,
        call: impl FnOnce(&dyn PageSink) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let core = self.core.upgrade().ok_or(SinkError::Stopped)?;
        let changing = &WaitForReader(&core);
        call(&LentSink { core: &core, generation: self.generation, changing })
    }
}

impl PageSink for AttachedSink {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn page(&self, span: Span, bytes: &[u8]) -> Result<(), SinkError> {
        self.with(|sink| sink.page(span, bytes))
    }

    fn fill(&self, span: Span, fill: &mut Fill<'_>) -> Result<(), SinkError> {
        self.with(|sink| sink.fill(span, fill))
    }

    fn zero(&self, span: Span) -> Result<(), SinkError> {
        self.with(|sink| sink.zero(span))
    }

    fn poison(&self, span: Span) -> Result<(), SinkError> {
        self.with(|sink| sink.poison(span))
    }

    fn push(&self, span: Span, bytes: &[u8]) -> Result<u64, SinkError> {
        let mut taken = 0;
        self.with(|sink| sink.push(span, bytes).map(|granules| taken = granules))?;
        Ok(taken)
    }

    fn lost(&self, why: SourceError) {
        if let Some(core) = self.core.upgrade() {
            core.source_lost(self.generation, &why);
        }
    }
}

/// The sink lent to a request for answers given before it returns.
pub(crate) struct LentSink<'a> {
    pub(crate) core: &'a Core,
    pub(crate) generation: u64,
    pub(crate) changing: &'a dyn AddressSpaceChanging,
}

impl PageSink for LentSink<'_> {
    fn layout(&self) -> &Layout {
        &self.core.layout
    }

    fn page(&self, span: Span, bytes: &[u8]) -> Result<(), SinkError> {
        self.core.page_with(span, bytes, self.changing)
    }

    fn fill(&self, span: Span, fill: &mut Fill<'_>) -> Result<(), SinkError> {
        self.core.fill_with(span, fill, self.changing)
    }

    fn zero(&self, span: Span) -> Result<(), SinkError> {
        self.core.zero_with(span, self.changing)
    }

    fn poison(&self, span: Span) -> Result<(), SinkError> {
        let target = self.core.target(span)?;
        self.core.poisoned_by_source.fetch_add(span.granules.count(), Relaxed);
        self.core.poison_now(target, span.granules, self.changing)
    }

    fn push(&self, span: Span, bytes: &[u8]) -> Result<u64, SinkError> {
        self.core.push_with(span, bytes, self.changing)
    }

    fn lost(&self, why: SourceError) {
        self.core.source_lost(self.generation, &why);
    }
}
