//! Where the regions are mapped now, and the gate that keeps installs and the reading of
//! address-space events apart.
//!
//! The kernel lets `madvise` go on to remove pages as soon as its REMOVE event has been *read*.
//! From that moment until the page map says so, an installer that already checked the map could
//! put old data back where the guest has just been promised zeros. So an installer checks the map
//! and issues its install inside [`Gate::install`], and a reader reads and applies events inside
//! [`Gate::read_events`], which excludes all installs. While an event waits unread the kernel
//! answers installs with EAGAIN: the installer leaves the gate, lets a reader through, and checks
//! again.
//!
//! This is the one lock held across an install, a deviation from invariant 8 that exists only
//! where events are watched; without events the gate is open and costs a branch. I/O is never done
//! inside it.

use std::{
    ops::Deref,
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use crate::views::Views;

pub(crate) enum Gate {
    /// No events: the views never change and installs need not be held back.
    Open(Views),
    Watched(RwLock<Views>),
}

/// Inside the gate. Never held across I/O, nor while entering the gate again.
pub(crate) enum Inside<'a> {
    Open(&'a Views),
    Watched(RwLockReadGuard<'a, Views>),
    /// With everybody else kept out.
    Alone(RwLockWriteGuard<'a, Views>),
}

impl Deref for Inside<'_> {
    type Target = Views;

    fn deref(&self) -> &Views {
        match self {
            Self::Open(views) => views,
            Self::Watched(views) => views,
            Self::Alone(views) => views,
        }
    }
}

impl Gate {
    pub(crate) fn new(views: Views, events_watched: bool) -> Self {
        if events_watched { Self::Watched(RwLock::new(views)) } else { Self::Open(views) }
    }

    pub(crate) fn events_watched(&self) -> bool {
        matches!(self, Self::Watched(_))
    }

    /// Shared by all installers, and by whoever looks an address up.
    pub(crate) fn install(&self) -> Inside<'_> {
        match self {
            Self::Open(views) => Inside::Open(views),
            // A panic inside leaves the views whole: they are replaced, not edited in place.
            Self::Watched(lock) => {
                Inside::Watched(lock.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
            }
        }
    }

    /// Like [`install`](Self::install), but alone, where events are watched.
    pub(crate) fn install_alone(&self) -> Inside<'_> {
        self.read_events().map_or_else(|| self.install(), Inside::Alone)
    }

    /// Excludes all installers. `None` where no events are watched: nothing to exclude.
    pub(crate) fn read_events(&self) -> Option<RwLockWriteGuard<'_, Views>> {
        match self {
            Self::Open(_) => None,
            Self::Watched(lock) => {
                Some(lock.write().unwrap_or_else(|poisoned| poisoned.into_inner()))
            }
        }
    }
}
