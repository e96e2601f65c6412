//! Virtio devices. Source: the Virtual I/O Device specification 1.2.

mod block;
mod entropy;
mod mmio;

use std::{fmt, io};

use virtio_queue::DescriptorChain;

use super::memory::DeviceMemory;

pub(crate) use block::Block;
pub use block::Disk;
pub(crate) use entropy::Entropy;
pub(crate) use mmio::Transport;

/// What the driver put into a queue as one.
pub(crate) type Chain<'m> = DescriptorChain<&'m DeviceMemory>;

/// Why a device cannot go on: what is in its queue is no request. The driver has to reset it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("a queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a request's memory: {0}")]
    Memory(#[from] io::Error),
    #[error("{0}")]
    Request(&'static str),
}

/// What makes a device this one and no other.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    /// In messages.
    fn name(&self) -> &'static str;

    /// Section 5: the number of its kind.
    fn id(&self) -> u32;

    /// What it offers beyond what every device of this transport does.
    fn features(&self) -> u64;

    /// The most descriptors of each of its queues: powers of two.
    fn queues(&self) -> &'static [u16];

    /// All of its configuration.
    fn config(&self) -> Vec<u8>;

    /// Does what one request asks for. Returns how many bytes it wrote into the guest's memory.
    fn serve(&self, chain: Chain<'_>, memory: &DeviceMemory) -> Result<u32, Broken>;
}
