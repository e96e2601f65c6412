//! What looking at one mapping comes to, whatever the method.

use pageferry_memory::PageSize;
use pageferry_process::Mapping;

use super::{pages::Own, runs::Runs};

/// What is known of a mapping from the look before.
#[derive(Debug, Default)]
pub(super) struct Before {
    /// The parts of it that were tracked already. The rest is new.
    pub(super) tracked: Runs,
    /// The pages there that were the process's own.
    pub(super) own: Runs,
}

/// What a look at a mapping came to.
#[derive(Debug)]
pub(super) enum Sight {
    /// It is tracked from now on.
    Tracked {
        /// What changed in what was tracked before; of the rest, anything.
        changed: Runs,
        /// Of a private mapping: the pages that are the process's own now, in whatever form.
        own: Runs,
    },
    /// It is tracked from now on, and not the mapping that was there before.
    Replaced {
        /// As above.
        own: Runs,
    },
    /// The method cannot track it.
    Untracked,
    /// It changed while it was looked at.
    Unsure,
}

/// What was discarded since the look before. Nothing is told of that: a page that was the process's
/// own then, and is not any more, has other contents now.
///
/// With `marks`, what looks swapped out may be the mark that a userfaultfd leaves behind where a
/// page of a private file mapping, or a huge page, was protected and then discarded. So a page
/// there that is swapped out counts as discarded each time until it is in memory again.
pub(super) fn discarded(mapping: &Mapping, before: &Before, now: &Own, marks: bool) -> Runs {
    let gone = before.own.without(&now.present);
    if marks && mapping.inode != 0 { gone } else { gone.without(&now.swapped) }
}

/// The size of the pages of a mapping, whose details are known.
pub(super) fn page_size(mapping: &Mapping) -> PageSize {
    mapping.details.map_or_else(PageSize::base, |details| details.page_size)
}
