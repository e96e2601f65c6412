//! What is mapped, and what of it was there before.

use pageferry_process::{
    Detail, Details, Mapping, MappingFlags, MappingName, Process, ProcessError,
};
use pageferry_uffd::HostRange;

use super::{look::Before, runs::Runs};

/// A mapping that is tracked.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) mapping: Mapping,
    /// The pages that were the process's own, if it is private.
    pub(super) own: Runs,
}

/// The mappings of a process, with details.
pub(super) fn mappings(process: &Process) -> Result<Vec<Mapping>, ProcessError> {
    Ok(apart(process.mappings(Detail::Full)?))
}

/// The mappings of a process, with details, of which those that `last` has are not read again.
pub(super) fn mappings_after(
    process: &Process,
    last: &[Mapping],
) -> Result<Vec<Mapping>, ProcessError> {
    let mut found = process.mappings(Detail::Names)?;
    for mapping in &mut found {
        mapping.details = remembered(mapping, last);
    }
    if found.iter().any(|mapping| mapping.details.is_none() && !is_kernel(mapping)) {
        return mappings(process);
    }
    Ok(apart(found))
}

fn is_kernel(mapping: &Mapping) -> bool {
    matches!(mapping.name, MappingName::Kernel(_))
}

/// The details of a mapping that it is a part of, or has grown from. The heap grows by a mapping
/// beside it.
fn remembered(mapping: &Mapping, last: &[Mapping]) -> Option<Details> {
    let end = mapping.range.end();
    let heap = |other: &Mapping| {
        mapping.name == MappingName::Heap
            && other.name == MappingName::Heap
            && other.range.end() == mapping.range.start()
    };
    let first = last.partition_point(|other| other.range.end() < mapping.range.start());
    last[first..]
        .iter()
        .take_while(|other| other.range.start() < end)
        .find(|other| mapping.is_part_of_same(other) || heap(other))
        .and_then(|other| other.details)
}

/// Mappings that changed while they were read may be there twice.
fn apart(mappings: Vec<Mapping>) -> Vec<Mapping> {
    let mut apart: Vec<Mapping> = Vec::with_capacity(mappings.len());
    for mut mapping in mappings {
        if let Some(last) = apart.last()
            && last.range.end() > mapping.range.start()
        {
            let cut = last.range.end().get() - mapping.range.start().get();
            mapping.range = mapping.range.skip(cut);
            if mapping.inode != 0 {
                mapping.offset = mapping.offset.saturating_add(cut);
            }
        }
        if !mapping.range.is_empty() {
            apart.push(mapping);
        }
    }
    apart
}

/// What is known of a mapping. `known` is in ascending order.
pub(super) fn before(mapping: &Mapping, known: &[Known]) -> Before {
    let range = mapping.range;
    let mut before = Before::default();
    let first = known.partition_point(|known| known.mapping.range.end() <= range.start());
    let overlapping =
        known[first..].iter().take_while(|known| known.mapping.range.start() < range.end());
    let accessible = |mapping: &Mapping| {
        let can = mapping.permissions;
        can.read || can.write || can.execute
    };
    // Of what could not be accessed, pages that are not there have no marks.
    let same = |known: &&Known| {
        is_same(mapping, &known.mapping) && (accessible(&known.mapping) || !accessible(mapping))
    };
    for known in overlapping.filter(same) {
        let part = known.mapping.range.intersection(range).expect("it overlaps");
        before.tracked.push(part);
        for run in known.own.within(part).iter() {
            before.own.push(run);
        }
    }
    before
}

/// Whether two mappings that overlap have the same contents where nothing was written: of the same
/// file at the same place, or anonymous. Names do not count.
fn is_same(one: &Mapping, other: &Mapping) -> bool {
    let base = |mapping: &Mapping| mapping.offset.wrapping_sub(mapping.range.start().get());
    one.shared == other.shared
        && (one.device, one.inode) == (other.device, other.inode)
        && (one.inode == 0 || base(one) == base(other))
}

/// The parts of what was known that are not mapped any more.
pub(super) fn unmapped(known: &[Known], mappings: &[Mapping]) -> Vec<HostRange> {
    let ranges = |mappings: &mut dyn Iterator<Item = &Mapping>| {
        let mut runs = Runs::default();
        mappings.for_each(|mapping| runs.push(mapping.range));
        runs
    };
    let was = ranges(&mut known.iter().map(|known| &known.mapping));
    was.without(&ranges(&mut mappings.iter())).into_vec()
}

