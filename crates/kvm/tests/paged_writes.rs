//! Writes of guests to memory that is just being brought: by write protection where vCPUs wait in a
//! queue, by KVM where they leave KVM_RUN, and a refusal where neither can be.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::sync::Arc;

use common::{load::*, tracker::*, *};
use pageferry_dirty::{DirtyError, DirtySet, PagedTracker, PagedWrites, Tracked, Tracker, WpAsync};
use pageferry_kvm::dirty::{DirtyLog, KvmTracker};
use pageferry_memory::{Backing, GranuleIndex, HostRange, State};
use pageferry_paging::{Delivery, StartError, WriteTracking};
use pageferry_testing::features;
use pageferry_uffd::Features;

/// Runs a test with every way that vCPUs' writes are noticed by the pager's write protection.
fn each(test: impl Fn(&str, Config)) {
    let kinds = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    let huge = HugePages::reserve(8);
    for (tracking, needed) in [
        (WriteTracking::Asynchronous, kinds | Features::WP_ASYNC),
        (WriteTracking::Blocking, kinds),
    ] {
        if !kvm() || !features(needed) {
            continue;
        }
        let mut backings =
            vec![(Setup::Missing, None), (Setup::Minor, None), (Setup::MinorOwnView, None)];
        backings.extend(huge.as_ref().map(|_| (Setup::Minor, Some(HUGE))));
        for (setup, backing) in backings {
            for delivery in [Delivery::Queue, Delivery::Sharded(2)] {
                let what = backing.map_or(String::new(), |backing: Backing| format!(", {backing}"));
                let case = format!("{tracking:?}, {setup:?}, {delivery}{what}");
                let _watch = watch(120);
                let config = Config {
                    tracking,
                    setup,
                    backing,
                    delivery,
                    len: if backing.is_some() { 8 << 21 } else { PAGES * PAGE },
                    writes: Some(Arc::new(PagedWrites::new())),
                    ..Config::default()
                };
                test(&case, config);
            }
        }
    }
}

/// The memory of a guest with a tracker of it.
struct Paged {
    guest: Guest,
    tracker: PagedTracker,
    /// The view that the process has, and that of KVM where it is another.
    ranges: Vec<Tracked>,
}

impl Paged {
    fn new(config: Config) -> Self {
        let writes = config.writes.clone().unwrap();
        let guest = Guest::new(config);
        let tracker = PagedTracker::new(Arc::clone(guest.pager()), writes).unwrap();
        let region = &guest.region;
        let (mine, kvm) = (region.guest_view().range(), region.kvm_view().range());
        let views = [mine].into_iter().chain((kvm != mine).then_some(kvm));
        let ranges = views.map(|range| Tracked { range, page: region.page_size() }).collect();
        Self { guest, tracker, ranges }
    }

    fn offset(&self, page: u64) -> u64 {
        page << self.ranges[0].page.shift()
    }

    /// This page in the process's view, or in KVM's.
    fn page(&self, kvm: bool, page: u64) -> HostRange {
        let index = if kvm { self.ranges.len() - 1 } else { 0 };
        self.ranges[index].range.skip(self.offset(page)).take(self.offset(1))
    }

    fn is_present(&self, page: u64) -> bool {
        self.guest.region.page_map().state(GranuleIndex::new(page)) == State::Present
    }
}

#[test]
fn what_arrives_is_clean_and_what_is_then_written_is_dirty() {
    each(|case, config| {
        let mut paged = Paged::new(config);
        let mut vcpu = paged.guest.vcpu(0);
        paged.tracker.arm(&paged.ranges).unwrap();
        let set = DirtySet::new(&paged.ranges).unwrap();
        let harvest = |paged: &mut Paged| {
            paged.tracker.harvest(&set).unwrap();
            set.take()
        };
        let mut access = |paged: &Paged, code: &[u8], page| {
            let rdi = at(paged.offset(page) + 8);
            let registers = Registers { rdi, rax: 7, ..Registers::default() };
            vcpu.execute(&paged.guest, Ring::Three, code, registers).rax
        };
        assert_eq!(harvest(&mut paged), [], "{case}: nothing has come");
        for page in 1..4 {
            let word = access(&paged, &MOV_RAX, page);
            assert_eq!(word, Guest::expected(paged.offset(page) + 8), "{case}");
        }
        let mut byte = [0];
        paged.guest.region.guest_view().read_at(paged.offset(4), &mut byte).unwrap();
        wait_for("the pages to be known as present", || (1..5).all(|page| paged.is_present(page)));
        assert_eq!(harvest(&mut paged), [], "{case}: pages came, and were read");
        // One that came before, two that come for it, one that another has written.
        for page in [2, 5, 7] {
            access(&paged, &MOV_TO, page);
        }
        paged.guest.region.guest_view().write_at(paged.offset(4), &[1]).unwrap();
        let written = [(false, 4), (true, 2), (true, 5), (true, 7)];
        let mut expected = written.map(|(kvm, page)| paged.page(kvm, page));
        expected.sort_by_key(|range| range.start());
        // Neighbours are told as one.
        let told = harvest(&mut paged);
        let apart: Vec<HostRange> = told
            .iter()
            .flat_map(|run| {
                let one = paged.offset(1);
                (0..run.len() / one).map(move |n| run.skip(n * one).take(one))
            })
            .collect();
        assert_eq!(apart, expected, "{case}");
        assert_eq!(harvest(&mut paged), [], "{case}");
        access(&paged, &MOV_TO, 5);
        assert_eq!(harvest(&mut paged), [paged.page(true, 5)], "{case}: again");
    });
}

