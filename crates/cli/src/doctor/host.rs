//! Kernel, processors, page sizes, huge pages, transparent huge pages.

use std::{ffi::c_void, fs, io, path::Path, ptr};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::finding::{Finding, Group};
use crate::room::field_kib;

const GROUP: Group = Group::Host;

pub(super) fn findings() -> Vec<Finding> {
    let uname = rustix::system::uname();
    let text = |value: &std::ffi::CStr| value.to_string_lossy().into_owned();
    let kernel =
        format!("{} {} {}", text(uname.sysname()), text(uname.release()), text(uname.machine()));
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut findings = vec![
        Finding::fact(GROUP, "kernel", "kernel", kernel),
        Finding::fact(GROUP, "cpus", "processors this process may use", cpus.to_string()),
        Finding::fact(
            GROUP,
            "page-size",
            "page size",
            format!("{} KiB", rustix::param::page_size() / 1024),
        ),
        memory(),
    ];
    findings.extend(huge_pages());
    findings.push(transparent_anonymous());
    findings.push(transparent_shmem());
    findings
}

fn memory() -> Finding {
    let what = "memory";
    match fs::read_to_string("/proc/meminfo") {
        Ok(text) => {
            let mib = |field| field_kib(&text, field).map_or(0, |kib| kib / 1024);
            let value = format!("{} MiB, {} MiB available", mib("MemTotal:"), mib("MemAvailable:"));
            Finding::fact(GROUP, "memory", what, value)
        }
        Err(error) => Finding::untested(GROUP, "memory", what, format!("/proc/meminfo: {error}")),
    }
}

/// One finding for each size the kernel has (Documentation/admin-guide/mm/hugetlbpage.rst).
fn huge_pages() -> Vec<Finding> {
    let root = Path::new("/sys/kernel/mm/hugepages");
    let mut sizes: Vec<u64> = match fs::read_dir(root) {
        Ok(entries) => entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
            })
            .collect(),
        Err(error) => {
            let why = format!("{}: {error}", root.display());
            let finding = Finding::missing(GROUP, "hugetlb", "huge pages", why)
                .costs("no hugetlb memory: 512 or 262,144 times as many faults for the same bytes")
                .remedy("a kernel with CONFIG_HUGETLBFS");
            return vec![finding];
        }
    };
    sizes.sort_unstable();
    sizes.into_iter().map(|kib| huge_page(root, kib)).collect()
}

fn huge_page(root: &Path, kib: u64) -> Finding {
    let (id, name) = match kib {
        2048 => ("hugetlb-2m".to_owned(), "2 MiB".to_owned()),
        1_048_576 => ("hugetlb-1g".to_owned(), "1 GiB".to_owned()),
        kib => (format!("hugetlb-{kib}k"), format!("{kib} KiB")),
    };
    let what = format!("huge pages of {name}");
    let directory = root.join(format!("hugepages-{kib}kB"));
    let number = |file: &str| -> io::Result<u64> {
        let text = fs::read_to_string(directory.join(file))?;
        text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    };
    let counts = number("nr_hugepages")
        .and_then(|total| Ok((total, number("free_hugepages")?, number("resv_hugepages")?)));
    let (total, free, promised) = match counts {
        Ok(counts) => counts,
        Err(error) => {
            let why = format!("{}: {error}", directory.display());
            return Finding::untested(GROUP, &id, &what, why);
        }
    };
    let counts = format!("{total} reserved, {free} free, {promised} promised");
    let remedy = format!("as root: echo N > {}/nr_hugepages", directory.display());
    let costs = "guests backed by such pages cannot be served here";
    if free <= promised {
        return Finding::missing(GROUP, &id, &what, counts).costs(costs).remedy(remedy);
    }
    let bytes = (kib * 1024) as usize;
    let flags = MapFlags::from_bits_retain(kib.trailing_zeros().wrapping_add(10) << 26);
    match Trial::new(bytes, MapFlags::PRIVATE | MapFlags::HUGETLB | flags) {
        Ok(trial) => {
            trial.touch(0);
            Finding::works(GROUP, &id, &what).detail(counts)
        }
        Err(error) => {
            let why = format!("{counts}; mapping one: {error}");
            Finding::missing(GROUP, &id, &what, why).costs(costs).remedy(remedy)
        }
    }
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const HUGE: usize = 2 << 20;

/// The word in brackets of a file such as `always [madvise] never`.
fn chosen(file: &str) -> io::Result<String> {
    let text = fs::read_to_string(Path::new(THP).join(file))?;
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    Ok(word.map_or(text.trim(), |(word, _)| word).to_owned())
}

fn transparent_anonymous() -> Finding {
    transparent(&Transparent {
        id: "thp-anon",
        what: "transparent huge pages, anonymous",
        setting: "enabled",
        off: &["never"],
        costs: "memory stays in 4 KiB pages after it has arrived, unless it is collapsed",
        ask_for: "madvise",
        kind: MapFlags::PRIVATE,
        field: "AnonHugePages:",
    })
}

fn transparent_shmem() -> Finding {
    transparent(&Transparent {
        id: "thp-shmem",
        what: "transparent huge pages, shared memory",
        setting: "shmem_enabled",
        off: &["never", "deny"],
        costs: "memfd memory stays in 4 KiB pages after it has arrived",
        ask_for: "advise",
        kind: MapFlags::SHARED,
        field: "ShmemPmdMapped:",
    })
}

/// A kind of memory that may consist of huge pages without reserving them
/// (Documentation/admin-guide/mm/transhuge.rst).
struct Transparent {
    id: &'static str,
    what: &'static str,
    /// The file with the setting.
    setting: &'static str,
    /// What it is set to where there are none.
    off: &'static [&'static str],
    costs: &'static str,
    /// What it can be set to, to have some.
    ask_for: &'static str,
    kind: MapFlags,
    /// The line of smaps that counts them.
    field: &'static str,
}

