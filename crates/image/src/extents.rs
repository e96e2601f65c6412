//! Where a sparse file has data: learnt once, looked up by binary search.

use std::io;

use rustix::{
    fd::AsFd,
    fs::{SeekFrom, seek},
    io::Errno,
};

/// More extents than this are not remembered; what lies beyond them is read and not guessed.
const MAX_EXTENTS: usize = 1 << 20;

/// The data extents of a file, ascending and apart. Everything between them reads as zero.
#[derive(Debug)]
pub(crate) struct Extents {
    data: Vec<(u64, u64)>,
}

impl Extents {
    /// Everything may be data.
    pub(crate) fn unknown() -> Self {
        Self { data: vec![(0, u64::MAX)] }
    }

    /// Asks the file system, up to `length`. One that cannot tell makes all of it data.
    ///
    /// See `SEEK_DATA` in lseek(2).
    pub(crate) fn of(file: impl AsFd, length: u64) -> io::Result<Self> {
        let file = file.as_fd();
        let mut data = Vec::new();
        let mut at = 0;
        while at < length {
            let start = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No data from `at` on.
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Self::unknown()),
                Err(error) => return Err(error.into()),
            };
            if data.len() == MAX_EXTENTS {
                data.push((start, u64::MAX));
                break;
            }
            at = match seek(file, SeekFrom::Hole(start)) {
                Ok(end) if end > start => end,
                // The file shrank meanwhile, or the file system contradicts itself.
                Ok(_) | Err(Errno::NXIO) => length,
                Err(error) => return Err(error.into()),
            };
            data.push((start, at));
        }
        Ok(Self { data })
    }

    /// The first data extent that ends after `offset`.
    fn next(&self, offset: u64) -> Option<(u64, u64)> {
        let index = self.data.partition_point(|(_, end)| *end <= offset);
        self.data.get(index).copied()
    }

    /// How many of `count` pieces of `size` bytes from `offset` on are alike, and whether they
    /// are all hole. At least one; `count` is positive and the pieces do not wrap.
    pub(crate) fn run(&self, offset: u64, size: u64, count: u64) -> (bool, u64) {
        let Some((start, _)) = self.next(offset) else { return (true, count) };
        let empty = start.saturating_sub(offset) / size;
        if empty > 0 {
            return (true, empty.min(count));
        }
        // Data: goes on until a whole piece lies within a hole.
        let mut n = 0;
        while n < count {
            let at = offset + n * size;
            match self.next(at) {
                Some((start, end)) if start < at + size => {
                    n += (end.max(at + 1) - at).div_ceil(size).min(count - n);
                }
                _ => break,
            }
        }
        (false, n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs() {
        let extents = Extents { data: vec![(8, 12), (15, 16), (40, 41)] };
        // offset, count -> hole?, how many pieces of 4 bytes
        for (offset, count, want) in [
            (0, 1, (true, 1)),
            (0, 9, (true, 2)),
            (8, 9, (false, 2)),
            (12, 9, (false, 1)),
            (16, 9, (true, 6)),
            (16, 3, (true, 3)),
            (40, 9, (false, 1)),
            (44, 9, (true, 9)),
            (6, 9, (false, 3)),
            (10, 1, (false, 1)),
        ] {
            assert_eq!(extents.run(offset, 4, count), want, "at {offset}, {count} pieces");
        }
        assert_eq!(Extents::unknown().run(1 << 40, 4096, 77), (false, 77));
        assert_eq!(Extents { data: vec![] }.run(0, 4096, 77), (true, 77));
    }
}
