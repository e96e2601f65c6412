//! I/O ports: the serial port, the keyboard controller's reset, ACPI's fixed hardware. All others are
//! empty: reads are ones, and writes are ignored.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use serde::{Deserialize, Serialize};
use vm_superio::{I8042Device, Trigger};

use super::{LinuxError, codec, console::Console, layout};

const DEVICE: &str = "power management";
const VERSION: u16 = 1;

/// What the guest wants of the machine.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    PowerOff,
    Reboot,
}

/// Set when the keyboard controller is told to reset the machine.
#[derive(Debug, Default)]
struct ResetLine(AtomicBool);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.store(true, Relaxed);
        Ok(())
    }
}

/// Registers that can be written. No event ever happens, so that status is always zero.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct PowerManagement {
    enabled: u16,
    control: u16,
}

#[derive(Debug)]
pub(crate) struct Ports {
    pub(crate) console: Console,
    keyboard: Mutex<I8042Device<ResetLine>>,
    power: Mutex<PowerManagement>,
}

/// ACPI mode is on, and cannot be turned off.
const SCI_EN: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const EVENTS_END: u16 = layout::PM_EVENTS + 4;
const CONTROL_END: u16 = layout::PM_CONTROL + 2;
const SERIAL_END: u16 = layout::SERIAL + 8;
const KEYBOARD: u16 = 0x60;

impl Ports {
    pub(crate) fn new(console: Console) -> Self {
        let keyboard = Mutex::new(I8042Device::new(ResetLine::default()));
        Self { console, keyboard, power: Mutex::default() }
    }

    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::SERIAL..SERIAL_END => {
                for byte in data {
                    *byte = self.console.read((port - layout::SERIAL) as u8);
                }
            }
            KEYBOARD | layout::RESET_PORT => {
                let mut keyboard = self.keyboard.lock().unwrap_or_else(PoisonError::into_inner);
                data.fill(keyboard.read((port - KEYBOARD) as u8));
            }
            layout::PM_EVENTS..CONTROL_END => {
                let power = self.power();
                let registers = [0, power.enabled, power.control | SCI_EN];
                let bytes: Vec<u8> = registers.iter().flat_map(|word| word.to_le_bytes()).collect();
                let start = usize::from(port - layout::PM_EVENTS);
                for (to, from) in data.iter_mut().zip(&bytes[start..]) {
                    *to = *from;
                }
            }
            _ => {}
        }
    }

    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<Wish> {
        match port {
            layout::SERIAL..SERIAL_END => {
                for byte in data {
                    self.console.write((port - layout::SERIAL) as u8, *byte);
                }
            }
            KEYBOARD | layout::RESET_PORT => {
                let mut keyboard = self.keyboard.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    let Ok(()) = keyboard.write((port - KEYBOARD) as u8, *byte);
                }
                return keyboard.reset_evt().0.swap(false, Relaxed).then_some(Wish::Reboot);
            }
            layout::PM_EVENTS..EVENTS_END => {
                let mut power = self.power();
                for (at, byte) in (port..EVENTS_END).zip(data) {
                    // The two bytes before are status, in which there is nothing to clear.
                    if let Some(index @ 0..2) = at.checked_sub(layout::PM_EVENTS + 2) {
                        replace(&mut power.enabled, index, *byte);
                    }
                }
            }
            layout::PM_CONTROL..CONTROL_END => {
                let mut power = self.power();
                for (index, byte) in (port - layout::PM_CONTROL..2).zip(data) {
                    replace(&mut power.control, index, *byte);
                }
                let sleep = power.control & SLEEP_ENABLE != 0;
                let kind = power.control >> 10 & 7;
                // A bit that reads as zero: writing it is the event.
                power.control &= !SLEEP_ENABLE;
                return (sleep && kind == u16::from(layout::SLEEP_OFF)).then_some(Wish::PowerOff);
            }
            _ => {}
        }
        None
    }

    fn power(&self) -> std::sync::MutexGuard<'_, PowerManagement> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of ACPI's fixed hardware.
    pub(crate) fn save_power(&self) -> Vec<u8> {
        codec::encode(VERSION, &*self.power())
    }

    pub(crate) fn restore_power(&self, bytes: &[u8]) -> Result<(), LinuxError> {
        *self.power() = codec::decode(DEVICE, VERSION, bytes)?;
        Ok(())
    }
}

/// One byte of a register: the lower, or the upper.
fn replace(register: &mut u16, index: u16, byte: u8) {
    let shift = 8 * index;
    *register = *register & !(0xff << shift) | u16::from(byte) << shift;
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::{super::console::Interrupt, *};

    fn ports() -> Ports {
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Ports::new(Console::new(interrupt, Box::new(std::io::sink())))
    }

    #[test]
    fn wishes() {
        let ports = ports();
        let off = SLEEP_ENABLE | u16::from(layout::SLEEP_OFF) << 10;
        let other = SLEEP_ENABLE | 3 << 10;
        for (port, data, wish) in [
            (layout::PM_CONTROL, off.to_le_bytes().to_vec(), Some(Wish::PowerOff)),
            (layout::PM_CONTROL, other.to_le_bytes().to_vec(), None),
            (layout::PM_CONTROL + 1, vec![off.to_le_bytes()[1]], Some(Wish::PowerOff)),
            (layout::RESET_PORT, vec![layout::RESET_VALUE], Some(Wish::Reboot)),
            (layout::RESET_PORT, vec![0xfd], None),
            (KEYBOARD, vec![layout::RESET_VALUE], None),
            (0x80, vec![1, 2, 3, 4], None),
        ] {
            assert_eq!(ports.write(port, &data), wish, "{port:#x} {data:?}");
        }
    }

    /// Whatever port, whatever length: no panic, and what is nobody's is ones.
    #[test]
    fn every_port() {
        let ports = ports();
        for port in 0..=u16::MAX {
            for len in [1, 2, 4, 9] {
                ports.write(port, &vec![0x55; len]);
                let mut data = vec![0; len];
                ports.read(port, &mut data);
                if port >= CONTROL_END {
                    assert!(data.iter().all(|byte| *byte == 0xff), "{port:#x}");
                }
            }
        }
    }

    #[test]
    fn registers_of_power_management() {
        let ports = ports();
        ports.write(layout::PM_EVENTS, &[0xff, 0xff, 0x20, 0x01]);
        ports.write(layout::PM_CONTROL, &[0x02, 0x04]);
        let restored = self::ports();
        restored.restore_power(&ports.save_power()).unwrap();
        let mut data = [0; 6];
        restored.read(layout::PM_EVENTS, &mut data);
        assert_eq!(data, [0, 0, 0x20, 0x01, 0x03, 0x04]);
        assert!(restored.restore_power(&[]).is_err());
    }
}
