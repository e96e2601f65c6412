//! The machine's devices, and who answers which port or address.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use kvm_ioctls::VmFd;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    ConsoleOut, Disk, LinuxError,
    acpi::Place,
    console::{Console, Interrupt},
    layout,
    memory::DeviceMemory,
    ports::{Ports, Wish},
    virtio::{Backend, Block, Entropy, Transport},
};
use crate::{
    VmError,
    state::{DeviceBlob, MachineState},
};

/// Of every blob. What is in it has a version of its own.
const BLOB_VERSION: u16 = 1;
const CONSOLE: &str = "serial";
const POWER: &str = "power";

#[derive(Debug)]
pub(crate) struct Devices {
    ports: Ports,
    console_interrupt: EventFd,
    /// Those of virtio, each with its place.
    virtio: Vec<(Place, Transport)>,
    /// Whether any of them has requests that nobody is at.
    waiting: AtomicBool,
}

/// A new event that raises this input of the interrupt controllers.
fn interrupt(vm: &VmFd, input: u32) -> Result<EventFd, LinuxError> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| VmError::Host { what: "an event for interrupts", source })?;
    vm.register_irqfd(&event, input).map_err(VmError::kvm(format!("KVM_IRQFD {input}")))?;
    Ok(event)
}

fn another(event: &EventFd) -> Result<EventFd, LinuxError> {
    let cloned = event.try_clone();
    Ok(cloned.map_err(|source| VmError::Host { what: "duplicating an event", source })?)
}

impl Devices {
    /// Those of every machine, and these disks.
    pub(crate) fn new(
        vm: &VmFd,
        memory: &DeviceMemory,
        disks: &[Disk],
        out: ConsoleOut,
    ) -> Result<Self, LinuxError> {
        let console_interrupt = interrupt(vm, layout::SERIAL_INTERRUPT)?;
        let console = Console::new(Interrupt::new(another(&console_interrupt)?), out);
        let source = Entropy::open()
            .map_err(LinuxError::file("opening", std::path::Path::new(Entropy::SOURCE)))?;
        let mut backends: Vec<Box<dyn Backend>> = vec![Box::new(source)];
        for disk in disks {
            let opened = Block::open(disk);
            let opened = opened.map_err(LinuxError::file("opening the disk", &disk.path))?;
            backends.push(Box::new(opened));
        }
        let mut places = Places::new()?;
        let virtio = (0..).zip(backends).map(|(number, backend)| {
            let place = places.next(number)?;
            let event = Interrupt::new(interrupt(vm, place.interrupt)?);
            Ok((place, Transport::new(backend, memory.clone(), event)))
        });
        let virtio = virtio.collect::<Result<_, LinuxError>>()?;
        let ports = Ports::new(console);
        Ok(Self { ports, console_interrupt, virtio, waiting: AtomicBool::new(false) })
    }

    pub(crate) fn console(&self) -> &Console {
        &self.ports.console
    }

    /// Where those are of which ACPI tells.
    pub(crate) fn places(&self) -> Vec<Place> {
        self.virtio.iter().map(|(place, _)| *place).collect()
    }

    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port, data);
    }

    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> Option<Wish> {
        self.ports.write(port, data)
    }

    fn at(&self, address: u64) -> Option<(&Transport, u64)> {
        self.virtio.iter().find_map(|(place, device)| {
            let offset = address.checked_sub(place.base)?;
            (offset < layout::DEVICE_BYTES).then_some((device, offset))
        })
    }

    /// Where nobody is, all bits read as ones.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.at(address)
            && device.write(offset, data)
            && device.work()
        {
            self.waiting.store(true, SeqCst);
        }
    }

    /// Does requests that are left, at most a queue's worth of each device. To be called before each
    /// entry into the guest, until it says that nothing is left.
    pub(crate) fn work(&self) -> bool {
        if !self.waiting.swap(false, SeqCst) {
            return false;
        }
        let mut more = false;
        for (_, device) in &self.virtio {
            more |= device.work();
        }
        if more {
            self.waiting.store(true, SeqCst);
        }
        more
    }

    fn virtio_name(number: usize) -> String {
        format!("virtio{number}")
    }

    /// The states of all, while no vCPU runs.
    pub(crate) fn save(&self) -> Vec<DeviceBlob> {
        let blob = |name: String, bytes| DeviceBlob { name, version: BLOB_VERSION, bytes };
        let mut blobs = vec![
            blob(CONSOLE.to_owned(), self.console().save()),
            blob(POWER.to_owned(), self.ports.save_power()),
        ];
        let devices = self.virtio.iter().enumerate();
        blobs.extend(
            devices.map(|(number, (_, device))| blob(Self::virtio_name(number), device.save())),
        );
        blobs
    }

    /// Restores all, after the interrupt controllers, in which it may raise interrupts.
    pub(crate) fn restore(&self, state: &MachineState) -> Result<(), LinuxError> {
        let wanted = 2 + self.virtio.len();
        if state.devices.len() != wanted {
            let why = format!("{} of them, and the machine has {wanted}", state.devices.len());
            return Err(LinuxError::state("the devices", why));
        }
        let find = |name: &str| match state.device(name) {
            Some(blob) if blob.version == BLOB_VERSION => Ok(&blob.bytes[..]),
            Some(blob) => {
                let why = format!("{name} has version {}", blob.version);
                Err(LinuxError::state("the devices", why))
            }
            None => Err(LinuxError::state("the devices", format!("{name} is missing"))),
        };
        self.console().restore(find(CONSOLE)?, another(&self.console_interrupt)?)?;
        self.ports.restore_power(find(POWER)?)?;
        for (number, (_, device)) in self.virtio.iter().enumerate() {
            device.restore(find(&Self::virtio_name(number))?)?;
            if device.has_work() {
                self.waiting.store(true, SeqCst);
            }
        }
        Ok(())
    }
}

/// Addresses and interrupts, given out one after the other: in the same order always, since a
/// restored machine has to have the same.
struct Places {
    addresses: AddressAllocator,
    interrupts: IdAllocator,
}

impl Places {
    fn new() -> Result<Self, LinuxError> {
        let failed = |source| LinuxError::Resources { device: 0, source };
        let bytes = layout::MAX_DEVICES * layout::DEVICE_BYTES;
        Ok(Self {
            addresses: AddressAllocator::new(layout::DEVICES, bytes).map_err(failed)?,
            interrupts: IdAllocator::new(layout::FIRST_INTERRUPT, layout::LAST_INTERRUPT)
                .map_err(failed)?,
        })
    }

    fn next(&mut self, device: usize) -> Result<Place, LinuxError> {
        let failed = |source| LinuxError::Resources { device, source };
        let bytes = layout::DEVICE_BYTES;
        let range = self.addresses.allocate(bytes, bytes, AllocPolicy::FirstMatch);
        let interrupt = self.interrupts.allocate_id().map_err(failed)?;
        Ok(Place { base: range.map_err(failed)?.start(), interrupt })
    }
}
