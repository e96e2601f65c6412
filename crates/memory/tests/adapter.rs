//! Memory of a VMM that uses `vm-memory`, served on demand by the engine.
#![cfg(all(feature = "vm-memory", not(loom)))]

use std::sync::{Arc, Mutex};

use pageferry_memory::{
    Backing, Layout, MemoryFile, MemoryFileKind, PageSize, Region, RegionConfig, RegionId, State,
    adapter::{self, View},
};
use pageferry_paging::{
    Completion, Delivery, Events, InstallMethod, PageSink, PageSource, Pager, Prefetch, SinkError,
    SourceError, Span, Status, Urgency,
};
use pageferry_testing::{HugePages, PATIENCE, fill_pattern, userfaultfd, wait_for, watch, word};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MIB: usize = 1 << 20;
/// The second region begins where a guest has it, above the hole for devices.
const HIGH: u64 = 4 << 30;
const DELIVERIES: [Delivery; 6] = [
    Delivery::Queue,
    Delivery::QueueN(2),
    Delivery::ByThread(2),
    Delivery::ByCpu(2),
    Delivery::Sharded(2),
    Delivery::Signal,
];

/// Computes what it is asked for.
#[derive(Default)]
struct Pattern {
    completed: Mutex<Option<Completion>>,
}

impl PageSource for Pattern {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let granule = sink.layout().get(span.region).expect("a region").granule().bytes();
        let mut offset = span.granules.first().get() * granule;
        let filled = sink.fill(span, &mut |bytes| {
            fill_pattern(span.region, offset, bytes);
            offset += bytes.len() as u64;
            Ok(())
        });
        match filled {
            Ok(()) | Err(SinkError::Stopped) => Ok(()),
            Err(error) => panic!("{error}"),
        }
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn complete(&self, counts: Completion) -> Result<(), SourceError> {
        *self.completed.lock().unwrap() = Some(counts);
        Ok(())
    }

    fn detach(&self) {}
}

fn layout_of(memory: &Arc<GuestMemoryMmap>) -> Layout {
    // SAFETY: the test holds no references to the memory, and leaves it mapped.
    let regions: Vec<Region> = unsafe { adapter::regions(memory, None, None) }.unwrap();
    Layout::new(regions.into_iter().map(Arc::new).collect()).unwrap()
}

/// The VMM's own accesses, by guest address, are the faults.
fn served(case: &str, memory: &Arc<GuestMemoryMmap>, delivery: Delivery, install: InstallMethod) {
    let _watch = watch(20);
    let source = Arc::new(Pattern::default());
    let pager = Pager::builder(layout_of(memory))
        .delivery(delivery)
        .install(Some(install))
        .events(Events::Watch)
        .prefetch(Prefetch::NONE)
        .start(Arc::clone(&source) as _)
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    let granules = pager.layout().total_granules();
    assert_eq!(pager.remaining(), granules, "{case}");

    // Across a page boundary: two faults, in one access of several bytes.
    let regions: Vec<_> = pager
        .layout()
        .iter()
        .map(|(id, region)| (id, region.guest_base().get(), region.len(), region.page_size()))
        .collect();
    for &(id, base, _, page) in &regions {
        let mut bytes = [0; 16];
        let offset = page.bytes() - 8;
        memory.read_slice(&mut bytes, GuestAddress(base + offset)).unwrap();
        let expected = [word(id, offset), word(id, offset + 8)].map(u64::to_ne_bytes).concat();
        assert_eq!(bytes[..], expected[..], "{case}: region {}", id.get());
    }
    let counts = pager.statistics().counts;
    assert_eq!(counts.demand, 2 * regions.len() as u64, "{case}: {counts:?}");

    // A write to an absent page keeps what is around it; then everything, by several threads.
    let (id, base, len, page) = regions[regions.len() - 1];
    let written = len - page.bytes() + 8;
    memory.write_obj(7_u64, GuestAddress(base + written)).unwrap();
    let read = |id: RegionId, base: u64, offset: u64| {
        let found: u64 = memory.read_obj(GuestAddress(base + offset)).unwrap();
        let expected = if (base + offset) == regions[regions.len() - 1].1 + written {
            7
        } else {
            word(id, offset)
        };
        assert_eq!(found, expected, "{case}: region {} offset {offset:#x}", id.get());
    };
    read(id, base, written - 8);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for &(id, base, len, page) in &regions {
                    for start in (0..len).step_by(page.bytes() as usize) {
                        read(id, base, start);
                        read(id, base, start + 8);
                        read(id, base, start + page.bytes() - 8);
                    }
                }
            });
        }
    });
    let status = pager.wait_complete(PATIENCE);
    let Status::Complete(counts) = status else { panic!("{case}: {status:?}") };
    assert_eq!(counts.granules_from_source, granules, "{case}");
    assert_eq!(*source.completed.lock().unwrap(), Some(counts), "{case}");
    assert_eq!(pager.statistics().counts.installed, granules, "{case}");
    // The VMM keeps its memory, and what is in it.
    drop(pager);
    read(id, base, 0);
    read(id, base, written);
}

