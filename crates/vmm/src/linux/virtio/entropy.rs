//! virtio-rng: the host's random numbers. Section 5.4 of the specification.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use super::{Backend, Broken, Chain};
use crate::linux::memory::DeviceMemory;

/// As much as a request gets at once. A driver that wants more asks again.
const MOST: usize = 4096;

#[derive(Debug)]
pub(crate) struct Entropy(File);

impl Entropy {
    pub(crate) const SOURCE: &str = "/dev/urandom";

    pub(crate) fn open() -> io::Result<Self> {
        File::open(Self::SOURCE).map(Self)
    }
}

impl Backend for Entropy {
    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&self, chain: Chain<'_>, memory: &DeviceMemory) -> Result<u32, Broken> {
        let mut writer = chain.writer(memory)?;
        let mut bytes = vec![0; writer.available_bytes().min(MOST)];
        (&self.0).read_exact(&mut bytes)?;
        writer.write_all(&bytes)?;
        Ok(bytes.len() as u32)
    }
}
