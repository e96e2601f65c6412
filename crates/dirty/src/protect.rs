//! Who registers memory with a userfaultfd, and write-protects it.

use std::{fmt, sync::Arc};

use pageferry_uffd::{
    HostRange, Mapped, Outcome, RegisterError, RegisterMode, Registration, Userfaultfd, Wake,
};

use crate::{
    DirtyError, Tracked,
    target::{Detail, Watched, mapped},
};

/// What became of a range that was to be protected.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Protection {
    /// All of it is.
    Done,
    /// Not all of it is registered any more.
    Gone,
}

/// Registers, protects and releases: what is different between the own memory, that of another
/// process, and memory that a pager has registered.
pub(crate) trait Protector: Send + fmt::Debug {
    /// Registers a range for write protection. Nothing is protected yet.
    fn register(&mut self, tracked: Tracked) -> Result<(), DirtyError>;

    /// Write-protects a range, the pages that are not there included. Wakes nobody.
    fn protect(&self, range: HostRange) -> Result<Protection, DirtyError>;

    /// Ends the registration of a range that was registered, with the protection of its pages, as
    /// far as the range is still there. Whoever waits for a page goes on.
    fn release(&mut self, range: HostRange, watched: &Watched) -> Result<(), DirtyError>;

    /// What is known not to be there any more, without asking the kernel.
    fn gone(&self, ranges: &[Tracked]) -> Vec<HostRange> {
        let _ = ranges;
        Vec::new()
    }
}

/// Memory of this process.
pub(crate) struct OwnMemory {
    uffd: Arc<Userfaultfd>,
    memory: Vec<Arc<dyn Mapped>>,
    registrations: Vec<Registration<Arc<dyn Mapped>>>,
}

impl OwnMemory {
    pub(crate) fn new<M: Mapped + 'static>(
        uffd: Arc<Userfaultfd>,
        memory: impl IntoIterator<Item = M>,
    ) -> Self {
        let memory = memory.into_iter().map(|memory| Arc::new(memory) as Arc<dyn Mapped>);
        Self { uffd, memory: memory.collect(), registrations: Vec::new() }
    }
}

impl Protector for OwnMemory {
    fn register(&mut self, Tracked { range, .. }: Tracked) -> Result<(), DirtyError> {
        let owner = self.memory.iter().find(|memory| memory.range().contains_range(range));
        let Some(owner) = owner else { return Err(DirtyError::NotOwned { range }) };
        match self.uffd.register(Arc::clone(owner), range, RegisterMode::WP) {
            Ok(registration) => self.registrations.push(registration),
            Err(RegisterError::Kernel(source)) => {
                return Err(DirtyError::Register { range, source });
            }
            Err(_) => return Err(DirtyError::NotOwned { range }),
        }
        Ok(())
    }

    fn protect(&self, range: HostRange) -> Result<Protection, DirtyError> {
        // A descriptor of this process never finds it gone. To ask for the id is a call of the kernel.
        protect(&self.uffd, range, std::process::id)
    }

    fn release(&mut self, range: HostRange, _: &Watched) -> Result<(), DirtyError> {
        let (mut result, mut kept) = (Ok(()), Vec::new());
        for registration in self.registrations.drain(..) {
            if !range.contains_range(registration.range()) {
                kept.push(registration);
                continue;
            }
            let range = registration.range();
            if let Err((_, source)) = registration.unregister() {
                result = Err(DirtyError::Release { range, source });
            }
        }
        self.registrations = kept;
        result
    }
}

impl fmt::Debug for OwnMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnMemory").field("registrations", &self.registrations).finish()
    }
}

/// Memory of another process, by a userfaultfd that it has opened.
#[derive(Debug)]
pub(crate) struct OtherProcess {
    uffd: Arc<Userfaultfd>,
    pid: u32,
}

impl OtherProcess {
    /// # Safety
    ///
    /// `uffd` serves another process than this one. What is registered there is memory of that
    /// process, so no Rust value of this one.
    pub(crate) unsafe fn new(uffd: Arc<Userfaultfd>, pid: u32) -> Self {
        Self { uffd, pid }
    }
}

impl Protector for OtherProcess {
    fn register(&mut self, Tracked { range, .. }: Tracked) -> Result<(), DirtyError> {
        // SAFETY: by the promise made to `new`, no memory of this process.
        unsafe { self.uffd.register_raw(range, RegisterMode::WP) }
            .map(drop)
            .map_err(|source| DirtyError::Register { range, source })
    }

    fn protect(&self, range: HostRange) -> Result<Protection, DirtyError> {
        protect(&self.uffd, range, || self.pid)
    }

    fn release(&mut self, range: HostRange, watched: &Watched) -> Result<(), DirtyError> {
        // Mapping by mapping, since the kernel refuses a range that begins where nothing is mapped.
        // Those that are not registered are no error to it.
        let mut result = Ok(());
        for (part, _) in mapped(range, &watched.mappings(Detail::Place)?) {
            if let Err(source) = self.uffd.unregister_raw(part) {
                // Unless the process ended or the mapping went just now.
                let vmas = watched.mappings(Detail::Place)?;
                if mapped(part, &vmas).next().is_some() {
                    result = Err(DirtyError::Release { range: part, source });
                }
            }
        }
        result
    }
}

fn protect(
    uffd: &Userfaultfd,
    range: HostRange,
    pid: impl Fn() -> u32,
) -> Result<Protection, DirtyError> {
    loop {
        match uffd.write_protect(range, true, Wake::No) {
            Ok(Outcome::Installed { .. }) => return Ok(Protection::Done),
            // The address space is just changing: only with events, whose reader ends that.
            Ok(Outcome::Retry { .. }) => std::thread::yield_now(),
            Ok(Outcome::RangeGone { .. }) => return Ok(Protection::Gone),
            Ok(Outcome::ProcessGone { .. }) => return Err(DirtyError::ProcessGone { pid: pid() }),
            Ok(Outcome::AlreadyPresent { .. } | Outcome::Poisoned { .. }) => {
                unreachable!("not an answer to write protection")
            }
            Err(source) => return Err(DirtyError::Protect { range, source }),
        }
    }
}