#[test]
fn the_adapter_serves_anonymous_guest_memory() {
    if !userfaultfd() {
        return;
    }
    for delivery in DELIVERIES {
        for install in [InstallMethod::Copy, InstallMethod::Move] {
            let ranges = [(GuestAddress(0), MIB), (GuestAddress(HIGH), MIB / 2)];
            let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
            assert_eq!(memory.num_regions(), 2);
            served(&format!("{delivery} {install:?}"), &memory, delivery, install);
        }
    }
}

/// One file for both regions, as a VMM has it.
fn on_file(name: &str, kind: MemoryFileKind, len: usize) -> Arc<GuestMemoryMmap> {
    let file = MemoryFile::create(name, 2 * len as u64, kind).unwrap();
    let file = || std::fs::File::from(file.fd().try_clone_to_owned().unwrap());
    let ranges = [
        (GuestAddress(0), len, Some(FileOffset::new(file(), 0))),
        (GuestAddress(HIGH), len, Some(FileOffset::new(file(), len as u64))),
    ];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

#[test]
fn the_adapter_serves_guest_memory_on_a_memfd() {
    if !userfaultfd() {
        return;
    }
    for delivery in DELIVERIES {
        let memory = on_file("adapter", MemoryFileKind::Normal, MIB);
        served(&format!("{delivery} memfd"), &memory, delivery, InstallMethod::Copy);
    }
}

#[test]
fn the_adapter_serves_guest_memory_of_huge_pages() {
    if !userfaultfd() {
        return;
    }
    let Some(_pages) = HugePages::reserve(4) else { return };
    let size = PageSize::SIZE_2M;
    for delivery in DELIVERIES {
        let kind = MemoryFileKind::Hugetlb(size);
        let memory = on_file("adapter", kind, 2 * size.bytes() as usize);
        served(&format!("{delivery} huge"), &memory, delivery, InstallMethod::Copy);
    }
}

/// The other way round: regions made here, which a VMM's devices access through `vm-memory`.
#[test]
fn guest_memory_over_regions_faults_in_the_guest_view_only() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(20);
    let regions = [(0, MIB), (HIGH, MIB / 2)].map(|(base, len)| {
        let mut config = RegionConfig::new(len as u64, Backing::Memfd);
        config.guest_base = GuestAddress(base).into();
        Arc::new(Region::new(&config).unwrap())
    });
    let guest = adapter::guest_memory(&regions, View::Guest).unwrap();
    let fill = adapter::guest_memory(&regions, View::Fill).unwrap();
    let pager = Pager::builder(Layout::new(regions.to_vec()).unwrap())
        .delivery(Delivery::Queue)
        .install(Some(InstallMethod::Continue))
        .prefetch(Prefetch::NONE)
        .start(Arc::new(Pattern::default()))
        .unwrap();
    let demand = || pager.statistics().counts.demand;

    let address = GuestAddress(HIGH + 8184);
    assert_eq!(fill.read_obj::<u64>(address).unwrap(), 0, "absent, and no fault");
    assert_eq!(demand(), 0);
    // Across a page boundary.
    let expected = [8184, 8192].map(|offset| word(RegionId::new(1), offset));
    assert_eq!(guest.read_obj::<[u64; 2]>(address).unwrap(), expected);
    assert_eq!(demand(), 2);
    assert_eq!(fill.read_obj::<[u64; 2]>(address).unwrap(), expected, "it is there");
    // Whoever waits for a page goes on before it is published.
    wait_for("both pages", || regions[1].page_map().count(State::Present) == 2);
    // What has come stays with the VMM.
    drop(pager);
    guest.write_obj(1_u64, address).unwrap();
    assert_eq!(fill.read_obj::<u64>(address).unwrap(), 1);
}