fn transparent(kind: &Transparent) -> Finding {
    let &Transparent { id, what, setting: file, .. } = kind;
    let mode = chosen(file);
    let setting = match &mode {
        Ok(mode) => format!("set to {mode}"),
        Err(error) => format!("{THP}/{file}: {error}"),
    };
    let off = mode.as_ref().map_or(true, |mode| kind.off.contains(&mode.as_str()));
    match huge_page_appears(kind) {
        // Also where the setting for all sizes says no: one for this size may say yes.
        Ok(true) => Finding::works(GROUP, id, what).detail(setting),
        _ if off => Finding::missing(GROUP, id, what, setting)
            .costs(kind.costs)
            .remedy(format!("as root: echo {} > {THP}/{file}", kind.ask_for)),
        // The kernel may be short of contiguous memory just now.
        Ok(false) => Finding::untested(GROUP, id, what, format!("{setting}; got small pages")),
        Err(error) => Finding::untested(GROUP, id, what, format!("{setting}; {error}")),
    }
}

/// Asks for a huge page, touches it, and looks whether it is one.
fn huge_page_appears(kind: &Transparent) -> io::Result<bool> {
    let trial = Trial::new(2 * HUGE, MapFlags::PRIVATE)?;
    let inside = (trial.start as usize).next_multiple_of(HUGE) - trial.start as usize;
    trial.replace(inside, HUGE, kind.kind)?;
    trial.touch(inside);
    let maps = fs::read_to_string("/proc/self/smaps")?;
    let page = trial.start as usize + inside;
    let header = |line: &&str| {
        let range = line.split_whitespace().next().and_then(|word| word.split_once('-'));
        let number = |text| usize::from_str_radix(text, 16).ok();
        range.and_then(|(from, to)| Some(number(from)? <= page && page < number(to)?)) == Some(true)
    };
    let mut lines = maps.lines();
    lines.by_ref().find(header);
    let huge = lines.find_map(|line| line.strip_prefix(kind.field));
    let kib = huge.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) > 0)
}

/// Private memory to try something on.
struct Trial {
    start: *mut c_void,
    len: usize,
}

impl Trial {
    fn new(len: usize, flags: MapFlags) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint makes a mapping of its own, which overlaps nothing.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, flags)? };
        Ok(Self { start, len })
    }

    /// Maps fresh memory of another kind in the place of a part, for which huge pages are welcome.
    fn replace(&self, offset: usize, len: usize, flags: MapFlags) -> io::Result<()> {
        assert!(offset + len <= self.len, "{offset:#x}+{len:#x} lies within {:#x}", self.len);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the part is this value's own, to which no reference exists; it is unmapped with
        // the rest.
        unsafe {
            let start = self.start.byte_add(offset);
            mmap_anonymous(start, len, protection, flags | MapFlags::FIXED)?;
            madvise(start, len, Advice::LinuxHugepage)?;
        }
        Ok(())
    }

    fn touch(&self, offset: usize) {
        assert!(offset < self.len, "{offset:#x} lies within {:#x}", self.len);
        // SAFETY: the byte lies in the mapping, to which no reference exists.
        unsafe { self.start.cast::<u8>().add(offset).write_volatile(1) };
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody keeps its address.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            eprintln!("pageferry: unmapping {:p}+{:#x}: {error}", self.start, self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_at_line_starts() {
        let text = "NotMemTotal: 1 kB\nMemTotal:       24575 kB\nEmpty:\n";
        assert_eq!(field_kib(text, "MemTotal:"), Some(24575));
        assert_eq!(field_kib(text, "Empty:"), None);
        assert_eq!(field_kib(text, "Absent:"), None);
    }
}
