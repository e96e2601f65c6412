//! The boot memory as a part of the machine's state: the processor reads page tables and
//! descriptors in it by itself, so that it has to be there before the first vCPU runs, and the
//! payload's progress is in it. Nothing of it is sent as memory.
//!
//! Its encoding: each page that is not zero, in ascending order, as its number, 32 bits, and its
//! bytes. The tables of the order Zipf are not among them: they never change, and whoever makes the
//! machine makes the same.

use vm_memory::Bytes;

use super::{Boot, PAGE};
use crate::state::StateError;
use pageferry_memory::GuestAddress;

/// The name of the device that this is to a machine's state.
pub(crate) const NAME: &str = "boot-memory";

const ENTRY: usize = 4 + PAGE as usize;

impl Boot {
    /// Pages before the tables.
    fn saved_pages(&self) -> u64 {
        self.extent.tables / PAGE
    }

    /// What is in it. No vCPU is in the guest.
    pub(crate) fn save(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut page = [0; PAGE as usize];
        for number in 0..self.saved_pages() {
            let address = GuestAddress::new(number * PAGE).into();
            self.memory.read_slice(&mut page, address).expect("inside the boot memory");
            if page.iter().any(|byte| *byte != 0) {
                bytes.extend((number as u32).to_le_bytes());
                bytes.extend(page);
            }
        }
        bytes
    }

    /// Puts back what was in it.
    pub(crate) fn restore(&self, bytes: &[u8]) -> Result<(), StateError> {
        let refused = |why: String| Err(StateError::device(NAME, why));
        if !bytes.len().is_multiple_of(ENTRY) {
            return refused(format!("{} bytes are no pages", bytes.len()));
        }
        let pages: Vec<(u64, &[u8])> = bytes
            .chunks_exact(ENTRY)
            .map(|entry| {
                let (number, page) = entry.split_at(4);
                (u32::from_le_bytes(number.try_into().expect("four bytes")).into(), page)
            })
            .collect();
        if !pages.is_sorted_by(|a, b| a.0 < b.0) {
            return refused("its pages are out of order".to_owned());
        }
        if let Some((number, _)) = pages.last().filter(|(number, _)| *number >= self.saved_pages())
        {
            return refused(format!("page {number} of {}", self.saved_pages()));
        }
        let mut pages = pages.into_iter().peekable();
        for number in 0..self.saved_pages() {
            let page = pages.next_if(|(next, _)| *next == number);
            self.write(number * PAGE, page.map_or(&[0; PAGE as usize], |(_, page)| page));
        }
        Ok(())
    }
}
