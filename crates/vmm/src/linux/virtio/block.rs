//! virtio-blk: a file as a disk. Section 5.2 of the specification.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{Backend, Broken, Chain};
use crate::linux::memory::DeviceMemory;

const SECTOR: u64 = 512;
const QUEUE: u16 = 128;
/// A request is copied in pieces of this size.
const PIECE: usize = 64 << 10;
/// No driver asks for as much at once; one that does only keeps its own processor busy.
const LONGEST: u64 = 32 << 20;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const ID_BYTES: usize = 20;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A file that is a disk to the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// The file. Its length, in whole sectors of 512 bytes, is the disk's.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

#[derive(Debug)]
pub(crate) struct Block {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Block {
    pub(crate) fn open(disk: &Disk) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!disk.read_only).open(&disk.path)?;
        let sectors = length(&file, &disk.path)? / SECTOR;
        Ok(Self { file, sectors, read_only: disk.read_only })
    }

    /// The offset in the file of so many bytes from this sector on, if they are on the disk.
    fn place(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && bytes <= LONGEST && end <= self.sectors)
            .then(|| sector * SECTOR)
    }

    /// What the file answered, as the driver is told.
    fn status(&self, what: &str, result: io::Result<()>) -> u8 {
        match result {
            Ok(()) => OK,
            Err(error) => {
                tracing::warn!("{}: {what}: {error}", self.name());
                IO_ERROR
            }
        }
    }
}

/// That of a block device is where its end is, not in its metadata.
fn length(mut file: &File, path: &Path) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};

    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::other(format!("{} is a directory", path.display())));
    }
    file.seek(SeekFrom::End(0))
}

impl Backend for Block {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let read_only = if self.read_only { FEATURE_READ_ONLY } else { 0 };
        FEATURE_SEG_MAX | FEATURE_FLUSH | read_only
    }

    fn queues(&self) -> &'static [u16] {
        &[QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        // All but a header and a status.
        let segments = u32::from(QUEUE - 2);
        // Capacity, the largest segment (not offered), the number of segments.
        [&self.sectors.to_le_bytes()[..], &[0; 4], &segments.to_le_bytes()].concat()
    }

    fn serve(&self, chain: Chain<'_>, memory: &DeviceMemory) -> Result<u32, Broken> {
        let mut reader = chain.clone().reader(memory)?;
        let mut writer = chain.writer(memory)?;
        let (kind, _reserved): (u32, u32) = (reader.read_obj()?, reader.read_obj()?);
        let sector: u64 = reader.read_obj()?;
        let Some(answer) = writer.available_bytes().checked_sub(1) else {
            return Err(Broken::Request("a request has no room for its status"));
        };
        let mut status_writer = writer.split_at(answer)?;
        let mut piece = Vec::new();
        let status = match kind {
            TYPE_IN => match self.place(sector, answer as u64) {
                None => IO_ERROR,
                Some(mut offset) => {
                    let mut result = Ok(());
                    let mut left = answer;
                    while left > 0 && result.is_ok() {
                        piece.resize(left.min(PIECE), 0);
                        result = self.file.read_exact_at(&mut piece, offset);
                        if result.is_ok() {
                            writer.write_all(&piece)?;
                            offset += piece.len() as u64;
                            left -= piece.len();
                        }
                    }
                    self.status("reading", result)
                }
            },
            TYPE_OUT if self.read_only => IO_ERROR,
            TYPE_OUT => match self.place(sector, reader.available_bytes() as u64) {
                None => IO_ERROR,
                Some(mut offset) => {
                    let mut result = Ok(());
                    while reader.available_bytes() > 0 && result.is_ok() {
                        piece.resize(reader.available_bytes().min(PIECE), 0);
                        reader.read_exact(&mut piece)?;
                        result = self.file.write_all_at(&piece, offset);
                        offset += piece.len() as u64;
                    }
                    self.status("writing", result)
                }
            },
            TYPE_FLUSH => self.status("flushing", self.file.sync_data()),
            TYPE_GET_ID => {
                let mut id = [0; ID_BYTES];
                id[..9].copy_from_slice(b"pageferry");
                writer.write_all(&id[..answer.min(ID_BYTES)])?;
                OK
            }
            _ => UNSUPPORTED,
        };
        status_writer.write_all(&[status])?;
        Ok(writer.bytes_written() as u32 + 1)
    }
}
