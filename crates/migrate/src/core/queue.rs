//! The background queue of a source: first come, first served, except for what is expedited.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{ProtocolError, WireSpan};

/// Expedites that came before their request are remembered up to this number.
const EARLY: usize = 64;

#[derive(Copy, Clone, Debug)]
struct Entry<T> {
    count: u32,
    order: u64,
    tag: T,
}

/// Spans asked for and not yet taken, without overlap, each with a tag (when it came).
///
/// Found by place and by age in logarithmic time, because every expedite of a busy guest looks
/// into a queue that may hold tens of thousands of spans.
#[derive(Debug)]
pub struct RequestQueue<T> {
    by_place: BTreeMap<(u16, u64), Entry<T>>,
    by_age: BTreeSet<(u64, u16, u64)>,
    next_order: u64,
    front_order: u64,
    early: VecDeque<WireSpan>,
}

impl<T: Copy> Default for RequestQueue<T> {
    fn default() -> Self {
        Self {
            by_place: BTreeMap::new(),
            by_age: BTreeSet::new(),
            next_order: u64::MAX / 2,
            front_order: u64::MAX / 2,
            early: VecDeque::new(),
        }
    }
}

impl<T: Copy> RequestQueue<T> {
    /// Spans in the queue.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_place.len()
    }

    /// Whether nothing is queued.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_place.is_empty()
    }

    fn insert(&mut self, span: WireSpan, order: u64, tag: T) {
        self.by_place.insert((span.region, span.first), Entry { count: span.count, order, tag });
        self.by_age.insert((order, span.region, span.first));
    }

    fn remove(&mut self, region: u16, first: u64) -> Option<(WireSpan, u64, T)> {
        let entry = self.by_place.remove(&(region, first))?;
        self.by_age.remove(&(entry.order, region, first));
        Some((WireSpan { region, first, count: entry.count }, entry.order, entry.tag))
    }

    /// The first queued span, by place, that overlaps `span`. `span` is within a region.
    fn overlapping(&self, span: WireSpan) -> Option<(u16, u64)> {
        let end = span.first + u64::from(span.count);
        let before = self
            .by_place
            .range((span.region, 0)..=(span.region, span.first))
            .next_back()
            .filter(|((_, first), entry)| first + u64::from(entry.count) > span.first);
        before
            .or_else(|| self.by_place.range((span.region, span.first)..(span.region, end)).next())
            .map(|(place, _)| *place)
    }

    /// Queues `span`, which must lie within its region: last, or first if it was expedited before
    /// it came.
    ///
    /// # Errors
    /// [`ProtocolError::DuplicateRequest`] if a part of it is queued.
    pub fn push(&mut self, span: WireSpan, tag: T) -> Result<(), ProtocolError> {
        if self.overlapping(span).is_some() {
            return Err(ProtocolError::DuplicateRequest(span));
        }
        let urgent = self.early.iter().position(|early| {
            early.region == span.region
                && early.first < span.first + u64::from(span.count)
                && span.first < early.first + u64::from(early.count)
        });
        let order = if let Some(index) = urgent {
            self.early.remove(index);
            self.front_order -= 1;
            self.front_order
        } else {
            self.next_order += 1;
            self.next_order
        };
        self.insert(span, order, tag);
        Ok(())
    }

    /// The tag of the span that is next.
    #[must_use]
    pub fn front(&self) -> Option<T> {
        let (_, region, first) = self.by_age.first()?;
        self.by_place.get(&(*region, *first)).map(|entry| entry.tag)
    }

    /// Takes granules from the beginning of the span that is next: at most `limit(region)` of
    /// them, at least one.
    pub fn pop(&mut self, limit: impl FnOnce(u16) -> u32) -> Option<(WireSpan, T)> {
        let (_, region, first) = *self.by_age.first()?;
        let (span, order, tag) = self.remove(region, first)?;
        let n = limit(region).clamp(1, span.count);
        if n < span.count {
            let rest = WireSpan { region, first: first + u64::from(n), count: span.count - n };
            self.insert(rest, order, tag);
        }
        Some((WireSpan { count: n, ..span }, tag))
    }

    /// Takes out of the queue whatever of `span` is in it, by ascending place. Nothing found: the
    /// request may still be on its way, and will go to the front when it comes.
    pub fn take(&mut self, span: WireSpan, out: &mut Vec<(WireSpan, T)>) {
        let (start, end) = (span.first, span.first + u64::from(span.count));
        let before = out.len();
        while let Some((region, first)) = self.overlapping(span) {
            let Some((found, order, tag)) = self.remove(region, first) else { break };
            let found_end = found.first + u64::from(found.count);
            let (from, to) = (found.first.max(start), found_end.min(end));
            // All differences are at most `found.count`.
            if found.first < from {
                self.insert(WireSpan { count: (from - found.first) as u32, ..found }, order, tag);
            }
            if to < found_end {
                self.insert(
                    WireSpan { first: to, count: (found_end - to) as u32, ..found },
                    order,
                    tag,
                );
            }
            out.push((WireSpan { region, first: from, count: (to - from) as u32 }, tag));
        }
        if out.len() == before {
            if self.early.len() == EARLY {
                self.early.pop_front();
            }
            self.early.push_back(span);
        }
    }
}
