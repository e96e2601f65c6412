//! Write protection by userfaultfd under a guest that runs: what its vCPUs write is told, and what
//! others write through the same mapping.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::sync::Arc;

use common::{load::*, tracker::*, *};
use pageferry_dirty::{DirtyError, DirtySet, Tracked, Tracker, WpAsync, WpBlocking};
use pageferry_memory::{Advice, HostRange, Mapping, MemoryFile, MemoryFileKind, PageSize};

/// What the guest's memory is of.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Kind {
    Anonymous,
    Thp,
    Memfd,
    Hugetlb,
}

/// Memory of so many pages.
struct Memory {
    mapping: Arc<Mapping>,
    page: PageSize,
    /// Given back after the mapping.
    _huge: Option<HugePages>,
}

impl Memory {
    /// `None`, having said so, when there are too few huge pages.
    fn new(kind: Kind, pages: u64) -> Option<Self> {
        let huge = match kind {
            Kind::Hugetlb => Some(HugePages::reserve(pages)?),
            _ => None,
        };
        let page = if kind == Kind::Hugetlb { PageSize::SIZE_2M } else { PageSize::SIZE_4K };
        let len = pages * page.bytes();
        let file = |kind| MemoryFile::create("written", len, kind).unwrap();
        let mapping = match kind {
            Kind::Anonymous | Kind::Thp => Mapping::anonymous(len).unwrap(),
            Kind::Memfd => Mapping::shared(file(MemoryFileKind::Normal), 0, len, None).unwrap(),
            Kind::Hugetlb => {
                let file = file(MemoryFileKind::Hugetlb(page));
                Mapping::shared(&file, 0, len, Some(page)).unwrap()
            }
        };
        if matches!(kind, Kind::Anonymous | Kind::Thp) {
            let huge = kind == Kind::Thp;
            let advice = if huge { Advice::HugePage } else { Advice::NoHugePage };
            if let Err(error) = mapping.advise(mapping.range(), advice) {
                println!("no transparent huge pages, so none are split: {error}");
            }
        }
        Some(Self { mapping: Arc::new(mapping), page, _huge: huge })
    }

    fn tracked(&self) -> Tracked {
        Tracked { range: self.mapping.range(), page: self.page }
    }

    fn offset(&self, page: u64) -> u64 {
        page << self.page.shift()
    }

    fn pages(&self, first: u64, count: u64) -> HostRange {
        self.mapping.range().skip(self.offset(first)).take(self.offset(count))
    }
}

type Make = fn(Arc<Mapping>) -> Result<Box<dyn Tracker>, DirtyError>;

const METHODS: [Make; 2] = [
    |memory| Ok(Box::new(WpAsync::own([memory])?)),
    |memory| Ok(Box::new(WpBlocking::own([memory])?)),
];

/// Runs a test with each kind of memory and each method.
fn each(pages: impl Fn(Kind) -> u64, test: impl Fn(&str, &Memory, &mut dyn Tracker)) {
    if !kvm() {
        return;
    }
    for kind in [Kind::Anonymous, Kind::Thp, Kind::Memfd, Kind::Hugetlb] {
        for make in METHODS {
            let Some(memory) = Memory::new(kind, pages(kind)) else { break };
            let _watch = watch(120);
            let mut tracker = match make(Arc::clone(&memory.mapping)) {
                Ok(tracker) => tracker,
                Err(error @ DirtyError::Open { .. }) => {
                    println!("skipped: needs {error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            let case = format!("{}, {kind:?}", tracker.method());
            test(&case, &memory, &mut *tracker);
        }
    }
}

/// What is written is told, whoever writes, whether it was there before or not; nothing that is read.
#[test]
fn each_write_is_told() {
    each(
        |kind| if kind == Kind::Hugetlb { 16 } else { 64 },
        |case, memory, tracker| {
            let machine = Machine::new();
            machine.show(0, BASE, &memory.mapping);
            let mut vcpu = Bare(machine.vm.create_vcpu(0).unwrap());
            let mut access = |ring, code: &[u8], page| {
                let registers =
                    Registers { rdi: at(memory.offset(page) + 8), rax: 7, ..Registers::default() };
                vcpu.execute(&machine, ring, code, registers);
            };
            // Pages that a vCPU has mapped for writing, some that it has not seen, and some that are
            // not there.
            for page in 0..4 {
                access(Ring::Three, &MOV_TO, page);
            }
            for page in 4..8 {
                memory.mapping.write_at(memory.offset(page), &[1]).unwrap();
            }
            tracker.arm(&[memory.tracked()]).unwrap();
            let set = DirtySet::new(&[memory.tracked()]).unwrap();
            let mut harvest = || {
                let harvested = tracker.harvest(&set).unwrap();
                assert_eq!((&harvested.whole, &harvested.gone), (&vec![], &vec![]), "{case}");
                set.take()
            };
            assert_eq!(harvest(), [], "{case}: nothing was written");
            for round in 0..3 {
                for page in [0, 3, 7, 11, 15] {
                    access(Ring::Three, &MOV_RAX, page);
                }
                assert_eq!(harvest(), [], "{case}: pages were read, {round}");
                for page in [1, 3, 4, 8] {
                    access(Ring::Three, &MOV_TO, page);
                }
                access(Ring::Zero, &MOV_TO, 10);
                memory.mapping.write_at(memory.offset(12), &[round]).unwrap();
                let told = harvest();
                let expected = [(1, 1), (3, 2), (8, 1), (10, 1), (12, 1)];
                let expected = expected.map(|(first, count)| memory.pages(first, count));
                assert_eq!(told, expected, "{case}, {round}");
                assert_eq!(harvest(), [], "{case}, {round}");
            }
            // Nobody is kept waiting by what was armed.
            tracker.disarm().unwrap();
            access(Ring::Three, &MOV_TO, 1);
            access(Ring::Three, &MOV_TO, 13);
            let mut word = [0; 8];
            memory.mapping.read_at(memory.offset(13) + 8, &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), 7, "{case}");
        },
    );
}

/// The transaction test, with two vCPUs and two threads of the process.
#[test]
fn nothing_is_lost() {
    each(
        |kind| match kind {
            Kind::Hugetlb => 8,
            Kind::Thp => 1024,
            _ => 256,
        },
        |case, memory, tracker| {
            let machine = Machine::new();
            machine.show(0, BASE, &memory.mapping);
            let pages = memory.tracked().pages();
            machine.load(&adding(pages, memory.page.shift()));
            let vcpus = (0..2).map(|number| {
                let mut vcpu = Bare(machine.vm.create_vcpu(number).unwrap());
                let adder: Adder<'_> = Box::new(move |rax| {
                    let registers =
                        Registers { rax, rcx: ADDITIONS, rdi: at(0), ..Registers::default() };
                    enter(&vcpu.0, Ring::Three, CODE, registers);
                    vcpu.finish(&mut || panic!("it has no ring"));
                    vcpu.0.get_regs().unwrap().rax
                });
                adder
            });
            let load = Load {
                case: case.to_owned(),
                ranges: vec![memory.tracked()],
                memory: &memory.mapping,
                marks: None,
                first: &|_| 0,
                present: &|_| true,
            };
            load.nothing_is_lost(tracker, vcpus.collect());
        },
    );
}
