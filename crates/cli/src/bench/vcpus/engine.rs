//! Pageferry as a contender: the engine, and its pager around KVM_RUN. Every fault is one request for
//! one page.

use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use pageferry::{
    paging::{Delivery, Events, Prefetch, Status},
    uffd::OpenWay,
};
use pageferry_kvm::{VcpuStats, VmPager, VmPagerOptions};
use pageferry_vmm::{PatternOptions, PatternSource};

use super::{
    case::{Case, Measurement},
    machine,
};
use crate::signals::Signals;

pub(super) const NAME: &str = "pageferry";

/// Serves `case` once. Without paging it is the pager of a machine whose memory has all come.
pub(super) fn run(case: &Case, signals: &Signals) -> anyhow::Result<Measurement> {
    serve(case, PatternOptions { delay: case.delay, ..PatternOptions::default() }, signals)
}

fn serve(case: &Case, source: PatternOptions, signals: &Signals) -> anyhow::Result<Measurement> {
    // Dropped last: pagers stop before the memory goes.
    let vm = machine::build(case)?;
    let source = PatternSource::new(source);
    let pager = vm
        .pager()
        .delivery(case.resolved.served.unwrap_or(Delivery::Queue))
        .prefetch(Prefetch::NONE)
        // The loops that it is compared with follow none either.
        .events(Events::Ignore)
        .batch(case.batch)
        // KVM's faults are the kernel's.
        .open_ways(vec![OpenWay::DeviceNode, OpenWay::Syscall])
        .start(Arc::clone(&source) as _)?;
    let pager = Arc::new(pager);
    let options = VmPagerOptions { guest_page_tables_resident: true, ..VmPagerOptions::default() };
    let vm_pager = VmPager::new(Arc::clone(&pager), options)?;
    let (measured, report) = machine::run(&vm, |_| Box::new(vm_pager.vcpu()), signals)?;
    // A guest may go on a little before the engine has noted that its page is there.
    let status = pager.wait_complete(Duration::from_secs(10));
    ensure!(
        matches!(status, Status::Complete(_)),
        "the guest is done, but the engine is not: {status:?}"
    );
    machine::verify(&vm, case, &measured)?;

    let expected = if case.resolved.served.is_some() { case.pages } else { 0 };
    let counts = pager.statistics().counts;
    let requested = source.granules();
    ensure!(
        requested == expected
            && counts.installed == expected
            && counts.demand == expected
            && counts.duplicate == 0,
        "{expected} pages were to be requested and installed once each: {requested} were requested, \
         and the engine counted {counts:?}"
    );
    let mut exits = VcpuStats::default();
    report.vcpus.iter().filter_map(|vcpu| vcpu.pager.as_ref()).for_each(|vcpu| exits.add(vcpu));
    let by_exit = pager.chosen().delivery.exits();
    ensure!(
        if by_exit { exits.exits() >= expected } else { exits.exits() == 0 },
        "{expected} faults, delivered by {}: {exits:?}",
        pager.chosen().delivery
    );
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use pageferry::memory::GuestAddress;

    use super::*;
    use crate::bench::{reference::sys, vcpus::tests::case};

    #[test]
    fn a_wrong_word_fails_it() {
        if let Err(error) = kvm_ioctls::Kvm::new() {
            println!("skipped: needs /dev/kvm: {error}");
            return;
        }
        if let Err(error) = sys::open_for_kernel(0) {
            println!("skipped: needs userfaultfd for the kernel's faults: {error}");
            return;
        }
        let case = case(Some(Delivery::Queue));
        let signals = Signals::install().expect("handlers");
        let layout = machine::build(&case).expect("a machine").layout();
        let (_, region) = layout.iter().next().expect("a region");
        // The offset of a word that is served wrong, and who notices: the guest reads every 64th
        // word.
        for (offset, noticed) in [(0, "1 mismatches"), (16, "1 of 5120 words are wrong")] {
            let lie = GuestAddress::new(region.guest_base().get() + offset);
            let lies = PatternOptions { lies: vec![lie], ..PatternOptions::default() };
            let error = serve(&case, lies, &signals).expect_err("a wrong word");
            assert!(error.to_string().contains(noticed), "{offset}: {error}");
        }
    }
}