/// Hides that it is tracked.
pub(super) fn hide_tracking(mapping: &mut Mapping) {
    if let Some(details) = &mut mapping.details {
        details.flags.remove(MappingFlags::USERFAULTFD_WP);
    }
}

#[cfg(test)]
mod tests {
    use pageferry_memory::PageSize;
    use pageferry_process::Permissions;
    use pageferry_uffd::HostAddress;

    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::from_bounds(HostAddress::new(start), HostAddress::new(end)).unwrap()
    }

    fn mapping(start: u64, end: u64, inode: u64, offset: u64) -> Mapping {
        Mapping {
            range: range(start, end),
            permissions: Permissions { read: true, write: true, execute: false },
            shared: false,
            offset,
            device: (0, 0),
            inode,
            name: MappingName::None,
            details: None,
        }
    }

    fn known(start: u64, end: u64, inode: u64, offset: u64, own: &[(u64, u64)]) -> Known {
        let own = own.iter().map(|&(start, end)| range(start, end)).collect();
        Known { mapping: mapping(start, end, inode, offset), own: Runs::of(own) }
    }

    #[test]
    fn what_was_there_before() {
        let all = [
            known(0x1000, 0x4000, 0, 0, &[(0x1000, 0x2000), (0x3000, 0x4000)]),
            known(0x4000, 0x5000, 0, 0, &[]),
            known(0x6000, 0x9000, 7, 0x1000, &[(0x6000, 0x7000)]),
        ];
        let cases = [
            // Merged, and grown.
            (mapping(0x1000, 0x6000, 0, 0), vec![(0x1000, 0x5000)], 0x2000),
            // Split.
            (mapping(0x3000, 0x4000, 0, 0), vec![(0x3000, 0x4000)], 0x1000),
            (mapping(0x7000, 0x8000, 7, 0x2000), vec![(0x7000, 0x8000)], 0),
            // Another place of the file, another file, none.
            (mapping(0x7000, 0x8000, 7, 0x3000), vec![], 0),
            (mapping(0x6000, 0x8000, 8, 0x1000), vec![], 0),
            (mapping(0x6000, 0x8000, 0, 0), vec![], 0),
            (mapping(0x9000, 0xa000, 0, 0), vec![], 0),
        ];
        for (mapping, tracked, own) in cases {
            let before = before(&mapping, &all);
            let expected: Vec<_> = tracked.iter().map(|&(start, end)| range(start, end)).collect();
            assert_eq!(before.tracked.into_vec(), expected, "{mapping:?}");
            assert_eq!(before.own.bytes(), own, "{mapping:?}");
        }
        let shared = Mapping { shared: true, ..mapping(0x1000, 0x4000, 0, 0) };
        assert!(before(&shared, &all).tracked.is_empty());
        let left = [mapping(0x2000, 0x7000, 0, 0)];
        assert_eq!(unmapped(&all, &left), [range(0x1000, 0x2000), range(0x7000, 0x9000)]);
    }

    #[test]
    fn what_was_read_twice_is_there_once() {
        let found = apart(vec![
            mapping(0x1000, 0x4000, 7, 0),
            mapping(0x2000, 0x3000, 7, 0x1000),
            mapping(0x3000, 0x6000, 7, 0x2000),
            mapping(0x6000, 0x7000, 0, 0),
        ]);
        let places: Vec<_> = found.iter().map(|found| (found.range, found.offset)).collect();
        let expected = [
            (range(0x1000, 0x4000), 0),
            (range(0x4000, 0x6000), 0x3000),
            (range(0x6000, 0x7000), 0),
        ];
        assert_eq!(places, expected);
    }

    #[test]
    fn details_are_remembered() {
        let details = Details {
            page_size: PageSize::SIZE_2M,
            resident: 0,
            anonymous: 0,
            swapped: 0,
            flags: MappingFlags::LOCKED,
        };
        let heap = |start, end| Mapping { name: MappingName::Heap, ..mapping(start, end, 0, 0) };
        let last = [
            Mapping { details: Some(details), ..mapping(0x1000, 0x4000, 0, 0) },
            Mapping { details: Some(details), ..heap(0x4000, 0x5000) },
        ];
        for (mapping, expected) in [
            (mapping(0x2000, 0x3000, 0, 0), true),
            (mapping(0x2000, 0x3000, 7, 0), false),
            (mapping(0x5000, 0x6000, 0, 0), false),
            (heap(0x5000, 0x6000), true),
            (heap(0x6000, 0x7000), false),
        ] {
            assert_eq!(remembered(&mapping, &last).is_some(), expected, "{mapping:?}");
        }
    }
}
