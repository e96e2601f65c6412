//! The machine's state: saved while it is paused, and restored into another.

use std::sync::{PoisonError, TryLockError, atomic::Ordering::SeqCst};

use super::Vm;
use crate::{
    VmConfig, VmError,
    boot::saved::NAME as BOOT,
    config::CONFIG,
    state::{DeviceBlob, MachineState, Restorer, Saver, StateError},
};

/// Of what the devices of this machine say.
const VERSION: u16 = 1;

impl Vm {
    /// Saves the state of all that is not paged memory: the vCPUs, the clock, the boot memory, and
    /// what the machine was made from. The machine is paused meanwhile, if it is not paused anyway;
    /// what is in the paged memory belongs to this state only until it is resumed.
    ///
    /// # Errors
    /// [`VmError::NotStarted`], [`VmError::MidInstruction`]; what KVM says; when a memslot has been
    /// moved.
    pub fn save(&self) -> Result<MachineState, VmError> {
        if !self.started.load(SeqCst) {
            return Err(VmError::NotStarted);
        }
        if self.moved.load(SeqCst) {
            let why = "a memslot has been moved: the state does not say where to".to_owned();
            return Err(VmError::Config { why });
        }
        struct Resume<'a>(&'a Vm);
        impl Drop for Resume<'_> {
            fn drop(&mut self) {
                self.0.resume();
            }
        }
        self.pause();
        let _resume = Resume(self);
        let saver = Saver::new(&self.kvm, &self.fd)?;
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.save(&saver)).collect::<Result<_, _>>()?;
        let device =
            |name: &str, bytes| DeviceBlob { name: name.to_owned(), version: VERSION, bytes };
        let devices = vec![device(CONFIG, self.config.encode()), device(BOOT, self.boot.save())];
        Ok(MachineState { vcpus, platform: saver.platform(&self.fd)?, devices })
    }

    /// Takes the state of another machine that was [made alike](VmConfig::of_state). Its
    /// paged memory is not touched, and may be absent. The next run goes on from there.
    ///
    /// # Errors
    /// [`VmError::Running`]; what does not fit this machine or host, by name. The machine is to be
    /// thrown away then.
    pub fn restore(&self, state: &MachineState) -> Result<(), VmError> {
        let _running = match self.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => return Err(VmError::Running),
        };
        let other = |why: String| Err(StateError::OtherMachine { why }.into());
        let config = VmConfig::of_state(state)?;
        if config.encode() != self.config.encode() {
            return other(format!("it was of {config:?}, this is {:?}", self.config));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return other(format!("{} vCPUs, not {}", state.vcpus.len(), self.vcpus.len()));
        }
        if let Some(device) =
            state.devices.iter().find(|device| ![CONFIG, BOOT].contains(&&*device.name))
        {
            return other(format!("it has a device {}", device.name));
        }
        self.boot.restore(device(state, BOOT)?)?;
        let mut restorer = Restorer::new(&self.kvm, &self.fd)?;
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            vcpu.restore(&mut restorer, state)?;
        }
        restorer.platform(&self.fd, &state.platform)?;
        self.started.store(true, SeqCst);
        self.restored.store(true, SeqCst);
        Ok(())
    }
}

/// What a device of this machine's says.
pub(crate) fn device<'a>(state: &'a MachineState, name: &str) -> Result<&'a [u8], StateError> {
    let Some(device) = state.device(name) else {
        return Err(StateError::OtherMachine { why: format!("it has no device {name}") });
    };
    if device.version != VERSION {
        let why = format!("version {}, known here is version {VERSION}", device.version);
        return Err(StateError::device(name, why));
    }
    Ok(&device.bytes)
}
