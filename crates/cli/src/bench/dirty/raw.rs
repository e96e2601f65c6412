//! *raw*: for each method the smallest loop around the kernel's own calls, to compare the trackers
//! with.

#[allow(unsafe_code)]
mod kvm;
mod soft_dirty;
#[allow(unsafe_code)]
mod sys;
mod write_protect;

pub(super) use self::{
    kvm::{Log, Ring},
    soft_dirty::SoftDirty,
    write_protect::{Asynchronous, Blocking},
};
