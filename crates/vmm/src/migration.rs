//! Moving a machine by [`pageferry_migrate`]: the worked example of its two traits.

mod destination;
mod source;

pub use destination::{Arrival, MachineDestination};
pub use source::MachineSource;

use pageferry_migrate::GuestError;

/// The name that the state of these machines has in a migration.
const NAME: &str = "pageferry-vmm";

/// For `map_err`: what was being done has failed.
fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> GuestError {
    move |why| GuestError::failed(what, why)
}
