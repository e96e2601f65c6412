//! What the probe says of this host, whatever that is.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use pageferry_kvm::{
    Hints, KvmError, SignalSet, VcpuDelivery, choose,
    probe::{self, Paging, Status},
};

#[test]
fn it_agrees_with_itself() {
    let before = SignalSet::blocked();
    let probe = probe::probe();
    for finding in &probe.findings {
        println!("{}: {finding}", finding.id);
    }
    assert_eq!(SignalSet::blocked(), before, "the caller's signals were touched");
    assert_eq!(probe.findings[0].id, probe::DEVICE);
    if !probe.works(probe::DEVICE) {
        assert_eq!(probe.findings.len(), 1, "nothing is tried without a device");
        println!("skipped: needs /dev/kvm");
        return;
    }
    assert!(probe.works(probe::RUNS), "{:?}", probe.find(probe::RUNS));
    assert_eq!(probe.works(probe::TWO_DIMENSIONAL), probe.paging == Paging::TwoDimensional);
    assert_eq!(probe.works(probe::DIRTY_RING), probe.dirty_ring_bytes.is_some());
    for id in [
        probe::VENDOR,
        probe::TWO_DIMENSIONAL,
        probe::POISON_EXITS,
        probe::MEMORY_FAULT_INFO,
        probe::DIRTY_RING,
        probe::MANUAL_PROTECT,
        probe::GUEST_MEMFD,
    ] {
        let finding = probe.find(id).expect(id);
        match &finding.status {
            // A host whose module is not known says nothing else about it.
            Status::Works => assert!(!finding.how.is_empty() || id == probe::VENDOR, "{finding:?}"),
            Status::Missing { reason } | Status::Untested { reason } => {
                assert!(!reason.is_empty(), "{finding:?}");
            }
        }
    }
    assert_eq!(&probe, probe::host(), "the second time");
}

/// Poison exits are the kernel's: with POISON they have always been seen to work.
#[test]
fn vcpus_leave_for_markers_wherever_there_are_markers() {
    let probe = probe::host();
    if !probe.works(probe::DEVICE) {
        println!("skipped: needs /dev/kvm");
        return;
    }
    if !pageferry_uffd::probe::probe().works("poison") {
        assert!(!probe.works(probe::POISON_EXITS));
        println!("skipped: needs userfaultfd's POISON");
        return;
    }
    assert!(probe.works(probe::POISON_EXITS), "{:?}", probe.find(probe::POISON_EXITS));
}

#[test]
fn it_leaves_nothing_behind() {
    if !probe::host().works(probe::DEVICE) {
        println!("skipped: needs /dev/kvm");
        return;
    }
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    // Other tests of this process open and close things of their own: it has to be so once.
    let clean = (0..50).any(|_| {
        let before = (count("fd"), count("task"));
        probe::probe();
        (count("fd"), count("task")) == before
    });
    assert!(clean, "descriptors or threads are left each time");
}

#[test]
fn measuring_gives_plausible_times() {
    let probe = probe::host();
    if !probe.works(probe::POISON_EXITS) {
        println!("skipped: needs /dev/kvm, and exits for markers");
        return;
    }
    match probe::measure() {
        Ok(measured) => {
            println!("{measured:?}");
            for time in [measured.queue, measured.queue_on_one_cpu, measured.exit] {
                assert!(time.as_nanos() > 100 && time.as_millis() < 500, "{measured:?}");
            }
            assert!(measured.faults >= 100);
        }
        Err(why) if why.contains("userfaultfd") => {
            println!("skipped: needs userfaultfd for the kernel's faults: {why}");
        }
        Err(why) => panic!("{why}"),
    }
}

/// What is chosen here follows from what was found here, and the reason says so.
#[test]
fn the_choice_follows_from_the_findings() {
    let probe = probe::host();
    let poison = probe.works(probe::POISON_EXITS);
    let resident = Hints { guest_page_tables_resident: true, ..Hints::default() };
    for hints in [Hints::default(), resident] {
        let possible =
            poison && (hints.guest_page_tables_resident || probe.paging == Paging::TwoDimensional);
        let (delivery, why) = choose(VcpuDelivery::Auto, probe, &hints).unwrap();
        println!("{delivery}: {why}");
        assert!(!delivery.exits() || possible, "{why}");
        if possible && let Ok(measured) = probe::measured() {
            assert_eq!(delivery.exits(), measured.exit <= measured.queue, "{why}");
            assert!(why.contains(" us"), "{why}");
        }
        match choose(VcpuDelivery::Exit, probe, &hints) {
            Ok((delivery, _)) => assert!(possible && delivery.exits()),
            Err(KvmError::NotHere { why, .. }) => assert!(!poison && !why.is_empty()),
            Err(error) => assert!(poison && !possible, "{error}"),
        }
    }
}
