//! What an operation on a range came to.

use rustix::io::Errno;

/// What became of a request to install, protect or poison a range. All of these are part of normal
/// operation; anything else is an error.
///
/// `done` counts bytes from the start of the range that this very call finished.
#[must_use = "a retry or a partial result leaves pages absent and threads waiting"]
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// The whole range is done.
    Installed {
        /// Its length in bytes.
        bytes: u64,
    },
    /// Go on after `done` bytes (EAGAIN). With `done` at 0 most often the address space is
    /// changing: an event waits to be read, and until another thread reads it every try ends so.
    Retry {
        /// Bytes finished.
        done: u64,
    },
    /// The page after `done` bytes is already there (EEXIST). Whoever waits for it may have to be
    /// woken: this call did not.
    AlreadyPresent {
        /// Bytes finished.
        done: u64,
    },
    /// The page after `done` bytes is not registered any more, or not mapped (ENOENT). For a move
    /// also: the source has a hole there.
    RangeGone {
        /// Bytes finished.
        done: u64,
    },
    /// The process is gone (ESRCH).
    ProcessGone {
        /// Bytes finished.
        done: u64,
    },
    /// The page cache holds a poisoned page after `done` bytes (EHWPOISON).
    Poisoned {
        /// Bytes finished.
        done: u64,
    },
}

impl Outcome {
    /// Bytes from the start of the range that the call finished.
    pub const fn done(&self) -> u64 {
        match *self {
            Self::Installed { bytes } => bytes,
            Self::Retry { done }
            | Self::AlreadyPresent { done }
            | Self::RangeGone { done }
            | Self::ProcessGone { done }
            | Self::Poisoned { done } => done,
        }
    }

    /// Whether the whole range is done.
    pub const fn is_complete(&self) -> bool {
        matches!(self, Self::Installed { .. })
    }

    /// Weighs the two answers of the kernel: the ioctl's result, and the progress it wrote into the
    /// structure (bytes, or a negative errno, or still 0 when it gave up early).
    ///
    /// Progress wins: after part of a range, whatever stopped the rest is reported by the next
    /// call, which starts there.
    pub(crate) fn classify(
        len: u64,
        progress: i64,
        result: Result<(), Errno>,
    ) -> Result<Self, Errno> {
        let done = u64::try_from(progress).unwrap_or(0);
        let errno = match result {
            Ok(()) if progress >= 0 => {
                return Ok(if done >= len {
                    Self::Installed { bytes: done }
                } else {
                    Self::Retry { done }
                });
            }
            Ok(()) => i32::try_from(progress.unsigned_abs())
                .map_or(Errno::OVERFLOW, Errno::from_raw_os_error),
            Err(errno) => errno,
        };
        Ok(match errno {
            Errno::AGAIN => Self::Retry { done },
            Errno::EXIST => Self::AlreadyPresent { done },
            Errno::NOENT => Self::RangeGone { done },
            Errno::SRCH => Self::ProcessGone { done },
            Errno::HWPOISON => Self::Poisoned { done },
            _ if done > 0 => Self::Retry { done },
            other => return Err(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_answers_count() {
        let len = 0x4000;
        let negative = |errno: Errno| -i64::from(errno.raw_os_error());
        let cases = [
            (0x4000, Ok(()), Ok(Outcome::Installed { bytes: 0x4000 })),
            (0x1000, Ok(()), Ok(Outcome::Retry { done: 0x1000 })),
            (negative(Errno::EXIST), Ok(()), Ok(Outcome::AlreadyPresent { done: 0 })),
            (0x1000, Err(Errno::AGAIN), Ok(Outcome::Retry { done: 0x1000 })),
            (0, Err(Errno::AGAIN), Ok(Outcome::Retry { done: 0 })),
            (negative(Errno::AGAIN), Err(Errno::AGAIN), Ok(Outcome::Retry { done: 0 })),
            (negative(Errno::EXIST), Err(Errno::EXIST), Ok(Outcome::AlreadyPresent { done: 0 })),
            (0x2000, Err(Errno::EXIST), Ok(Outcome::AlreadyPresent { done: 0x2000 })),
            (negative(Errno::NOENT), Err(Errno::NOENT), Ok(Outcome::RangeGone { done: 0 })),
            (0, Err(Errno::SRCH), Ok(Outcome::ProcessGone { done: 0 })),
            (negative(Errno::HWPOISON), Err(Errno::HWPOISON), Ok(Outcome::Poisoned { done: 0 })),
            (negative(Errno::NOMEM), Err(Errno::NOMEM), Err(Errno::NOMEM)),
            (0x3000, Err(Errno::NOMEM), Ok(Outcome::Retry { done: 0x3000 })),
            (i64::MIN, Ok(()), Err(Errno::OVERFLOW)),
        ];
        for (progress, result, expected) in cases {
            assert_eq!(Outcome::classify(len, progress, result), expected, "{progress} {result:?}");
            if let Ok(outcome) = expected {
                assert_eq!(outcome.done(), u64::try_from(progress).unwrap_or(0));
            }
        }
    }
}
