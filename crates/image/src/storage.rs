//! What an image is read from: anything that has a length and can be read anywhere.

use std::{fmt, fs::File, io, sync::Arc};

use rustix::{fs::FileType, io::Errno};

/// Bytes that can be read at any place, by several threads at once: a file, memory, a range of
/// an object in a store.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Length in bytes.
    ///
    /// # Errors
    /// When it cannot be learnt.
    fn length(&self) -> io::Result<u64>;

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// When they cannot be read; `UnexpectedEof` if there are not so many. Part of `bytes` may
    /// have been written then.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// pread(2) until `bytes` is full; allocates nothing.
pub(crate) fn pread(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(file, &mut bytes[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Storage for File {
    fn length(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(self)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        }
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        pread(self, offset, bytes)
    }
}

impl Storage for Vec<u8> {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let piece = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..bytes.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(piece);
        Ok(())
    }
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, bytes)
    }
}
