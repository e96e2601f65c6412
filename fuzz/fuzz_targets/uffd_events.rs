//! What a userfaultfd says: every message decodes to what it holds, or is refused with a reason
//! that is true.
#![no_main]

use pageferry_uffd::{DecodeError, FaultKind, HostRange, MESSAGE_SIZE, RawEvent, decode_message};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for message in data.as_chunks::<MESSAGE_SIZE>().0 {
        check(message);
    }
});

/// `struct uffd_msg`, read a second way: the event's number, and the three words of its union.
fn check(message: &[u8; MESSAGE_SIZE]) {
    let words = message[8..].as_chunks::<8>().0;
    let [first, second, third] = [0, 1, 2].map(|n| u64::from_ne_bytes(words[n]));
    let low = |word: u64| u32::from_ne_bytes([0, 1, 2, 3].map(|n| word.to_ne_bytes()[n]));
    let same = |range: HostRange| (range.start().get(), range.end().get()) == (first, second);
    let ends = |start: u64| start.checked_add(third).is_some();
    let right = match decode_message(message) {
        Ok(RawEvent::Fault(fault)) => {
            let kind = match fault.kind {
                FaultKind::Missing => 0,
                FaultKind::WriteProtect => 2,
                FaultKind::Minor => 4,
            };
            message[0] == 0x12
                && first == kind + u64::from(fault.write)
                && fault.address.get() == second
                && fault.thread.unwrap_or(0) == low(third)
        }
        Ok(RawEvent::Fork { uffd }) => message[0] == 0x13 && i64::from(uffd) == low(first).into(),
        Ok(RawEvent::Remap { from, to, len }) => {
            message[0] == 0x14
                && (from.get(), to.get(), len) == (first, second, third)
                && ends(first)
                && ends(second)
        }
        Ok(RawEvent::Remove(range)) => message[0] == 0x15 && same(range),
        Ok(RawEvent::Unmap(range)) => message[0] == 0x16 && same(range),
        Err(DecodeError::UnknownEvent { number }) => {
            number == message[0] && !(0x12..=0x16).contains(&number)
        }
        Err(DecodeError::FaultFlags { address, flags }) => {
            message[0] == 0x12
                && address.get() == second
                && flags == first
                && (flags > 7 || flags & 6 == 6)
        }
        Err(DecodeError::BadDescriptor { fd }) => {
            message[0] == 0x13 && fd == low(first) && fd >> 31 == 1
        }
        Err(DecodeError::BadRange { .. }) => match message[0] {
            0x14 => !(ends(first) && ends(second)),
            0x15 | 0x16 => second < first,
            _ => false,
        },
        other => panic!("{other:?} is new here"),
    };
    assert!(right, "{message:x?} decoded as {:?}", decode_message(message));
}
