//! The rest of the memory, while the guest runs at the destination.

use std::sync::{Arc, Mutex};

use super::{
    link::Link,
    sender::{How, Out, PIECE, Sender},
};
use crate::{MigrateError, guest::units::Units, peer::lock};

/// Where the next piece is taken: behind the last fault, in memory's order.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    at: Mutex<At>,
}

#[derive(Copy, Clone, Debug, Default)]
struct At {
    region: usize,
    unit: u64,
    /// The fault that has been followed.
    fault: u64,
}

impl Cursor {
    /// Takes the next piece out of what is to be sent; `None` if that is nothing.
    fn next(&self, link: &Link) -> Option<Units> {
        let shared = &link.shared;
        let to_send = shared.to_send();
        let grains = shared.grains();
        let mut at = lock(&self.at);
        let fault = shared.last_fault();
        if at.fault != fault {
            let (region, unit) = ((fault >> 48) as usize, fault & ((1 << 48) - 1));
            *at = At { region, unit, fault };
        }
        let regions = grains.len();
        // Once around, and the beginning of the first region again.
        for step in 0..=regions {
            if to_send.total() == 0 {
                return None;
            }
            let region = (at.region + step) % regions;
            let len = shared.memory.units(region);
            let grain = grains[region];
            let most = PIECE.max(grain) / grain * grain;
            let mut first = if step == 0 { at.unit / grain * grain } else { 0 };
            while first < len {
                let count = most.min(len - first);
                if let Some(run) = to_send.claim(region, Units { region, first, count }.run()) {
                    let run = Units::new(region, run);
                    (at.region, at.unit) = (region, run.end());
                    return Some(run);
                }
                first += count;
            }
        }
        None
    }
}

/// Starts to send what is missing on every connection that carries pages.
pub(super) fn start(link: &Arc<Link>) -> Result<(), MigrateError> {
    let cursor = Arc::new(Cursor::default());
    let outs: Vec<Out> = if link.pages.is_empty() {
        vec![Out::Control]
    } else {
        link.pages.iter().map(|lane| Out::Lane(Arc::clone(lane))).collect()
    };
    for out in outs {
        if let Out::Lane(lane) = &out {
            lane.wire.stream().shorten_queue();
        }
        let (this, cursor) = (Arc::clone(link), Arc::clone(&cursor));
        link.spawn("pf-pages", move || {
            let mut sender = Sender::for_pages(&this, out, None);
            sender.only_whole(&this.shared.grains());
            while let Some(run) = cursor.next(&this) {
                sender.send(run, How::Last, Some(&this.shared.background))?;
                sender.flush(Some(&this.shared.background))?;
            }
            Ok(())
        })
        .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
    }
    Ok(())
}
