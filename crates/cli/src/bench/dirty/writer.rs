//! Who writes: this process, or a guest that has the memory.

use std::time::Duration;

use super::{
    case::{Memory, Method},
    guest::Guest,
};

pub(super) enum Writer<'m> {
    Own { memory: &'m Memory, written: &'m [u64] },
    Guest(Box<Guest>),
}

impl<'m> Writer<'m> {
    pub(super) fn new(
        method: Method,
        memory: &'m Memory,
        written: &'m [u64],
    ) -> anyhow::Result<Self> {
        if !method.is_kvm() {
            return Ok(Self::Own { memory, written });
        }
        Guest::new(memory, written, method == Method::KvmRing)
            .map(|guest| Self::Guest(guest.into()))
    }

    /// Writes one word of each page, and says how long that took. Nobody tracks; the pages are then in
    /// the same state for everybody.
    pub(super) fn write_untracked(&mut self, value: u64) -> anyhow::Result<Duration> {
        if let Self::Guest(_) = self {
            // So that what a first write of the guest's takes is over.
            self.write(value, &mut not_full)?;
        }
        self.write(value, &mut not_full)
    }

    /// The same, tracked; `full` empties the dirty ring when it is full.
    pub(super) fn write(
        &mut self,
        value: u64,
        full: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        match self {
            Self::Own { memory, written } => memory.write(written, value),
            Self::Guest(guest) => guest.write(value, full),
        }
    }

    /// The guest, whose writes KVM tracks.
    pub(super) fn guest(&self) -> anyhow::Result<&Guest> {
        match self {
            Self::Own { .. } => anyhow::bail!("no guest writes"),
            Self::Guest(guest) => Ok(guest),
        }
    }
}

fn not_full() -> anyhow::Result<()> {
    anyhow::bail!("a dirty ring is full, and nothing is tracked")
}
