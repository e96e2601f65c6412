//! `/proc/PID/maps` and `/proc/PID/smaps` as text.

use pageferry_memory::PageSize;
use pageferry_uffd::{HostAddress, HostRange};

use super::{Details, Mapping, MappingFlags, MappingName, Permissions};

/// Parses either file; the error is the line that is not understood.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Mapping>, String> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let done = match head(line) {
            Some(mapping) => {
                mappings.push(mapping);
                Some(())
            }
            None => mappings.last_mut().and_then(|mapping| detail(mapping, line)),
        };
        done.ok_or_else(|| String::from_utf8_lossy(line).into_owned())?;
    }
    Ok(mappings)
}

/// `START-END PERM OFFSET MAJOR:MINOR INODE [NAME]`, the numbers but the inode hexadecimal.
fn head(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        let (field, after) = rest.split_at(end);
        rest = after.strip_prefix(b" ").unwrap_or(after);
        str::from_utf8(field).ok()
    };
    let (start, end) = pair(field()?, '-')?;
    let permissions = field()?.as_bytes();
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let (major, minor) = pair(field()?, ':')?;
    let inode = field()?.parse().ok()?;
    let &[read, write, execute, sharing] = permissions else { return None };
    Some(Mapping {
        range: HostRange::from_bounds(HostAddress::new(start), HostAddress::new(end))?,
        permissions: Permissions {
            read: read == b'r',
            write: write == b'w',
            execute: execute == b'x',
        },
        shared: sharing == b's',
        offset,
        device: (u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        inode,
        name: name(rest.trim_ascii_start(), inode),
        details: None,
    })
}

fn pair(text: &str, separator: char) -> Option<(u64, u64)> {
    let (a, b) = text.split_once(separator)?;
    Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))
}

fn name(text: &[u8], inode: u64) -> MappingName {
    let inside = |prefix: &[u8]| text.strip_prefix(prefix)?.strip_suffix(b"]").map(<[u8]>::to_vec);
    if text.is_empty() {
        return MappingName::None;
    }
    if inode == 0 && text[0] == b'[' {
        return match text {
            b"[heap]" => MappingName::Heap,
            b"[stack]" => MappingName::Stack,
            _ => inside(b"[anon:")
                .map_or_else(|| MappingName::Kernel(text.to_vec()), MappingName::Named),
        };
    }
    let deleted = text.strip_suffix(b" (deleted)");
    MappingName::File { path: unescape(deleted.unwrap_or(text)), deleted: deleted.is_some() }
}

/// A line's end in a path is written as `\012`, and nothing else is changed.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    const ESCAPED: &[u8] = b"\\012";
    let mut path = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        if let Some(rest) = text.strip_prefix(ESCAPED) {
            path.push(b'\n');
            text = rest;
        } else {
            path.push(first);
            text = rest;
        }
    }
    path
}

/// `KEY: VALUE`, of which most are passed over.
fn detail(mapping: &mut Mapping, line: &[u8]) -> Option<()> {
    let (key, value) = str::from_utf8(line).ok()?.split_once(':')?;
    let bytes = || value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024);
    // Which lines there are, and their order, differs between kernels.
    let details = mapping.details.get_or_insert(Details {
        page_size: PageSize::base(),
        resident: 0,
        anonymous: 0,
        swapped: 0,
        flags: MappingFlags::empty(),
    });
    match key {
        "KernelPageSize" => details.page_size = PageSize::try_new(bytes()?)?,
        "Rss" | "Shared_Hugetlb" | "Private_Hugetlb" => {
            details.resident = details.resident.checked_add(bytes()?)?;
        }
        "Anonymous" => details.anonymous = bytes()?,
        "Swap" => details.swapped = bytes()?,
        "VmFlags" => details.flags = value.split_whitespace().map(flag).collect(),
        _ => {}
    }
    Some(())
}

