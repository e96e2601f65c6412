use std::os::fd::{AsRawFd, IntoRawFd};

use proptest::prelude::*;

use super::*;

fn message(event: u8, words: [u64; 3]) -> [u8; MESSAGE_SIZE] {
    let mut message = [0; MESSAGE_SIZE];
    message[0] = event;
    for (index, word) in words.iter().enumerate() {
        message[8 + index * 8..16 + index * 8].copy_from_slice(&word.to_ne_bytes());
    }
    message
}

fn range(start: u64, end: u64) -> HostRange {
    HostRange::from_bounds(HostAddress::new(start), HostAddress::new(end)).unwrap()
}

fn fault(kind: FaultKind, write: bool, thread: Option<u32>) -> RawEvent {
    RawEvent::Fault(Fault { address: HostAddress::new(0x7000), kind, write, thread })
}

#[test]
fn every_event() {
    let remap = RawEvent::Remap {
        from: HostAddress::new(0x1000),
        to: HostAddress::new(0x9000),
        len: 0x2000,
    };
    let cases = [
        (message(0x12, [0, 0x7000, 0]), fault(FaultKind::Missing, false, None)),
        (message(0x12, [1, 0x7000, 0]), fault(FaultKind::Missing, true, None)),
        (message(0x12, [3, 0x7000, 77]), fault(FaultKind::WriteProtect, true, Some(77))),
        (message(0x12, [4, 0x7000, 0]), fault(FaultKind::Minor, false, None)),
        (message(0x12, [5, 0x7000, 0]), fault(FaultKind::Minor, true, None)),
        (message(0x13, [9, 0, 0]), RawEvent::Fork { uffd: 9 }),
        (message(0x14, [0x1000, 0x9000, 0x2000]), remap),
        (message(0x15, [0x1000, 0x3000, 0]), RawEvent::Remove(range(0x1000, 0x3000))),
        (message(0x16, [0x1000, 0x3000, 0]), RawEvent::Unmap(range(0x1000, 0x3000))),
    ];
    for (message, expected) in cases {
        assert_eq!(decode_message(&message), Ok(expected));
    }
}

#[test]
fn every_refusal() {
    let address = HostAddress::new(0x7000);
    let cases = [
        (message(0, [0; 3]), DecodeError::UnknownEvent { number: 0 }),
        (message(0x17, [0; 3]), DecodeError::UnknownEvent { number: 0x17 }),
        (message(0x12, [6, 0x7000, 0]), DecodeError::FaultFlags { address, flags: 6 }),
        (message(0x12, [9, 0x7000, 0]), DecodeError::FaultFlags { address, flags: 9 }),
        (message(0x13, [0xffff_ffff, 0, 0]), DecodeError::BadDescriptor { fd: 0xffff_ffff }),
        (
            message(0x14, [0x1000, u64::MAX, 2]),
            DecodeError::BadRange { event: "remap", start: u64::MAX, end: 1 },
        ),
        (
            message(0x15, [0x3000, 0x1000, 0]),
            DecodeError::BadRange { event: "remove", start: 0x3000, end: 0x1000 },
        ),
        (message(0x16, [1, 0, 0]), DecodeError::BadRange { event: "unmap", start: 1, end: 0 }),
    ];
    for (message, expected) in cases {
        assert_eq!(decode_message(&message), Err(expected));
    }
}

/// Event numbers near the known ones, words near the interesting values.
fn any_message() -> impl Strategy<Value = [u8; MESSAGE_SIZE]> {
    let word = prop_oneof![any::<u64>(), 0_u64..16, u64::MAX - 16..=u64::MAX];
    (prop_oneof![any::<u8>(), 0x11_u8..0x18], [word.clone(), word.clone(), word])
        .prop_map(|(event, words)| message(event, words))
}

