//! Soft-dirty bits of another process.

use std::fs::File;

use pageferry_process::{Mapping, MappingFlags, Process};
use pageferry_uffd::{ClearRefs, Pagemap, clear_refs};

use super::{
    ProcessTrackError,
    attach::a_pagemap,
    look::{Before, Sight, discarded},
    pages::Looker,
};
use crate::{DirtyError, soft_dirty::claim};

#[derive(Debug)]
pub(super) struct Bits {
    process: Process,
    looker: Looker,
    /// Keeps other trackers of this crate away, in whatever process they are.
    _lock: File,
}

impl Bits {
    /// Claims the bits of a process, which are all cleared at once.
    pub(super) fn new(process: &Process) -> Result<Self, ProcessTrackError> {
        let pid = process.pid();
        let path = format!("/proc/{pid}/clear_refs");
        let failed = |source| {
            let doing = format!("claim its soft-dirty bits by {path}");
            ProcessTrackError::SoftDirty { pid, doing, source }
        };
        let Some(lock) = claim(&path).map_err(failed)? else {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            return Err(DirtyError::AlreadyTracked { pid }.into());
        };
        let bits = Self { process: process.clone(), looker: Looker::new(), _lock: lock };
        bits.clear()?;
        Ok(bits)
    }

    pub(super) fn calls(&self) -> u64 {
        self.looker.calls()
    }

    /// Finds out what was written in a mapping.
    pub(super) fn look(
        &mut self,
        pagemap: &Pagemap,
        mapping: &Mapping,
        before: &Before,
    ) -> Result<Sight, ProcessTrackError> {
        let flags = mapping.details.map_or_else(MappingFlags::empty, |details| details.flags);
        if flags.contains(MappingFlags::HUGETLB) {
            // The kernel keeps no bits for these.
            return Ok(Sight::Untracked);
        }
        let pid = self.process.pid();
        let failed = |source| ProcessTrackError::Pagemap { pid, source };
        if mapping.shared {
            let looked = self.looker.soft_dirty_or_absent(pagemap, mapping.range);
            let changed = looked.map_err(failed)?;
            return Ok(Sight::Tracked { changed, own: Default::default() });
        }
        let own = self.looker.own_by_bits(pagemap, mapping.range).map_err(failed)?;
        let discarded = discarded(mapping, before, &own, false);
        Ok(Sight::Tracked {
            changed: own.written.or(&discarded),
            own: own.present.or(&own.swapped),
        })
    }

    /// Clears the bits of all mappings.
    pub(super) fn clear(&self) -> Result<(), ProcessTrackError> {
        // The bits of a thread that has ended are nobody's, and clearing them does nothing.
        let (_, thread) = a_pagemap(&self.process)?;
        let thread = thread.as_raw_nonzero().get().unsigned_abs();
        clear_refs(thread, ClearRefs::SoftDirty).map_err(|error| ProcessTrackError::SoftDirty {
            pid: self.process.pid(),
            doing: format!("clear its soft-dirty bits by /proc/{thread}/clear_refs"),
            source: error.errno.into(),
        })
    }
}