fn flag(code: &str) -> MappingFlags {
    match code {
        "io" => MappingFlags::IO,
        "pf" => MappingFlags::FRAMES,
        "lo" => MappingFlags::LOCKED,
        "dd" => MappingFlags::NO_DUMP,
        "dc" => MappingFlags::NO_FORK,
        "wf" => MappingFlags::WIPE_ON_FORK,
        "ht" => MappingFlags::HUGETLB,
        "hg" => MappingFlags::HUGE_PAGES,
        "nh" => MappingFlags::NO_HUGE_PAGES,
        "gd" => MappingFlags::GROWS_DOWN,
        "mg" => MappingFlags::MERGEABLE,
        "nr" => MappingFlags::NO_RESERVE,
        "um" => MappingFlags::USERFAULTFD_MISSING,
        "uw" => MappingFlags::USERFAULTFD_WP,
        "ui" => MappingFlags::USERFAULTFD_MINOR,
        "sd" => MappingFlags::SOFT_DIRTY,
        "sl" => MappingFlags::SEALED,
        "ss" => MappingFlags::SHADOW_STACK,
        _ => MappingFlags::empty(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::NotTaken;

    const SMAPS: &[u8] = b"\
7f0000000000-7f0000200000 rw-s 00001000 00:0f 1234                       /anon_hugepage (deleted)
Size:               2048 kB
KernelPageSize:     2048 kB
MMUPageSize:        2048 kB
Rss:                   0 kB
Anonymous:             0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr sh mr mw me ms dd ht um xy 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Size:                  4 kB
ProtectionKey:         0
VmFlags: ex io 
";

    #[test]
    fn smaps() {
        let mappings = parse(SMAPS).unwrap();
        let [huge, vsyscall] = &mappings[..] else { panic!("{mappings:?}") };
        assert_eq!(huge.range.len(), 2 << 20);
        assert!(huge.shared && !huge.is_anonymous());
        assert_eq!((huge.offset, huge.device, huge.inode), (0x1000, (0, 15), 1234));
        assert_eq!(huge.permissions.to_string(), "rw-");
        assert_eq!(
            huge.name,
            MappingName::File { path: b"/anon_hugepage".to_vec(), deleted: true }
        );
        let details = huge.details.unwrap();
        assert_eq!((details.page_size, details.resident), (PageSize::SIZE_2M, 2 << 20));
        assert_eq!(
            details.flags,
            MappingFlags::NO_DUMP | MappingFlags::HUGETLB | MappingFlags::USERFAULTFD_MISSING
        );
        assert_eq!(huge.takeable(), Ok(()));
        assert_eq!(vsyscall.name, MappingName::Kernel(b"[vsyscall]".to_vec()));
        assert_eq!(vsyscall.takeable(), Err(NotTaken::Kernel));
    }

    #[test]
    fn names() {
        let named = |text: &str, inode| name(text.as_bytes(), inode);
        let file = |path: &str, deleted| MappingName::File { path: path.into(), deleted };
        for (text, inode, expected) in [
            ("", 0, MappingName::None),
            ("[heap]", 0, MappingName::Heap),
            ("[stack]", 0, MappingName::Stack),
            ("[anon:a] b]", 0, MappingName::Named(b"a] b".to_vec())),
            ("[vvar_vclock]", 0, MappingName::Kernel(b"[vvar_vclock]".to_vec())),
            ("[heap]", 7, file("[heap]", false)),
            ("/a b/c", 7, file("/a b/c", false)),
            ("/memfd:x (deleted)", 7, file("/memfd:x", true)),
            ("/a\\012b\\x", 7, file("/a\nb\\x", false)),
        ] {
            assert_eq!(named(text, inode), expected, "{text}");
        }
    }

    #[test]
    fn devices_are_not_taken() {
        let text = |flags: &str| {
            format!("1000-2000 rw-s 00000000 00:05 9  /dev/dri/card0\nVmFlags: {flags}\n")
        };
        for (flags, expected) in [
            ("rd io", Err(NotTaken::Device)),
            ("pf rd", Err(NotTaken::Device)),
            ("rd wr dd", Ok(())),
        ] {
            assert_eq!(parse(text(flags).as_bytes()).unwrap()[0].takeable(), expected, "{flags}");
        }
        let unexamined = parse(b"1000-2000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!(unexamined[0].takeable(), Err(NotTaken::Unexamined));
    }

    #[test]
    fn parts_of_a_mapping_are_recognised() {
        let one = |line: &str| parse(line.as_bytes()).unwrap().remove(0);
        let whole = one("1000-9000 rw-p 00000000 08:01 5 /f");
        assert!(whole.is_part_of_same(&one("3000-4000 r--p 00002000 08:01 5 /f")));
        for other in [
            "3000-4000 rw-p 00003000 08:01 5 /f",
            "3000-4000 rw-s 00002000 08:01 5 /f",
            "3000-4000 rw-p 00002000 08:01 6 /f",
            "9000-a000 rw-p 00008000 08:01 5 /f",
            "3000-4000 rw-p 00000000 00:00 0 ",
        ] {
            assert!(!whole.is_part_of_same(&one(other)), "{other}");
        }
    }

    #[test]
    fn lines_that_are_not_understood_are_named() {
        for text in [
            "x",
            "Rss: 4 kB",
            "2000-1000 rw-p 00000000 00:00 0 ",
            "1000-2000 rw- 00000000 00:00 0 ",
            "1000-2000 rw-p 00000000 00:00 0 \nKernelPageSize: 3 kB",
            "1000-2000 rw-p 00000000 00:00 0 \nRss: 18446744073709551615 kB",
        ] {
            let line = parse(text.as_bytes()).unwrap_err();
            assert!(text.ends_with(&line), "{text}: {line}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn nothing_after_a_mapping_makes_it_panic(text in "[0-9a-f :A-Z\\-\\n]{0,200}") {
            let _ = parse(format!("1000-2000 rw-p 00000000 00:00 0 \n{text}").as_bytes());
        }
    }
}