proptest! {
    #[test]
    fn what_decodes_is_what_was_sent(message in any_message()) {
        let [first, second, third] = [8, 16, 24].map(|offset| {
            u64::from_ne_bytes(message[offset..offset + 8].try_into().unwrap())
        });
        match decode_message(&message) {
            Ok(RawEvent::Fault(fault)) => {
                prop_assert_eq!(message[0], 0x12);
                let kind = match fault.kind {
                    FaultKind::Missing => 0,
                    FaultKind::WriteProtect => 2,
                    FaultKind::Minor => 4,
                };
                prop_assert_eq!(kind | u64::from(fault.write), first);
                prop_assert_eq!(fault.address.get(), second);
                prop_assert_eq!(&fault.thread.unwrap_or(0).to_ne_bytes(), &message[24..28]);
            }
            Ok(RawEvent::Fork { uffd }) => {
                prop_assert_eq!(message[0], 0x13);
                prop_assert!(uffd >= 0);
                prop_assert_eq!(&uffd.to_ne_bytes(), &message[8..12]);
            }
            Ok(RawEvent::Remap { from, to, len }) => {
                prop_assert_eq!((message[0], from.get(), to.get(), len), (0x14, first, second, third));
                prop_assert!(first.checked_add(len).is_some() && second.checked_add(len).is_some());
            }
            Ok(RawEvent::Remove(range)) => {
                prop_assert_eq!(message[0], 0x15);
                prop_assert_eq!((range.start().get(), range.end().get()), (first, second));
            }
            Ok(RawEvent::Unmap(range)) => {
                prop_assert_eq!(message[0], 0x16);
                prop_assert_eq!((range.start().get(), range.end().get()), (first, second));
            }
            Err(DecodeError::UnknownEvent { number }) => {
                prop_assert_eq!(number, message[0]);
                prop_assert!(!(0x12..=0x16).contains(&number));
            }
            Err(DecodeError::FaultFlags { flags, .. }) => {
                prop_assert!(flags == first && (flags & !7 != 0 || flags & 6 == 6));
            }
            Err(DecodeError::BadRange { event: "remap", .. }) => {
                prop_assert!(
                    first.checked_add(third).is_none() || second.checked_add(third).is_none()
                );
            }
            Err(DecodeError::BadRange { .. }) => prop_assert!(first > second),
            Err(DecodeError::BadDescriptor { fd }) => prop_assert!(fd > i32::MAX as u32),
        }
    }
}

fn put(buffer: &mut EventBuffer, messages: &[[u8; MESSAGE_SIZE]]) {
    let room = buffer.room();
    for (index, message) in messages.iter().enumerate() {
        room[index * MESSAGE_SIZE..][..MESSAGE_SIZE].copy_from_slice(message);
    }
    buffer.filled(messages.len());
}

/// A pipe: the reading end, and the number of the writing end, owned by nobody. Reading tells
/// whether the other end has been closed, without looking at numbers that may be reused.
fn fork_message() -> (OwnedFd, [u8; MESSAGE_SIZE]) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&reader, true).unwrap();
    let number = writer.into_raw_fd();
    (reader, message(0x13, [u64::from(number.cast_unsigned()), 0, 0]))
}

fn is_closed(reader: &OwnedFd) -> bool {
    match rustix::io::read(reader, &mut [0_u8; 1]) {
        Ok(0) => true,
        Err(rustix::io::Errno::AGAIN) => false,
        other => panic!("reading the pipe: {other:?}"),
    }
}

#[test]
fn fork_descriptors_are_owned_exactly_once() {
    let (first, first_message) = fork_message();
    let (second, second_message) = fork_message();
    let (third, third_message) = fork_message();

    let mut buffer = EventBuffer::new(2);
    put(&mut buffer, &[first_message, second_message]);
    let mut drain = buffer.drain();
    let Some(Ok(Event::Fork { uffd })) = drain.next() else { panic!("not a fork") };
    drop(drain);
    assert!(buffer.is_empty());
    assert!(is_closed(&second), "the event left in the iterator");
    assert!(!is_closed(&first), "the event taken out");
    assert!(uffd.as_raw_fd() >= 0);
    drop(uffd);
    assert!(is_closed(&first));

    put(&mut buffer, &[third_message]);
    assert!(!is_closed(&third));
    drop(buffer);
    assert!(is_closed(&third), "the event left in the buffer");
}

#[test]
fn what_is_not_drained_is_kept() {
    let mut buffer = EventBuffer::new(3);
    let words = |number| message(0x12, [0, number, 0]);
    put(&mut buffer, &[words(1), words(2)]);
    let mut drain = buffer.drain();
    assert_eq!(drain.len(), 2);
    assert!(matches!(drain.next(), Some(Ok(Event::Fault(fault))) if fault.address.get() == 1));
    std::mem::forget(drain);
    assert_eq!(buffer.len(), 1);
    assert_eq!(buffer.room().len(), 2 * MESSAGE_SIZE);
    put(&mut buffer, &[words(3), words(4)]);
    assert!(buffer.room().is_empty());
    let addresses: Vec<_> = buffer
        .drain()
        .map(|event| match event {
            Ok(Event::Fault(fault)) => fault.address.get(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(addresses, [2, 3, 4]);
}
