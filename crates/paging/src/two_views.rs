//! Memory that vCPUs see in a view of their own, beside the guest view: what is mapped in one and
//! has to be mapped in the other.

use std::sync::Arc;

use pageferry_memory::{GranuleIndex, GranuleRange, HostRange, State};
use pageferry_uffd::{CopyMode, Outcome, Userfaultfd, Wake};

use crate::{gate::Inside, install::Target, views::View};

impl Target {
    /// Sends those who wait in the guest view back in.
    pub(crate) fn wake_guest(&self, inside: &Inside<'_>, granules: GranuleRange) {
        let mut rest = granules;
        while !rest.is_empty() {
            let (uffd, shared) = self.shard(rest);
            let Some((host, part)) = inside.place(self.id, rest.split_at(shared).0) else {
                rest = rest.split_at(1).1;
                continue;
            };
            if let Err(error) = uffd.wake(host) {
                tracing::debug!("{error}");
            }
            rest = rest.split_at(part.count()).1;
        }
    }

    /// Maps granules in the guest view that are present, next to one that was just touched there,
    /// as far as that is one call.
    pub(crate) fn map_around(&self, inside: &Inside<'_>, at: GranuleIndex) {
        const AROUND: u64 = 64 << 10;
        let map = self.region.page_map();
        let next = GranuleIndex::new(at.get() + 1);
        let left = map.len().saturating_sub(next.get());
        let most = (AROUND >> self.region.granule().shift()).min(left);
        if !self.lazy || most == 0 {
            return;
        }
        let window = GranuleRange::new(next, most);
        let present = map.next_run(State::Present, next, most);
        let Some(run) = present.and_then(|run| run.intersection(window)) else { return };
        let (uffd, shared) = self.shard(run);
        if run.first() == next
            && let Some((host, _)) = inside.place(self.id, run.split_at(shared).0)
        {
            // Wherever it ends, at a page that is mapped already, say: the rest is mapped when it is
            // touched.
            let _ = uffd.continue_range(host, self.mapping_again());
        }
    }

    /// Maps granules that are in the page cache in the vCPU view, if there is one. Where that does
    /// not succeed a vCPU faults again, and is answered then.
    pub(crate) fn map_for_vcpus(
        &self,
        inside: &Inside<'_>,
        granules: GranuleRange,
        mode: CopyMode,
    ) {
        if self.region.vcpu_view().is_none() {
            return;
        }
        let page = self.region.page_size().bytes();
        let write_protect = mode.write_protect && self.vcpus_tracked;
        let mode = CopyMode { write_protect, ..mode };
        self.each_vcpu_place(inside, granules, |uffd, host, _| {
            let mut done = 0;
            while done < host.len() {
                match uffd.continue_range(host.skip(done), mode) {
                    Ok(Outcome::Installed { bytes }) => done += bytes,
                    Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                    other => {
                        let skipped = match other {
                            Ok(Outcome::AlreadyPresent { done: more }) => more + page,
                            // The rest is not tried: what stands in the way concerns all of it.
                            _ => host.len() - done,
                        };
                        let left = HostRange::new(host.skip(done).start(), skipped);
                        if self.wake == Wake::Yes
                            && let Err(error) = uffd.wake(left)
                        {
                            tracing::debug!("{error}");
                        }
                        done += skipped;
                    }
                }
            }
        });
    }

    /// Calls `visit` with every stretch of the vCPU view that shows some of `granules`.
    pub(crate) fn each_vcpu_place(
        &self,
        inside: &Inside<'_>,
        granules: GranuleRange,
        mut visit: impl FnMut(&Arc<Userfaultfd>, HostRange, GranuleRange),
    ) {
        let mut rest = granules;
        while self.region.vcpu_view().is_some() && !rest.is_empty() {
            let (uffd, shared) = self.shard(rest);
            let part = rest.split_at(shared).0;
            let Some((host, part)) = inside.place_in(View::Vcpu, self.id, part) else {
                rest = rest.split_at(1).1;
                continue;
            };
            visit(uffd, host, part);
            rest = rest.split_at(part.count()).1;
        }
    }
}
