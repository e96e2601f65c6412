//! Memory that arrives on demand: every delivery on every set-up, with every size of pages and every
//! payload. No word is wrong, and every fault is accounted for.

mod common;

use std::time::Duration;

use common::*;
use pageferry_kvm::MemoryErrors;
use pageferry_memory::{GuestAddress, PageSize};
use pageferry_paging::{Delivery, Prefetch, Status};
use pageferry_vmm::{Operation, Order, Pattern, PatternOptions, Ring, Setup, Share, VmConfig};

fn run_payloads(case: Case, ring: Ring) {
    for (order, operation, of_ring) in payloads() {
        if of_ring != ring {
            continue;
        }
        let mut config = config(order, operation, ring, Share::Own, 2, pages(ring) << 12);
        config.payload.pattern = Pattern { zero_every: 16 };
        Paged::new(case, config, PatternOptions::default()).run_and_check(0);
    }
}

#[test]
fn every_payload_in_ring_3() {
    each_case(120, |case| {
        run_payloads(case, Ring::Three);
    });
}

#[test]
fn every_payload_in_ring_0() {
    each_case(120, |case| {
        run_payloads(case, Ring::Zero);
    });
}

#[test]
fn pages_of_2_mib() {
    if !can_page() {
        return;
    }
    let Some(_pages) = HugePages::reserve(HUGE_MEMORY / HUGE.bytes()) else { return };
    let _watch = watch(120);
    for case in cases(HUGE) {
        for (order, operation, ring) in payloads() {
            // Order Zipf differs from the others in small pages only.
            if order == Order::Zipf {
                continue;
            }
            let mut config = config(order, operation, ring, Share::Own, 2, HUGE_MEMORY);
            config.payload.pattern = Pattern { zero_every: 16 };
            if ring == Ring::Zero {
                config.payload.unit = HUGE;
            }
            Paged::new(case, config, PatternOptions::default()).run_and_check(0);
        }
    }
}

/// Two pages, one on each side of the hole. The guest looks at nine words of each 2 MiB of them.
#[test]
fn pages_of_1_gib() {
    if !can_page() {
        return;
    }
    let Some(_pages) = GiantPages::reserve(2) else { return };
    let _watch = watch(240);
    // For each set-up, and for each way a fault comes.
    for (delivery, setup) in [
        (Delivery::Queue, Setup::Missing),
        (Delivery::Exit, Setup::Minor),
        (Delivery::Hybrid(2), Setup::MinorOwnView),
        (Delivery::Exit, Setup::NoQueue),
    ] {
        let case = Case { delivery, setup, page_size: PageSize::SIZE_1G };
        let mut config = VmConfig::new(2, 2 << 30);
        config.payload.operation = Operation::ReadModifyWrite;
        config.payload.unit = HUGE;
        Paged::new(case, config, PatternOptions::default()).run_and_check(0);
    }
}

#[test]
fn eight_vcpus() {
    each_case(120, |case| {
        for threads in [0, 3] {
            let config = config(
                Order::Random,
                Operation::ReadModifyWrite,
                Ring::Three,
                Share::Own,
                8,
                4096 << 12,
            );
            let source = PatternOptions { threads, ..PatternOptions::default() };
            Paged::new(case, config, source).run_and_check(0);
        }
    });
}

/// With a queue the kernel holds a vCPU up inside KVM_RUN, and a VMM need know nothing of paging.
#[test]
fn a_queue_needs_nothing_of_the_vmm() {
    each_case(120, |case| {
        if case.delivery.exits() {
            return;
        }
        for vcpus in [2, 8] {
            let config = config(
                Order::Random,
                Operation::ReadModifyWrite,
                Ring::Three,
                Share::Own,
                vcpus,
                1024 << 12,
            );
            let paged = Paged::new(case, config, PatternOptions::default());
            let report = paged.vm.run(None, &Default::default()).unwrap();
            assert!(report.is_good(), "{case}: {report}");
            assert!(report.vcpus.iter().all(|vcpu| vcpu.pager.is_none()));
            paged.check_counts(1024);
            paged.check_contents(false);
        }
    });
}

/// All vCPUs want the same pages at the same time: each page is asked for once, and all go on.
#[test]
fn one_request_for_a_page_that_all_want() {
    each_case(120, |case| {
        for order in [Order::Sequential, Order::Random] {
            let config =
                config(order, Operation::ReadVerify, Ring::Three, Share::All, 8, 512 << 12);
            let delay = Duration::from_micros(50);
            let source = PatternOptions { delay, ..PatternOptions::default() };
            let report = Paged::new(case, config, source).run_and_check(0);
            assert_eq!(report.touches(), 8 * 512);
        }
    });
}

