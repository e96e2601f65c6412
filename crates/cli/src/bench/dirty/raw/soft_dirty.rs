//! `/proc/self/clear_refs`, and PAGEMAP_SCAN where the kernel has it, else `/proc/self/pagemap`.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::FileExt as _,
};

use anyhow::Context as _;

use super::{
    super::case::{Contender, Found, Memory},
    sys,
};
use crate::bench::{case::PAGE, reference::sys::Range};

/// Bit 55 of an entry: written since the last clearing.
const SOFT_DIRTY: u64 = 1 << 55;
/// Entries read at once.
const ENTRIES: usize = 1 << 16;

pub(in super::super) struct SoftDirty {
    clear_refs: File,
    /// If the kernel scans.
    scan: Option<sys::Scan>,
    pagemap: File,
    first: u64,
    pages: u64,
    buffer: Vec<u8>,
}

impl SoftDirty {
    pub(in super::super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        let open = |path: &str, write: bool| {
            OpenOptions::new().read(!write).write(write).open(path).context(path.to_owned())
        };
        let mut scan = sys::Scan::new().context("/proc/self/pagemap")?;
        let page = Range { start: memory.mapping.range().start().get(), len: PAGE as u64 };
        let scans = scan.soft_dirty(page, |_| ()).is_ok();
        Ok(Self {
            scan: scans.then_some(scan),
            clear_refs: open("/proc/self/clear_refs", true)?,
            pagemap: open("/proc/self/pagemap", false)?,
            first: memory.mapping.range().start().get() / PAGE as u64,
            pages: memory.pages(),
            buffer: if scans { Vec::new() } else { vec![0; ENTRIES * 8] },
        })
    }
}

impl Contender for SoftDirty {
    fn arm(&mut self) -> anyhow::Result<()> {
        self.clear_refs.write_all(b"4").context("/proc/self/clear_refs")
    }

    /// Nobody writes during it, in this benchmark.
    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()> {
        if let Some(scan) = &mut self.scan {
            let start = self.first * PAGE as u64;
            let range = Range { start, len: self.pages * PAGE as u64 };
            scan.soft_dirty(range, |run| {
                found.mark((run.start - start) / PAGE as u64, run.len / PAGE as u64);
            })
            .context("PAGEMAP_SCAN")?;
            return self.arm();
        }
        let mut page = 0;
        while page < self.pages {
            let count = (self.pages - page).min(ENTRIES as u64);
            let buffer = &mut self.buffer[..count as usize * 8];
            self.pagemap
                .read_exact_at(buffer, (self.first + page) * 8)
                .context("/proc/self/pagemap")?;
            for (entry, page) in buffer.chunks_exact(8).zip(page..) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("eight bytes"));
                if entry & SOFT_DIRTY != 0 {
                    found.mark(page, 1);
                }
            }
            page += count;
        }
        self.arm()
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
