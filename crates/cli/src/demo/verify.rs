//! Comparing every page with the source, byte by byte, once all is done.

use anyhow::Context as _;
use pageferry::{
    memory::Region,
    migrate::{Endpoint, PeerOptions, PeerReader, core::WireSpan},
};

use super::{guest::Increments, pattern::PAGE};
use crate::exit::Failure;

/// What was compared, and what differed.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct Verified {
    pub(super) pages: u64,
    pub(super) wrong: u64,
    /// The first page that differs.
    pub(super) first_wrong: Option<u64>,
}

/// Fetches everything again, over a connection of its own, and compares it with the region:
/// every byte must be the source's, but for the word that the guest counted up in.
pub(super) fn verify(
    region: &Region,
    increments: &Increments,
    endpoint: &Endpoint,
    progress: impl Fn(u64),
) -> anyhow::Result<Verified> {
    let mut reader = PeerReader::connect(endpoint, PeerOptions::default())
        .map_err(|error| Failure::source_lost(format!("verifying: {error}")))?;
    let granule = region.granule().bytes();
    let at_once = ((1 << 20) / granule).max(1);
    let mut theirs = vec![0; (at_once * granule) as usize];
    let mut ours = vec![0; (at_once * granule) as usize];
    let mut verified = Verified::default();
    let mut first = 0;
    while first < region.granules() {
        let count = at_once.min(region.granules() - first);
        let len = (count * granule) as usize;
        let span = WireSpan { region: 0, first, count: u32::try_from(count)? };
        reader
            .read(span, &mut theirs[..len])
            .map_err(|error| Failure::source_lost(format!("verifying {span}: {error}")))?;
        region.guest_view().read_at(first * granule, &mut ours[..len])?;
        let pages = theirs[..len].chunks_exact_mut(PAGE as usize);
        for (page, (theirs, ours)) in
            (first * granule / PAGE..).zip(pages.zip(ours.chunks_exact(PAGE as usize)))
        {
            let counted = theirs.len() - 8;
            let word: [u8; 8] = theirs[counted..].try_into().context("a page ends in a word")?;
            let word = u64::from_le_bytes(word).wrapping_add(increments.of(page));
            theirs[counted..].copy_from_slice(&word.to_le_bytes());
            if theirs != ours {
                verified.wrong += 1;
                verified.first_wrong.get_or_insert(page);
            }
            verified.pages += 1;
        }
        first += count;
        progress(first * granule / PAGE);
    }
    Ok(verified)
}
