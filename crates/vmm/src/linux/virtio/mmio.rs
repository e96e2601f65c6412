//! The registers of a device, and its queues: section 4.2 of the specification, version 2.
//!
//! Requests are done by the vCPU's thread that tells of them. While one thread does those of a queue,
//! it has taken the queue out of the registers, so that no lock is held across the file's or the
//! memory's slowness; others who tell of more leave a note, which it finds before it goes.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_superio::Trigger;

use super::{Backend, Broken};
use crate::linux::{LinuxError, codec, console::Interrupt, memory::DeviceMemory};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"pgfy");
const STATE_VERSION: u16 = 1;
/// Where the device's own configuration begins.
const CONFIG: u64 = 0x100;

/// The device is no legacy one.
const FEATURE_VERSION_1: u64 = 1 << 32;

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 0x40;
const STATUS_ALL: u32 = 0xcf;

const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// One device: its registers, and what is behind them.
#[derive(Debug)]
pub(crate) struct Transport {
    backend: Box<dyn Backend>,
    memory: DeviceMemory,
    registers: Mutex<Registers>,
    /// Told when a queue that was taken is back.
    returned: Condvar,
    interrupt: Interrupt,
}

#[derive(Debug, Default)]
struct Registers {
    offered_word: u32,
    accepted_word: u32,
    accepted: u64,
    queue: u32,
    status: u32,
    interrupts: u32,
    generation: u32,
    /// `None`: somebody has taken it, to do what is in it.
    queues: Vec<Option<Queue>>,
    /// A bit for each queue that has to be looked at.
    pending: u32,
}

/// The registers in a form that can be stored.
#[derive(Serialize, Deserialize)]
struct State {
    device: u32,
    offered_word: u32,
    accepted_word: u32,
    accepted: u64,
    queue: u32,
    status: u32,
    interrupts: u32,
    generation: u32,
    pending: u32,
    queues: Vec<StoredQueue>,
}

#[derive(Serialize, Deserialize)]
struct StoredQueue {
    next: [u16; 2],
    size: u16,
    ready: bool,
    rings: [u64; 3],
}

impl Registers {
    fn new(backend: &dyn Backend) -> Self {
        let queue = |max: &u16| Some(Queue::new(*max).expect("its sizes are powers of two"));
        Self { queues: backend.queues().iter().map(queue).collect(), ..Self::default() }
    }

    /// The chosen queue, if there is such a one and nobody has taken it.
    fn chosen(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue as usize)?.as_mut()
    }

    fn is_running(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    fn is_busy(&self) -> bool {
        self.queues.iter().any(Option::is_none)
    }

    /// Takes a queue that has to be looked at.
    fn take(&mut self) -> Option<(usize, Queue)> {
        if !self.is_running() {
            self.pending = 0;
            return None;
        }
        let index = (0..self.queues.len())
            .find(|index| self.pending & 1 << index != 0 && self.queues[*index].is_some())?;
        self.pending &= !(1 << index);
        let queue = self.queues[index].take()?;
        Some((index, queue))
    }
}

impl Transport {
    pub(crate) fn new(
        backend: Box<dyn Backend>,
        memory: DeviceMemory,
        interrupt: Interrupt,
    ) -> Self {
        let registers = Mutex::new(Registers::new(&*backend));
        Self { backend, memory, registers, returned: Condvar::new(), interrupt }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        self.backend.features() | FEATURE_VERSION_1
    }

    /// Reads registers. The specification allows words only, but for the configuration.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = self.backend.config();
            for (to, from) in data.iter_mut().zip(config.iter().skip(offset as usize)) {
                *to = *from;
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let mut registers = self.registers();
        match offset {
            0x00 => MAGIC,
            0x04 => TRANSPORT_VERSION,
            0x08 => self.backend.id(),
            0x0c => VENDOR,
            0x10 => word(self.offered(), registers.offered_word),
            0x34 => registers.chosen().map_or(0, |queue| queue.max_size().into()),
            0x44 => registers.chosen().is_some_and(|queue| queue.ready()).into(),
            0x60 => registers.interrupts,
            0x70 => registers.status,
            // There is no shared memory: of any part of it the length is all ones.
            0xb0 | 0xb4 => u32::MAX,
            0xfc => registers.generation,
            _ => 0,
        }
    }

