//! The probe ends, and says the same as trying by hand.

use std::collections::HashSet;

use pageferry_uffd::{
    OpenWay, Options,
    probe::{Status, probe},
};

#[test]
fn the_probe_tries_everything_and_ends() {
    let probe = probe();
    for finding in &probe.findings {
        println!("{:24} {} ({})", finding.id, finding.status, finding.what);
    }
    let ids: HashSet<_> = probe.findings.iter().map(|finding| finding.id).collect();
    assert_eq!(ids.len(), probe.findings.len(), "names are unique");

    for (id, way) in [
        ("open.device", OpenWay::DeviceNode),
        ("open.syscall", OpenWay::Syscall),
        ("open.user-mode-only", OpenWay::SyscallUserModeOnly),
    ] {
        assert_eq!(probe.works(id), Options::new().ways([way]).open().is_ok(), "{id}");
    }
    let opened = Options::new().open();
    assert_eq!(probe.opened_by, opened.as_ref().map(|uffd| uffd.negotiated().opened_by).ok());
    assert_eq!(probe.features, opened.as_ref().map(|uffd| uffd.negotiated().available).ok());
    for finding in &probe.findings {
        if let Status::Missing { reason } | Status::Untested { reason } = &finding.status {
            assert!(!reason.is_empty(), "{}", finding.id);
        }
    }
    if opened.is_err() {
        println!("skipped: needs userfaultfd");
        return;
    }
    // What every kernel with userfaultfd has had from the start.
    for id in ["missing.anonymous", "zeropage", "dont-wake"] {
        assert!(probe.works(id), "{:?}", probe.find(id));
    }
}
