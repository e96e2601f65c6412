//! The instructions of a process that a system call in its name uses.

use pageferry_uffd::{HostAddress, HostRange};

use crate::{Detail, Mapping, MappingName, Process, ProcessError, status::Status};

/// `syscall`.
const SYSCALL: &[u8] = &[0x0f, 0x05];
/// `syscall; ret`.
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall`, which is rt_sigreturn(2), in two encodings: what every handler of a
/// signal returns to.
const SIGRETURN: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];
/// The longest of them.
const LONGEST: usize = 9;

/// How much code is looked through, at most.
const SEARCHED: u64 = 64 << 20;
/// How much of it at once.
const CHUNK: usize = 1 << 20;

/// Where a system call can be made.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Landing {
    /// At a `syscall` with whatever behind it.
    OneWay {
        /// Its address.
        syscall: HostAddress,
    },
    /// At one that returns to an address on the stack: to what restores all registers from there.
    Returning {
        /// The address of `syscall; ret`.
        syscall: HostAddress,
        /// The address of a call of rt_sigreturn(2).
        sigreturn: HostAddress,
        /// Which encoding of it.
        encoding: usize,
    },
}

/// What has been found so far.
#[derive(Default)]
struct Found {
    syscall: Option<HostAddress>,
    syscall_ret: Option<HostAddress>,
    sigreturn: Option<(HostAddress, usize)>,
}

impl Found {
    fn look(&mut self, code: &[u8], start: HostAddress) {
        let address = |index: usize| start.checked_add(index as u64);
        let find = |pattern: &[u8]| find(code, pattern).and_then(address);
        self.syscall = self.syscall.or_else(|| find(SYSCALL));
        self.syscall_ret = self.syscall_ret.or_else(|| find(SYSCALL_RET));
        self.sigreturn = self.sigreturn.or_else(|| {
            let find = |(encoding, pattern)| Some((find(pattern)?, encoding));
            SIGRETURN.into_iter().enumerate().find_map(find)
        });
    }

    fn is_complete(&self) -> bool {
        self.syscall_ret.is_some() && self.sigreturn.is_some()
    }
}

impl Landing {
    /// Looks through the code of a process.
    pub(crate) fn find(process: &Process) -> Result<Self, ProcessError> {
        let pid = process.pid();
        let mut found = Found::default();
        let mut code: Vec<Mapping> = process.mappings(Detail::Names)?;
        code.retain(|mapping| mapping.permissions.execute && mapping.permissions.read);
        // Libraries of C have all of it, programs that are linked statically too, and the kernel's
        // own page has `syscall`.
        code.sort_by_key(rank);
        let mut left = SEARCHED;
        let mut buffer = vec![0; CHUNK];
        for mapping in &code {
            let mut range = mapping.range;
            while !range.is_empty() && left > 0 && !found.is_complete() {
                let wanted = range.take(CHUNK as u64);
                // Old kernels have executable memory that nobody can read ([vsyscall]).
                let Ok(length) = process.read_memory(wanted.start(), window(&mut buffer, wanted))
                else {
                    break;
                };
                found.look(&buffer[..length], range.start());
                left = left.saturating_sub(length as u64);
                // What lies across the end of one chunk lies within the next.
                let step = if range.len() > length as u64 && length > LONGEST {
                    length - (LONGEST - 1)
                } else {
                    length.max(1)
                };
                range = range.skip(step as u64);
            }
        }
        process.check()?;
        let status = Status::of_any(pid)?;
        match (found.syscall_ret, found.sigreturn, found.syscall) {
            // With a shadow stack nothing can return to where it was not called from.
            (Some(syscall), Some((sigreturn, encoding)), _) if !status.has_shadow_stack() => {
                Ok(Self::Returning { syscall, sigreturn, encoding })
            }
            (_, _, Some(syscall)) => Ok(Self::OneWay { syscall }),
            _ => Err(ProcessError::NoInstruction { pid }),
        }
    }

    /// Finds out whether the instructions are there still.
    pub(super) fn check(self, process: &Process) -> Result<(), ProcessError> {
        let (first, second) = match self {
            Self::OneWay { syscall } => ((syscall, SYSCALL), None),
            Self::Returning { syscall, sigreturn, encoding } => {
                ((syscall, SYSCALL_RET), Some((sigreturn, SIGRETURN[encoding])))
            }
        };
        for (address, expected) in [Some(first), second].into_iter().flatten() {
            let mut code = vec![0; expected.len()];
            process.read_memory_exact(address, &mut code)?;
            if code != expected {
                return Err(ProcessError::NoInstruction { pid: process.pid() });
            }
        }
        Ok(())
    }

    /// The address of the `syscall`.
    pub(super) fn instruction(self) -> u64 {
        match self {
            Self::OneWay { syscall } | Self::Returning { syscall, .. } => syscall.get(),
        }
    }

    /// The address to return to.
    pub(super) fn way_back(self) -> Option<u64> {
        match self {
            Self::OneWay { .. } => None,
            Self::Returning { sigreturn, .. } => Some(sigreturn.get()),
        }
    }
}

fn window(buffer: &mut [u8], range: HostRange) -> &mut [u8] {
    &mut buffer[..range.len() as usize]
}

/// Where to look first.
fn rank(mapping: &Mapping) -> u8 {
    let MappingName::File { path, .. } = &mapping.name else { return 2 };
    let file = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    let is_c_library =
        [&b"libc."[..], b"libc-", b"ld-musl"].iter().any(|prefix| file.starts_with(prefix));
    u8::from(!is_c_library)
}

fn find(code: &[u8], pattern: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(offset) = code.get(from..)?.iter().position(|&byte| byte == pattern[0]) {
        if code[from + offset..].starts_with(pattern) {
            return Some(from + offset);
        }
        from += offset + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_found_wherever_they_are() {
        for (code, expected) in [
            (&[][..], None),
            (&[0x0f], None),
            (&[0x05, 0x0f], None),
            (&[0x0f, 0x05], Some(0)),
            (&[0x0f, 0x0f, 0x05], Some(1)),
            (&[0x90, 0x0f, 0x0b, 0x0f, 0x05], Some(3)),
        ] {
            assert_eq!(find(code, SYSCALL), expected, "{code:x?}");
        }
    }

    #[test]
    fn all_that_is_needed_may_come_from_different_places() {
        let mut found = Found::default();
        found.look(&[0x90, 0x0f, 0x05], HostAddress::new(0x1000));
        assert_eq!(found.syscall, Some(HostAddress::new(0x1001)));
        assert!(!found.is_complete());
        found.look(SYSCALL_RET, HostAddress::new(0x2000));
        found.look(SIGRETURN[1], HostAddress::new(0x3000));
        assert!(found.is_complete());
        assert_eq!(found.syscall, Some(HostAddress::new(0x1001)), "the first that was found");
        assert_eq!(found.sigreturn, Some((HostAddress::new(0x3000), 1)));
    }
}
