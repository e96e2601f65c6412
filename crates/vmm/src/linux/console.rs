//! The serial port, which is the guest's console.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_superio::{
    Serial, SerialState, Trigger,
    serial::{Error as SerialError, NoEvents},
};
use vmm_sys_util::eventfd::EventFd;

use super::{LinuxError, codec};

const DEVICE: &str = "the serial port";
const VERSION: u16 = 1;
/// What waits for the guest to read it, at most.
const INPUT_MAX: usize = 1 << 16;

/// Where the guest's output goes.
pub type ConsoleOut = Box<dyn Write + Send>;

/// An interrupt by irqfd.
#[derive(Debug)]
pub(crate) struct Interrupt(EventFd);

impl Interrupt {
    pub(crate) fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Port = Serial<Interrupt, NoEvents, Vec<u8>>;

struct Inner {
    port: Port,
    /// What the port's own buffer has no room for yet.
    input: VecDeque<u8>,
}

/// The serial port with its two ends.
pub(crate) struct Console {
    inner: Mutex<Inner>,
    /// The lock is the stream's own: it keeps the bytes of several vCPUs in their order, and nobody
    /// who reads the port or gives it input waits for it.
    out: Mutex<ConsoleOut>,
}

#[derive(Serialize, Deserialize)]
struct State {
    divisor: [u8; 2],
    interrupts: [u8; 2],
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
    received: Vec<u8>,
    waiting: Vec<u8>,
}

fn unpoisoned<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    pub(crate) fn new(interrupt: Interrupt, out: ConsoleOut) -> Self {
        let inner = Inner { port: Serial::new(interrupt, Vec::new()), input: VecDeque::new() };
        Self { inner: Mutex::new(inner), out: Mutex::new(out) }
    }

    pub(crate) fn read(&self, offset: u8) -> u8 {
        let mut inner = unpoisoned(&self.inner);
        let byte = inner.port.read(offset);
        inner.feed();
        byte
    }

    pub(crate) fn write(&self, offset: u8, value: u8) {
        let mut out = unpoisoned(&self.out);
        let written = {
            let mut inner = unpoisoned(&self.inner);
            if let Err(error) = inner.port.write(offset, value) {
                tracing::error!("{DEVICE}: {error}");
            }
            inner.feed();
            std::mem::take(inner.port.writer_mut())
        };
        if written.is_empty() {
            return;
        }
        // To a guest a console that nobody reads is one like any other.
        if let Err(error) = out.write_all(&written).and_then(|()| out.flush()) {
            tracing::warn!("output of the guest's console is lost: {error}");
        }
    }

    /// Types these bytes. Returns how many there was room for.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        let mut inner = unpoisoned(&self.inner);
        let taken = bytes.len().min(INPUT_MAX - inner.input.len());
        inner.input.extend(&bytes[..taken]);
        inner.feed();
        taken
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        let inner = unpoisoned(&self.inner);
        let port = inner.port.state();
        codec::encode(
            VERSION,
            &State {
                divisor: [port.baud_divisor_low, port.baud_divisor_high],
                interrupts: [port.interrupt_enable, port.interrupt_identification],
                line: [port.line_control, port.line_status],
                modem: [port.modem_control, port.modem_status],
                scratch: port.scratch,
                received: port.in_buffer,
                waiting: inner.input.iter().copied().collect(),
            },
        )
    }

    /// Raises the port's interrupt again if it had reason to: what was raised when the state was saved
    /// may not have reached the interrupt controller.
    pub(crate) fn restore(&self, bytes: &[u8], interrupt: EventFd) -> Result<(), LinuxError> {
        let state: State = codec::decode(DEVICE, VERSION, bytes)?;
        if state.waiting.len() > INPUT_MAX {
            return Err(LinuxError::state(DEVICE, "more input than it can hold"));
        }
        let port = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupts[0],
            interrupt_identification: state.interrupts[1],
            line_control: state.line[0],
            line_status: state.line[1],
            modem_control: state.modem[0],
            modem_status: state.modem[1],
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let port = Serial::from_state(&port, Interrupt(interrupt), NoEvents, Vec::new())
            .map_err(|error| LinuxError::state(DEVICE, error.to_string()))?;
        let mut inner = unpoisoned(&self.inner);
        *inner = Inner { port, input: state.waiting.into() };
        inner.feed();
        Ok(())
    }
}

impl Inner {
    /// Gives the port what it has room for.
    fn feed(&mut self) {
        while !self.input.is_empty() && self.port.fifo_capacity() > 0 {
            let (front, _) = self.input.as_slices();
            match self.port.enqueue_raw_bytes(front) {
                // While the port is looped back nothing comes in from outside: it stays here.
                Ok(0) | Err(SerialError::FullFifo) => return,
                Ok(taken) => drop(self.input.drain(..taken)),
                Err(error) => {
                    tracing::error!("{DEVICE}: {error}");
                    return;
                }
            }
        }
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Sender(mpsc::Sender<u8>);

    impl Write for Sender {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for byte in bytes {
                self.0.send(*byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    fn console() -> (Console, mpsc::Receiver<u8>) {
        let (sender, receiver) = mpsc::channel();
        (Console::new(Interrupt::new(event()), Box::new(Sender(sender))), receiver)
    }

    #[test]
    fn input_beyond_the_buffer_comes_as_the_guest_reads() {
        let (console, output) = console();
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(console.input(&typed), 200);
        console.write(0, b'x');
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"x");
        // Half of it before and half after the state went to another one.
        let read = |console: &Console, count: usize| -> Vec<u8> {
            (0..count).map(|_| console.read(0)).collect()
        };
        assert_eq!(read(&console, 100), typed[..100]);
        let (other, _output) = self::console();
        other.restore(&console.save(), event()).unwrap();
        assert_eq!(other.save(), console.save());
        assert_eq!(read(&other, 100), typed[100..]);
        assert_eq!(other.read(5) & 1, 0, "nothing is left");
        // The port has 64 bytes of what is left, and the rest waits.
        assert_eq!(console.input(&vec![0; 2 * INPUT_MAX]), INPUT_MAX - (100 - 64));
    }

    #[test]
    fn a_restored_port_interrupts_again() {
        let (console, _output) = console();
        console.write(1, 1); // of received bytes
        assert_eq!(console.input(b"a"), 1);
        let (other, _output) = self::console();
        let interrupt = event();
        other.restore(&console.save(), interrupt.try_clone().unwrap()).unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let (console, _output) = console();
        let good = console.save();
        for cut in 0..good.len() {
            assert!(console.restore(&good[..cut], event()).is_err());
        }
        // What is a state, however strange, is one that the guest can live with.
        for at in 2..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if console.restore(&bytes, event()).is_ok() {
                    assert_eq!(console.input(b"x"), 1);
                    for offset in 0..8 {
                        console.read(offset);
                    }
                }
            }
        }
        let huge = State {
            divisor: [0; 2],
            interrupts: [0; 2],
            line: [0; 2],
            modem: [0; 2],
            scratch: 0,
            received: vec![0; 65],
            waiting: vec![],
        };
        assert!(console.restore(&codec::encode(VERSION, &huge), event()).is_err());
        let huge = State { received: vec![], waiting: vec![0; INPUT_MAX + 1], ..huge };
        assert!(console.restore(&codec::encode(VERSION, &huge), event()).is_err());
    }
}
