//! Registered memory, tied to the life of its mapping.

use std::{fmt, sync::Arc};

use crate::{HostRange, Ioctls, Mapped, RegisterError, RegisterMode, UffdError, Userfaultfd};

/// A range registered with a userfaultfd, which keeps both the descriptor and the mapping alive.
///
/// Dropping it unregisters the range before the mapping is given up. Unregistering resumes threads
/// that still wait there, with pages of zeros where nothing was installed: poison absent pages
/// first ([`Userfaultfd::poison`]). An error of unregistering can be seen only with
/// [`unregister`](Self::unregister); after it the range stays registered until it is unmapped or
/// the last descriptor closes.
///
/// A mapping that is only borrowed can be given up after its registration, and not before:
///
/// ```no_run
/// # use std::sync::Arc;
/// # use pageferry_uffd::{Mapped, RegisterError, RegisterMode, Userfaultfd};
/// fn serve(uffd: &Arc<Userfaultfd>, mapping: impl Mapped) -> Result<(), RegisterError> {
///     let registration = uffd.register(&mapping, mapping.range(), RegisterMode::MISSING)?;
///     drop(registration);
///     drop(mapping);
///     Ok(())
/// }
/// ```
///
/// ```compile_fail,E0505
/// # use std::sync::Arc;
/// # use pageferry_uffd::{Mapped, RegisterError, RegisterMode, Userfaultfd};
/// fn serve(uffd: &Arc<Userfaultfd>, mapping: impl Mapped) -> Result<(), RegisterError> {
///     let registration = uffd.register(&mapping, mapping.range(), RegisterMode::MISSING)?;
///     drop(mapping);
///     drop(registration);
///     Ok(())
/// }
/// ```
///
/// Nor can a registration be kept for longer than what it borrows:
///
/// ```compile_fail,E0515
/// # use std::sync::Arc;
/// # use pageferry_uffd::{Mapped, RegisterError, RegisterMode, Registration, Userfaultfd};
/// fn serve<'a, M: Mapped>(
///     uffd: &Arc<Userfaultfd>,
///     mapping: M,
/// ) -> Result<Registration<&'a M>, RegisterError> {
///     uffd.register(&mapping, mapping.range(), RegisterMode::MISSING)
/// }
/// ```
pub struct Registration<M: Mapped> {
    uffd: Arc<Userfaultfd>,
    /// `None` only inside the methods that consume the registration: nothing is to be undone then.
    mapping: Option<M>,
    range: HostRange,
    mode: RegisterMode,
    ioctls: Ioctls,
}

impl Userfaultfd {
    /// Registers `range`, part of `mapping`, for faults of `mode`.
    ///
    /// # Errors
    ///
    /// [`RegisterError`]. The mapping is dropped then: pass a reference or an [`Arc`] to keep it.
    pub fn register<M: Mapped>(
        self: &Arc<Self>,
        mapping: M,
        range: HostRange,
        mode: RegisterMode,
    ) -> Result<Registration<M>, RegisterError> {
        if self.is_received() {
            return Err(RegisterError::Foreign { range });
        }
        if !mapping.range().contains_range(range) {
            return Err(RegisterError::OutsideMapping { range, mapping: mapping.range() });
        }
        // SAFETY: the range is mapped in this process, as long as the registration lives, and
        // `Mapped` promises that its contents are nobody's Rust values.
        let ioctls = unsafe { self.register_raw(range, mode) }?;
        Ok(Registration { uffd: Arc::clone(self), mapping: Some(mapping), range, mode, ioctls })
    }
}

impl<M: Mapped> Registration<M> {
    /// The descriptor.
    pub fn uffd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
    }

    /// The mapping.
    pub fn mapping(&self) -> &M {
        self.mapping.as_ref().expect("a registration has its mapping until it is consumed")
    }

    /// The registered addresses.
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// The faults it is registered for.
    pub fn mode(&self) -> RegisterMode {
        self.mode
    }

    /// The operations the kernel offers for this range.
    pub fn ioctls(&self) -> Ioctls {
        self.ioctls
    }

    /// Unregisters the range and gives the mapping back.
    ///
    /// # Errors
    ///
    /// The mapping, and the kernel's reason; the range is still registered then.
    pub fn unregister(mut self) -> Result<M, (M, UffdError)> {
        let mapping = self.take();
        match self.uffd.unregister_raw(self.range) {
            Ok(()) => Ok(mapping),
            Err(error) => Err((mapping, error)),
        }
    }

    /// Gives the mapping back with the range still registered, as for a descriptor that another
    /// process goes on serving.
    pub fn into_inner_registered(mut self) -> M {
        self.take()
    }

    fn take(&mut self) -> M {
        self.mapping.take().expect("a registration has its mapping until it is consumed")
    }
}

impl<M: Mapped> Drop for Registration<M> {
    fn drop(&mut self) {
        if self.mapping.is_some() {
            // Nobody is left to tell; the documentation of the type says what an error leaves.
            let _ = self.uffd.unregister_raw(self.range);
        }
    }
}

impl<M: Mapped> fmt::Debug for Registration<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("range", &self.range)
            .field("mode", &self.mode)
            .field("ioctls", &self.ioctls)
            .finish_non_exhaustive()
    }
}
