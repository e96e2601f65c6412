//! Noticing writes.

use super::{
    Shortfall,
    area::{Area, Backing},
    lab::{Lab, PAGES, done, pages_of},
    missing,
};
use crate::{
    FaultKind, Features, Mapped, PageCategories, PageRegion, Pagemap, PagemapEntry, RegisterMode,
    ScanRequest, Wake,
};

/// Write-protects page 0, writes to it, and lifts the protection when that is noticed.
fn serve_write(lab: &Lab) -> Result<(), Shortfall> {
    let page = lab.area.page(0);
    done(lab.uffd.write_protect(page, true, Wake::Yes)?)?;
    let (fault, ()) = lab.fault(
        FaultKind::WriteProtect,
        |area| area.write(0, 0x5a),
        |lab, _| done(lab.uffd.write_protect(page, false, Wake::Yes)?),
    )?;
    if !fault.write {
        return missing("the fault of a write came as one of a read");
    }
    match lab.area.read(0) {
        0x5a => Ok(()),
        other => missing(format!("the byte written is {other:#04x}")),
    }
}

fn write_protect(features: Features, backing: Backing) -> Result<(), Shortfall> {
    let area = Area::new(backing, pages_of(backing))?;
    area.write(0, 1);
    serve_write(&Lab::with_area(features, area, RegisterMode::WP)?)
}

pub(super) fn wp_anonymous() -> Result<(), Shortfall> {
    write_protect(Features::PAGEFAULT_FLAG_WP, Backing::Anonymous)
}

pub(super) fn wp_memfd() -> Result<(), Shortfall> {
    write_protect(Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM, Backing::Memfd)
}

pub(super) fn wp_hugetlb() -> Result<(), Shortfall> {
    write_protect(Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM, Backing::Hugetlb2M)
}

pub(super) fn wp_unpopulated() -> Result<(), Shortfall> {
    let features = Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED;
    serve_write(&Lab::new(features, Backing::Anonymous, RegisterMode::WP)?)
}

pub(super) fn wp_async() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::WP_ASYNC, Backing::Anonymous, RegisterMode::WP)?;
    let range = lab.area.range();
    let pagemap = Pagemap::open_self()?;
    let mut regions = [PageRegion::default(); PAGES as usize];
    let mut harvest = || {
        let result = pagemap.scan(&ScanRequest::written(range, true), &mut regions)?;
        Ok::<_, Shortfall>(regions[..result.regions].to_vec())
    };

    done(lab.uffd.write_protect(range, true, Wake::Yes)?)?;
    lab.attend(
        |area| area.write(2 * area.page_size(), 1),
        |event| missing(format!("an event came: {event:?}")),
    )?;
    // Twice: the first harvest must have armed the page again.
    for _ in 0..2 {
        let written = harvest()?;
        if !matches!(written[..], [region] if region.range() == lab.area.page(2)) {
            return missing(format!("page 2 was written; reported: {written:?}"));
        }
        let written = harvest()?;
        if !written.is_empty() {
            return missing(format!("nothing was written; reported: {written:?}"));
        }
        lab.area.write(2 * lab.area.page_size(), 1);
    }
    Ok(())
}

/// The entries of an area of which only page 0 was written.
fn entries() -> Result<[PagemapEntry; PAGES as usize], Shortfall> {
    let area = Area::new(Backing::Anonymous, PAGES)?;
    area.write(0, 1);
    let mut entries = [PagemapEntry::default(); PAGES as usize];
    match Pagemap::open_self()?.read_entries(area.range(), &mut entries)? {
        count if count == entries.len() => Ok(entries),
        count => missing(format!("{count} entries of {PAGES} could be read")),
    }
}

pub(super) fn pagemap() -> Result<(), Shortfall> {
    let entries = entries()?;
    let present = entries.map(PagemapEntry::present);
    if present == [true, false, false, false] {
        return Ok(());
    }
    missing(format!("of four pages the first is present; reported: {present:?}"))
}

/// By categories that need no userfaultfd.
pub(super) fn pagemap_scan() -> Result<(), Shortfall> {
    let area = Area::new(Backing::Anonymous, PAGES)?;
    for page in [0, 1, 3] {
        area.write(page * area.page_size(), 1);
    }
    let request = ScanRequest::having(area.range(), PageCategories::PRESENT);
    let mut regions = [PageRegion::default(); PAGES as usize];
    let result = Pagemap::open_self()?.scan(&request, &mut regions)?;
    let found = &regions[..result.regions];
    let expected = [area.range().take(2 * area.page_size()), area.page(3)];
    if found.iter().map(PageRegion::range).eq(expected) {
        return Ok(());
    }
    missing(format!("pages 0, 1 and 3 are present; reported: {found:?}"))
}

pub(super) fn soft_dirty() -> Result<(), Shortfall> {
    // A page is born soft-dirty, so there is no need to clear the bits of the whole process, in
    // which somebody may be tracking.
    if entries()?[0].soft_dirty() {
        return Ok(());
    }
    missing("a page just written is not soft-dirty: the kernel is built without it")
}