/// vCPUs and devices on the same pages, whatever the mixture of deliveries.
#[test]
fn device_threads_beside_vcpus() {
    each_case(120, |case| {
        for operation in Operation::ALL {
            let config = config(Order::Random, operation, Ring::Three, Share::Own, 4, 1024 << 12);
            let delay = Duration::from_micros(20);
            let source = PatternOptions { delay, ..PatternOptions::default() };
            let report = Paged::new(case, config, source).run_and_check(3);
            assert_eq!(report.devices.iter().map(|device| device.pages).sum::<u64>(), 3 * 1024);
        }
    });
}

#[test]
fn pages_that_nobody_asked_for_may_come_first() {
    each_case(120, |case| {
        for prefetch in [Prefetch::SWEEP, Prefetch::around(16 << 12), Prefetch::default()] {
            let config = config(
                Order::Random,
                Operation::ReadModifyWrite,
                Ring::Three,
                Share::Own,
                4,
                2048 << 12,
            );
            let source = PatternOptions { threads: 2, ..PatternOptions::default() };
            let paged = Paged::with(case, config, source, prefetch, MemoryErrors::Exit);
            let report = paged.run(&Default::default());
            assert!(report.is_good(), "{case}, {prefetch:?}: {report}");
            let status = paged.pager.wait_complete(PATIENCE);
            assert!(matches!(status, Status::Complete(_)), "{case}, {prefetch:?}: {status:?}");
            assert_eq!(paged.vm.verify(false).unwrap().granules, 2048);
            paged.check_contents(false);
            assert_eq!(paged.source.granules(), 2048, "{case}, {prefetch:?}");
            assert_eq!(paged.source.completions(), 1, "{case}, {prefetch:?}");
            // It is as any machine now.
            let again = paged.run(&Default::default());
            let written = again.vcpus.iter().map(|vcpu| vcpu.mismatches).sum::<u64>();
            assert_eq!(written, 2048 * 9, "every word is what the first run made of it: {again}");
            let exits: u64 = paged.vm_pager.stats()[4..].iter().map(|stats| stats.exits()).sum();
            assert_eq!(exits, 0, "{case}, {prefetch:?}");
        }
    });
}

#[test]
fn all_memory_may_be_zero() {
    each_case(60, |case| {
        let mut config = VmConfig::new(2, 256 << 12);
        config.payload.pattern = Pattern { zero_every: 1 };
        let paged = Paged::new(case, config, PatternOptions::default());
        paged.run_and_check(0);
        wait_for("zero pages to be counted", || paged.pager.statistics().counts.zero >= 256);
        assert_eq!(paged.pager.statistics().counts.zero, 256, "{case}");
    });
}

/// A test of the tests: a source that serves one wrong word is found out.
#[test]
fn a_source_that_lies_is_found_out() {
    each_case(60, |case| {
        let lie = GuestAddress::new((4 << 30) + (100 << 12) + 512);
        let config = VmConfig::new(2, 512 << 12);
        let source = PatternOptions { lies: vec![lie], ..PatternOptions::default() };
        let paged = Paged::new(case, config, source);
        let report = paged.run(&Default::default());
        assert_eq!(report.mismatches(), 1, "{case}: {report}");
        assert_eq!(report.vcpus[1].first_mismatch.unwrap().address, lie, "{case}");
        assert_eq!(paged.vm.verify(false).unwrap().first.unwrap().address, lie, "{case}");
    });
}

/// What a run costs in exits: one for each page, none with a queue.
#[test]
fn a_vcpu_exits_once_for_each_page_of_its_own() {
    if !can_page() {
        return;
    }
    let _watch = watch(60);
    for setup in Setup::ALL {
        let case = Case { delivery: Delivery::Exit, setup, page_size: SMALL };
        let config = VmConfig::new(4, 1024 << 12);
        let paged = Paged::new(case, config, PatternOptions::default());
        let report = paged.run_and_check(0);
        for vcpu in &report.vcpus {
            let stats = vcpu.pager.as_ref().unwrap();
            assert_eq!(stats.poison, 256, "{case}: {stats:?}");
            assert_eq!(stats.exits(), 256, "{case}: {stats:?}");
            assert_eq!(vcpu.exits, 1, "only the end is the VMM's: {case}");
        }
    }
}