    /// Writes a register. True if there may be requests now: see [`work`](Self::work).
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> bool {
        // None of these devices has configuration that could be written.
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return false };
        let mut registers = self.registers();
        match offset {
            0x14 => registers.offered_word = value,
            0x20 if registers.status & STATUS_FEATURES_OK == 0 => {
                let shift = 32 * registers.accepted_word;
                if shift < u64::BITS {
                    let mask = u64::from(u32::MAX) << shift;
                    registers.accepted = registers.accepted & !mask | u64::from(value) << shift;
                }
            }
            0x24 => registers.accepted_word = value.min(2),
            0x30 => registers.queue = value,
            0x50 if (value as usize) < registers.queues.len() && registers.is_running() => {
                registers.pending |= 1 << value;
                return true;
            }
            0x64 => registers.interrupts &= !value,
            0x70 if value == 0 => self.reset(registers),
            0x70 => self.set_status(&mut registers, value),
            0x38 | 0x44 | 0x80..=0xa4 => {
                // A ring may not be changed while the device uses it.
                let free = !registers.is_running();
                if let Some(queue) = registers.chosen().filter(|_| free) {
                    write_queue(queue, offset, value);
                }
            }
            _ => {}
        }
        false
    }

    /// Waits until nobody works for the device: after it, its memory is the driver's again.
    fn reset(&self, mut registers: MutexGuard<'_, Registers>) {
        registers.status = 0;
        while registers.is_busy() {
            registers = self.returned.wait(registers).unwrap_or_else(PoisonError::into_inner);
        }
        let generation = registers.generation;
        *registers = Registers { generation, ..Registers::new(&*self.backend) };
    }

    fn set_status(&self, registers: &mut Registers, wanted: u32) {
        let mut status = wanted & STATUS_ALL & !STATUS_NEEDS_RESET;
        let known = registers.accepted & !self.offered() == 0;
        if !known || registers.accepted & FEATURE_VERSION_1 == 0 {
            // The driver reads it back, and finds that the device does not agree.
            status &= !(STATUS_FEATURES_OK | STATUS_DRIVER_OK);
        }
        registers.status = registers.status & STATUS_NEEDS_RESET | status;
    }

    /// Does requests: of each queue at most as many as it can hold at once. True if there may be more.
    pub(crate) fn work(&self) -> bool {
        let mut more = 0;
        loop {
            let mut registers = self.registers();
            let Some((index, mut queue)) = registers.take() else {
                registers.pending |= if registers.is_running() { more } else { 0 };
                // Those that others have taken are theirs to look at again.
                return more != 0;
            };
            drop(registers);
            let done = self.empty(&mut queue);
            let mut registers = self.registers();
            registers.queues[index] = Some(queue);
            self.returned.notify_all();
            let interrupt = match done {
                Ok(Done { any, more: left }) => {
                    more |= u32::from(left) << index;
                    if any { INTERRUPT_QUEUE } else { 0 }
                }
                Err(error) => {
                    tracing::warn!("{} wants to be reset: {error}", self.backend.name());
                    registers.status |= STATUS_NEEDS_RESET;
                    INTERRUPT_CONFIG
                }
            };
            // Nobody waits for an interrupt of a device that is being reset.
            let interrupt = if registers.status == 0 { 0 } else { interrupt };
            registers.interrupts |= interrupt;
            drop(registers);
            if interrupt != 0 {
                self.raise();
            }
        }
    }

    fn raise(&self) {
        if let Err(error) = self.interrupt.trigger() {
            tracing::error!("the interrupt of {}: {error}", self.backend.name());
        }
    }

    fn empty(&self, queue: &mut Queue) -> Result<Done, Broken> {
        if !queue.is_valid(&self.memory) {
            return Err(Broken::Request("a queue lies outside of memory, or is not set up"));
        }
        for count in 0..queue.size() {
            let Some(chain) = queue.iter(&self.memory)?.next() else {
                return Ok(Done { any: count > 0, more: false });
            };
            let head = chain.head_index();
            let written = self.backend.serve(chain, &self.memory)?;
            queue.add_used(&self.memory, head, written)?;
        }
        Ok(Done { any: true, more: true })
    }

    /// The registers, while no vCPU runs.
    pub(crate) fn save(&self) -> Vec<u8> {
        let registers = self.registers();
        let queues = registers.queues.iter().flatten().map(|queue| {
            let QueueState { next_avail, next_used, size, ready, .. } = queue.state();
            let rings = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
            StoredQueue { next: [next_avail, next_used], size, ready, rings }
        });
        let state = State {
            device: self.backend.id(),
            offered_word: registers.offered_word,
            accepted_word: registers.accepted_word,
            accepted: registers.accepted,
            queue: registers.queue,
            status: registers.status,
            interrupts: registers.interrupts,
            generation: registers.generation,
            pending: registers.pending,
            queues: queues.collect(),
        };
        codec::encode(STATE_VERSION, &state)
    }

    /// Sets the registers, before any vCPU runs. An interrupt that the driver has not acknowledged is
    /// raised again, since it may not have reached the interrupt controller before that was saved.
    pub(crate) fn restore(&self, bytes: &[u8]) -> Result<(), LinuxError> {
        let name = self.backend.name();
        let state: State = codec::decode(name, STATE_VERSION, bytes)?;
        let refuse = |why: &str| Err(LinuxError::state(name, why));
        if state.device != self.backend.id() {
            return refuse("it is another device's");
        }
        if state.queues.len() != self.backend.queues().len() {
            return refuse("another number of queues");
        }
        if state.accepted & !self.offered() != 0 {
            return refuse("features that it does not have here");
        }
        let last = state.queues.len() as u32;
        if state.pending >> last != 0 || state.status & !STATUS_ALL != 0 || state.accepted_word > 2
        {
            return refuse("registers that it cannot have");
        }
        let queues = state.queues.iter().zip(self.backend.queues()).map(|(queue, max_size)| {
            let stored = QueueState {
                max_size: *max_size,
                next_avail: queue.next[0],
                next_used: queue.next[1],
                event_idx_enabled: false,
                size: queue.size,
                ready: queue.ready,
                desc_table: queue.rings[0],
                avail_ring: queue.rings[1],
                used_ring: queue.rings[2],
            };
            Queue::try_from(stored).map(Some)
        });
        let queues = queues
            .collect::<Result<_, _>>()
            .map_err(|error| LinuxError::state(name, error.to_string()))?;
        let interrupts = state.interrupts;
        *self.registers() = Registers {
            offered_word: state.offered_word,
            accepted_word: state.accepted_word,
            accepted: state.accepted,
            queue: state.queue,
            status: state.status,
            interrupts,
            generation: state.generation,
            queues,
            pending: state.pending,
        };
        if interrupts != 0 {
            self.raise();
        }
        Ok(())
    }

    /// Whether there may be requests that nobody does yet: of a device that was just restored.
    pub(crate) fn has_work(&self) -> bool {
        self.registers().pending != 0
    }
}

struct Done {
    any: bool,
    more: bool,
}

fn word(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// What makes no sense the queue itself refuses.
fn write_queue(queue: &mut Queue, offset: u64, value: u32) {
    match offset {
        0x38 => queue.set_size(value as u16),
        0x44 => queue.set_ready(value == 1),
        0x80 => queue.set_desc_table_address(Some(value), None),
        0x84 => queue.set_desc_table_address(None, Some(value)),
        0x90 => queue.set_avail_ring_address(Some(value), None),
        0x94 => queue.set_avail_ring_address(None, Some(value)),
        0xa0 => queue.set_used_ring_address(Some(value), None),
        0xa4 => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
