//! The decoder, and what it refuses.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::state::parts::Length;

fn bytes_of(length: Length, fill: u8) -> Vec<u8> {
    let len = match length {
        Length::Exactly(len) => len,
        Length::Between(least, _) => least,
        Length::Entries(bytes, _) => 3 * bytes,
    };
    vec![fill; len]
}

/// A state that nobody has saved, with everything or as little as there can be.
fn state(vcpus: u16, all: bool, devices: Vec<DeviceBlob>) -> MachineState {
    let optional = [VcpuPart::Xcrs, VcpuPart::Lapic];
    let others = [VcpuPart::Sregs, VcpuPart::Fpu];
    let vcpus = (0..vcpus)
        .map(|number| {
            let parts = VcpuPart::ALL
                .into_iter()
                .filter(|part| !others.contains(part) && (all || !optional.contains(part)))
                .map(|part| (part, bytes_of(part.length(), number as u8)))
                .collect();
            VcpuState { parts }
        })
        .collect();
    let parts = PlatformPart::ALL
        .into_iter()
        .filter(|part| all || *part == PlatformPart::Clock)
        .map(|part| (part, vec![7; part.bytes()]))
        .collect();
    MachineState { vcpus, platform: PlatformState { parts }, devices }
}

fn device(name: &str) -> DeviceBlob {
    DeviceBlob { name: name.to_owned(), version: 3, bytes: vec![1, 2, 3] }
}

/// With a digest that is right.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = (bytes.len() - HEADER) as u64;
    bytes[16..24].copy_from_slice(&body.to_le_bytes());
    let right = digest(&bytes);
    bytes[DIGESTED..HEADER].copy_from_slice(&right);
    bytes
}

/// Where each section begins.
fn sections(bytes: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = HEADER;
    while at < bytes.len() {
        starts.push(at);
        at += SECTION + half(bytes, at + 28) as usize;
    }
    starts
}

#[test]
fn a_state_is_the_same_afterwards() {
    for (vcpus, all) in [(0, false), (1, false), (1, true), (64, true)] {
        let state = state(vcpus, all, vec![device("z"), device("serial.0123456789abc")]);
        let bytes = state.encode();
        let again = MachineState::decode(&bytes).unwrap();
        assert_eq!(again, state);
        assert_eq!(again.encode(), bytes);
        assert_eq!(again.device("z"), Some(&device("z")));
    }
}

#[test]
fn whatever_is_cut_or_changed_is_refused() {
    let bytes = state(1, true, vec![device("disk")]).encode();
    for len in 0..bytes.len() {
        assert!(MachineState::decode(&bytes[..len]).is_err(), "{len}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            // Each bit of the first bytes, and one of each that follows.
            if at < 2 * HEADER || bit == at % 8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(MachineState::decode(&changed).is_err(), "bit {bit} at {at}");
            }
        }
    }
    let longer = [&bytes[..], &[0]].concat();
    let (found, expected) = ((longer.len() - HEADER) as u64, (bytes.len() - HEADER) as u64);
    assert_eq!(MachineState::decode(&longer), Err(FormatError::Length { found, expected }));
}

#[test]
fn every_refusal_has_its_name() {
    let good = state(2, true, vec![device("disk"), device("net")]).encode();
    let starts = sections(&good);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let bytes = sealed(bytes);
        MachineState::decode(&bytes).unwrap_err()
    };
    assert_eq!(MachineState::decode(b"PFVMSTAX"), Err(FormatError::Magic));
    assert_eq!(changed(&|bytes| bytes[8] = 2), FormatError::Version { found: 2, known: 1 });
    assert_eq!(changed(&|bytes| bytes[30] = 1), FormatError::Reserved { at: 30 });
    let (found, expected) = (starts.len() as u64, starts.len() as u64 + 1);
    assert_eq!(changed(&|bytes| bytes[12] += 1), FormatError::Length { found, expected });
    let first = starts[0];
    for name in [&b"cpuie"[..], b"", b"cp id", b"\xff", b"cpuid\0x"] {
        let error = changed(&|bytes| {
            bytes[first..first + NAME].fill(0);
            bytes[first..first + name.len()].copy_from_slice(name);
        });
        assert!(matches!(error, FormatError::Name { at, .. } if at == first), "{error}");
    }
    let error = changed(&|bytes| bytes[first + 26] = 2);
    let name = "cpuid".to_owned();
    assert_eq!(error, FormatError::SectionVersion { name, found: 2, known: 1 });
    let error = changed(&|bytes| bytes[first + 24] = 1);
    assert_eq!(error, FormatError::Order { name: "cpuid".to_owned(), at: first });
    // A second one like the last, and the first two the other way round.
    let last = *starts.last().unwrap();
    let error = changed(&|bytes| bytes.extend_from_within(last..));
    assert_eq!(error, FormatError::Order { name: "net".to_owned(), at: good.len() });
    let error = changed(&|bytes| bytes[first..starts[2]].rotate_left(starts[1] - first));
    assert_eq!(
        error,
        FormatError::Order { name: "cpuid".to_owned(), at: first + starts[2] - starts[1] }
    );
    let error = changed(&|bytes| {
        bytes.drain(starts[1] - 1..starts[1]);
        bytes[first + 28] -= 1;
    });
    assert_eq!(error, FormatError::SectionLength { name: "cpuid".to_owned(), bytes: 119 });
    let error = changed(&|bytes| bytes[last + 28..last + 32].fill(0xff));
    assert_eq!(error, FormatError::Cut { at: last });
    let without = |number: usize| {
        let end = starts.get(number + 1).copied().unwrap_or(good.len());
        changed(&|bytes| {
            bytes.drain(starts[number]..end);
            bytes[12] -= 1;
        })
    };
    assert_eq!(without(0), FormatError::Missing { vcpu: Some(0), name: "cpuid" });
    let ioapic = starts.len() - 5;
    assert_eq!(without(ioapic), FormatError::Missing { vcpu: None, name: "ioapic" });
    assert_eq!(without(ioapic + 2), FormatError::Missing { vcpu: None, name: "clock" });
}

#[test]
fn a_state_of_too_many_bytes_is_not_looked_at() {
    let mut bytes = state(0, false, Vec::new()).encode();
    bytes.resize(MAX_BYTES + 1, 0);
    let (bytes_found, most) = (bytes.len() as u64, MAX_BYTES as u64);
    let refused = Err(FormatError::TooLong { bytes: bytes_found, most });
    assert_eq!(MachineState::decode(&bytes), refused);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..2000)) {
        let _ = MachineState::decode(&bytes);
        let mut begun = vec![0; HEADER];
        begun[..8].copy_from_slice(MAGIC);
        begun[8] = 1;
        begun.extend(bytes);
        let begun = sealed(begun);
        prop_assert!(MachineState::decode(&begun).is_err(), "no clock can be in there");
    }

    /// Whatever is accepted is encoded as it came: nothing is overlooked.
    #[test]
    fn what_is_changed_and_sealed_is_refused_or_kept(
        vcpus in 0_u16..4,
        all in any::<bool>(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = state(vcpus, all, vec![device("disk")]).encode();
        // In the heads of sections, where it matters.
        let heads: Vec<usize> =
            sections(&bytes).into_iter().flat_map(|start| start..start + SECTION).collect();
        for (index, value) in changes {
            let at = *index.get(&heads);
            bytes[at] = value;
        }
        let bytes = sealed(bytes);
        if let Ok(state) = MachineState::decode(&bytes) {
            prop_assert_eq!(state.encode(), bytes);
        }
    }
}