#[test]
fn nothing_is_lost_while_memory_comes() {
    each(|case, config| {
        let Paged { guest, mut tracker, ranges } = Paged::new(config);
        let page = ranges[0].page;
        guest.load(&adding(ranges[0].pages(), page.shift()));
        let vcpus = (0..2).map(|number| {
            let mut vcpu = guest.vcpu(number);
            let adder: Adder<'_> = Box::new(move |rax| {
                let registers =
                    Registers { rax, rcx: ADDITIONS, rdi: at(0), ..Registers::default() };
                vcpu.enter(Ring::Three, CODE, registers);
                vcpu.finish().rax
            });
            adder
        });
        let load = Load {
            case: case.to_owned(),
            ranges,
            memory: guest.region.guest_view(),
            marks: None,
            first: &|index| Guest::expected(index << page.shift()),
            present: &|index| {
                guest.region.page_map().state(GranuleIndex::new(index)) == State::Present
            },
        };
        load.nothing_is_lost(&mut tracker, vcpus.collect());
    });
}

/// Absent pages of such a guest carry markers, which scans call written: refused where the process
/// uses that view, too. With a view of its own, KVM tells what vCPUs write, and the pager what others do.
#[test]
fn exits_go_with_kvms_own_tracking() {
    if !exits() || !features(Features::PAGEFAULT_FLAG_WP | Features::WP_ASYNC) {
        return;
    }
    let _watch = watch(60);
    let config = |setup, delivery, tracking| Config {
        setup,
        delivery,
        tracking,
        writes: Some(Arc::new(PagedWrites::new())),
        ..Config::default()
    };
    let (scans, waits) = (WriteTracking::Asynchronous, WriteTracking::Blocking);
    for (setup, delivery, tracking, why) in [
        (Setup::Missing, Delivery::Exit, scans, "give the vCPUs a view of their own"),
        (Setup::Minor, Delivery::Exit, scans, "give the vCPUs a view of their own"),
        (Setup::Minor, Delivery::Hybrid(1), scans, "or deliver by queue"),
        (Setup::Minor, Delivery::Hybrid(1), waits, "or deliver by queue"),
        (Setup::MinorOwnView, Delivery::Exit, waits, "use WriteTracking::Asynchronous"),
    ] {
        let (_, builder) = config(setup, delivery, tracking).pager();
        let error = builder.start(Arc::new(Source::default())).err();
        let told = error.as_ref().map_or(String::new(), StartError::to_string);
        assert!(told.contains(why), "{setup:?} {delivery} {tracking:?}: {error:?}");
    }

    let config = config(Setup::MinorOwnView, Delivery::Exit, scans);
    let writes = config.writes.clone().unwrap();
    let guest = Guest::new(config);
    let mut vcpu = guest.vcpu(0);
    let (mine, kvm) = (guest.region.guest_view(), guest.region.kvm_view());
    let mut others = PagedTracker::new(Arc::clone(guest.pager()), writes).unwrap();
    // SAFETY: the slots are as the pager has them.
    let log = unsafe {
        DirtyLog::new(&guest.vm, guest.vm_pager.slots().tracked(), DirtyLog::mode_of(&guest.vm))
    };
    let mut vcpus = KvmTracker::from(log.unwrap());
    let refused = others.arm(&[Tracked::base(kvm.range())]).unwrap_err();
    assert!(matches!(refused, DirtyError::NotOwned { .. }), "{refused}");
    let ranges = [mine, kvm].map(|view| Tracked::base(view.range()));
    let set = DirtySet::new(&ranges).unwrap();
    others.arm(&ranges[..1]).unwrap();
    vcpus.arm(&ranges[1..]).unwrap();
    for round in 0..3 {
        let page =
            |view: &pageferry_memory::Mapping, page| view.range().skip(page * PAGE).take(PAGE);
        mine.write_at((5 + round) * PAGE, &[1]).unwrap();
        mine.write_at(30 * PAGE, &[1]).unwrap();
        let mut byte = [0];
        mine.read_at((40 + round) * PAGE, &mut byte).unwrap();
        let registers =
            Registers { rdi: at((10 + 2 * round) * PAGE), rax: 1, ..Registers::default() };
        vcpu.execute(&guest, Ring::Three, &MOV_TO, registers);
        let mut expected = [page(mine, 5 + round), page(mine, 30), page(kvm, 10 + 2 * round)];
        expected.sort_by_key(|range| range.start());
        for tracker in [&mut others as &mut dyn Tracker, &mut vcpus] {
            tracker.harvest(&set).unwrap();
        }
        assert_eq!(set.take(), expected, "{round}");
    }
}

#[test]
fn registered_memory_is_the_pagers_to_protect() {
    if !kvm() || !features(WpAsync::FEATURES) {
        return;
    }
    let guest = Guest::new(Config { delivery: Delivery::Queue, ..Config::default() });
    let view = guest.region.kvm_view();
    let mut tracker = WpAsync::own([Arc::clone(view)]).unwrap();
    let error = tracker.arm(&[Tracked::base(view.range())]).unwrap_err();
    assert!(matches!(error, DirtyError::Register { .. }), "{error}");
    let writes = Arc::new(PagedWrites::new());
    let error = PagedTracker::new(Arc::clone(guest.pager()), writes).unwrap_err().to_string();
    assert!(error.contains("a pager that was started with write tracking"), "{error}");
}
