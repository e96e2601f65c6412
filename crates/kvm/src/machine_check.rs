//! Memory errors as machine checks. Source: Intel SDM, volume 3, "Machine-Check Architecture";
//! `Documentation/virt/kvm/api.rst`.

use kvm_bindings::kvm_x86_mce;
use kvm_ioctls::VcpuFd;
use pageferry_memory::GuestAddress;

use crate::{KvmError, sys};

const IA32_MCG_CAP: u32 = 0x179;
const IA32_MCG_CTL: u32 = 0x17b;
const IA32_MCG_EXT_CTL: u32 = 0x4d0;
/// Of bank 0; each has four registers.
const IA32_MC0_CTL: u32 = 0x400;

const CAP_BANKS: u64 = 0xff;
const CAP_CTL_P: u64 = 1 << 8;
/// Software error recovery.
const CAP_SER_P: u64 = 1 << 24;
/// Local machine checks.
const CAP_LMCE_P: u64 = 1 << 27;

const STATUS_RIPV: u64 = 1 << 0;
const STATUS_EIPV: u64 = 1 << 1;
const STATUS_MCIP: u64 = 1 << 2;
const STATUS_LMCE_S: u64 = 1 << 3;

const VAL: u64 = 1 << 63;
const UC: u64 = 1 << 61;
const EN: u64 = 1 << 60;
const MISCV: u64 = 1 << 59;
const ADDRV: u64 = 1 << 58;
const S: u64 = 1 << 56;
const AR: u64 = 1 << 55;
/// A data load that missed in the caches.
const DATA_LOAD: u64 = 0x134;
/// The address is a physical one, and means the page.
const PHYSICAL_PAGE: u64 = 2 << 6 | 12;

/// The bank of the data cache.
const BANK: u8 = 1;
const BANKS: u64 = 10;

/// Gives the vCPU banks that can report an error to be recovered from, unless it has them.
pub(crate) fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let has = sys::msr(vcpu, IA32_MCG_CAP).unwrap_or(0);
    if has & CAP_SER_P != 0 && has & CAP_BANKS > u64::from(BANK) {
        return Ok(());
    }
    let capability = BANKS | CAP_CTL_P | CAP_SER_P;
    sys::setup_mce(vcpu, capability).map_err(KvmError::ioctl("KVM_X86_SETUP_MCE"))
}

/// Raises a machine check for an access to `guest`, or says why it cannot. `restartable`: the
/// instruction has not been executed in part.
pub(crate) fn raise(vcpu: &VcpuFd, guest: GuestAddress, restartable: bool) -> Result<(), String> {
    let register = |index| sys::msr(vcpu, index);
    let cap = register(IA32_MCG_CAP).unwrap_or(0);
    // KVM would take it and do nothing, and the guest touch the memory again, for ever.
    if cap & CAP_CTL_P != 0 && register(IA32_MCG_CTL) != Some(u64::MAX) {
        return Err("the guest has turned machine checks off in IA32_MCG_CTL".into());
    }
    if register(IA32_MC0_CTL + 4 * u32::from(BANK)) != Some(u64::MAX) {
        return Err(format!("the guest has turned machine checks off in IA32_MC{BANK}_CTL"));
    }
    let mut mcg_status = STATUS_MCIP;
    if restartable {
        mcg_status |= STATUS_RIPV | STATUS_EIPV;
    }
    if cap & CAP_LMCE_P != 0 && register(IA32_MCG_EXT_CTL).is_some_and(|ctl| ctl & 1 != 0) {
        mcg_status |= STATUS_LMCE_S;
    }
    let mce = kvm_x86_mce {
        status: VAL | UC | EN | MISCV | ADDRV | S | AR | DATA_LOAD,
        addr: guest.get(),
        misc: PHYSICAL_PAGE,
        mcg_status,
        bank: BANK,
        ..Default::default()
    };
    sys::set_mce(vcpu, &mce).map_err(|error| format!("KVM_X86_SET_MCE: {error}"))
}
