//! The encoding of a state.
//!
//! All numbers are little-endian. A header, and sections one after another:
//!
//! | at | bytes | header |
//! |---|---|---|
//! | 0 | 8 | `PFVMSTAT` |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 4 | how many sections |
//! | 16 | 8 | bytes of all sections |
//! | 24 | 8 | 0 |
//! | 32 | 32 | BLAKE3 of the 32 bytes before and of all sections |
//!
//! | at | bytes | section |
//! |---|---|---|
//! | 0 | 24 | its name, and zeros: ASCII without blanks; that of a device begins with `dev:` |
//! | 24 | 2 | the vCPU's number; 0xffff: the machine |
//! | 26 | 2 | version of the section: 1, or what the device says |
//! | 28 | 4 | its length |
//! | 32 | | its bytes, without padding |
//!
//! Sections are in the order of restoring, every one at most once: those of the vCPUs by their
//! numbers, from 0 on; those of the machine; the devices. So a state has one encoding.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::{
    DeviceBlob, FormatError, MachineState, PlatformPart, PlatformState, VcpuPart, VcpuState,
};

/// Version of the encoding.
pub const VERSION: u32 = 1;
/// The longest encoding that is read.
pub const MAX_BYTES: usize = 64 << 20;
/// The most vCPUs that a state has.
pub const MAX_VCPUS: usize = 1024;

const MAGIC: &[u8; 8] = b"PFVMSTAT";
const HEADER: usize = 64;
const DIGESTED: usize = 32;
const SECTION: usize = 32;
const NAME: usize = 24;
const MACHINE: u16 = u16::MAX;
const DEVICE: &str = "dev:";
const PART_VERSION: u16 = 1;

impl DeviceBlob {
    /// Whether the name is one that a device may have.
    pub fn has_good_name(&self) -> bool {
        let name = self.name.as_bytes();
        (1..=NAME - DEVICE.len()).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
    }
}

impl MachineState {
    /// The state as bytes, for a file or a connection.
    ///
    /// # Panics
    /// When a device's name is [none](DeviceBlob::has_good_name) or another's, or there are more
    /// bytes or vCPUs than [can be read](Self::decode).
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.vcpus.len() <= MAX_VCPUS, "too many vCPUs for a state");
        let mut bytes = vec![0; HEADER];
        let mut sections = 0_u32;
        let mut add = |name: &str, vcpu: u16, version: u16, content: &[u8]| {
            let start = bytes.len();
            bytes.extend(name.as_bytes());
            bytes.resize(start + NAME, 0);
            bytes.extend(vcpu.to_le_bytes());
            bytes.extend(version.to_le_bytes());
            bytes.extend((content.len() as u32).to_le_bytes());
            bytes.extend(content);
            sections += 1;
        };
        for (number, vcpu) in (0..).zip(&self.vcpus) {
            for (part, content) in vcpu.parts() {
                add(part.name(), number, PART_VERSION, content);
            }
        }
        for (part, content) in self.platform.parts() {
            add(part.name(), MACHINE, PART_VERSION, content);
        }
        for (index, device) in self.devices.iter().enumerate() {
            let another = self.devices[..index].iter().any(|other| other.name == device.name);
            assert!(device.has_good_name() && !another, "a device named {:?}", device.name);
            add(&format!("{DEVICE}{}", device.name), MACHINE, device.version, &device.bytes);
        }
        assert!(bytes.len() <= MAX_BYTES, "a state of {} bytes", bytes.len());
        let body = (bytes.len() - HEADER) as u64;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&sections.to_le_bytes());
        bytes[16..24].copy_from_slice(&body.to_le_bytes());
        let digest = digest(&bytes);
        bytes[DIGESTED..HEADER].copy_from_slice(&digest);
        bytes
    }

    /// Reads a state. Whatever the bytes are, it does not panic, and allocates little more than
    /// they have. That the values in it make sense is for KVM and the devices to say.
    ///
    /// # Errors
    /// What is wrong, by name.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(header) = bytes.first_chunk::<HEADER>().filter(|header| header.starts_with(MAGIC))
        else {
            let whole = bytes.starts_with(MAGIC);
            let (found, expected) = (bytes.len() as u64, HEADER as u64);
            return Err(if whole {
                FormatError::Length { found, expected }
            } else {
                FormatError::Magic
            });
        };
        let version = half(header, 8);
        if version != VERSION {
            return Err(FormatError::Version { found: version, known: VERSION });
        }
        if bytes.len() > MAX_BYTES {
            let (bytes, most) = (bytes.len() as u64, MAX_BYTES as u64);
            return Err(FormatError::TooLong { bytes, most });
        }
        let body = u64::from(half(header, 16)) | u64::from(half(header, 20)) << 32;
        let found = (bytes.len() - HEADER) as u64;
        if body != found {
            return Err(FormatError::Length { found, expected: body });
        }
        if let Some(at) = header[24..DIGESTED].iter().position(|byte| *byte != 0) {
            return Err(FormatError::Reserved { at: 24 + at });
        }
        if digest(bytes) != header[DIGESTED..] {
            return Err(FormatError::Digest);
        }
        let mut reader = Reader { bytes, at: HEADER, before: None, state: Self::default() };
        let mut sections = 0;
        while reader.at < bytes.len() {
            reader.section()?;
            sections += 1;
        }
        if sections != half(header, 12) {
            let (found, expected) = (sections.into(), half(header, 12).into());
            return Err(FormatError::Length { found, expected });
        }
        reader.state.check_complete()?;
        Ok(reader.state)
    }

    fn check_complete(&self) -> Result<(), FormatError> {
        for (number, vcpu) in (0..).zip(&self.vcpus) {
            for one_of in VcpuPart::ONE_OF {
                let count = one_of.iter().filter(|part| vcpu.part(**part).is_some()).count();
                if count != 1 {
                    let name = one_of[0].name();
                    return Err(FormatError::Missing { vcpu: Some(number), name });
                }
            }
        }
        let has = |part| self.platform.part(part).is_some();
        let missing = |name| Err(FormatError::Missing { vcpu: None, name });
        if !has(PlatformPart::Clock) {
            return missing(PlatformPart::Clock.name());
        }
        let chips = [PlatformPart::Pic0, PlatformPart::Pic1, PlatformPart::Ioapic];
        match chips.into_iter().find(|chip| !has(*chip)) {
            Some(chip) if chips.into_iter().any(has) => missing(chip.name()),
            _ => Ok(()),
        }
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..DIGESTED]).update(&bytes[HEADER..]);
    *hasher.finalize().as_bytes()
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// What a section is, in the order in which they come.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Vcpu(u16, VcpuPart),
    Platform(PlatformPart),
    Device(usize),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    before: Option<Key>,
    state: MachineState,
}

impl Reader<'_> {
    fn section(&mut self) -> Result<(), FormatError> {
        let at = self.at;
        let rest = &self.bytes[at..];
        let cut = FormatError::Cut { at };
        let Some((head, rest)) = rest.split_first_chunk::<SECTION>() else { return Err(cut) };
        let name = name(&head[..NAME], at)?;
        let (vcpu, version) = (half(head, 24) as u16, (half(head, 24) >> 16) as u16);
        let len = half(head, 28);
        let Some(content) = rest.get(..len as usize) else { return Err(cut) };
        let key = self.key(name, vcpu, at)?;
        let name = || name.to_owned();
        if self.before.is_some_and(|before| before >= key) {
            return Err(FormatError::Order { name: name(), at });
        }
        if !matches!(key, Key::Device(_)) && version != PART_VERSION {
            let (found, known) = (version, PART_VERSION);
            return Err(FormatError::SectionVersion { name: name(), found, known });
        }
        let fits = match key {
            Key::Vcpu(_, part) => part.length().allows(content.len()),
            Key::Platform(part) => part.bytes() == content.len(),
            Key::Device(_) => true,
        };
        if !fits {
            return Err(FormatError::SectionLength { name: name(), bytes: len.into() });
        }
        match key {
            Key::Vcpu(number, part) => {
                let vcpus = &mut self.state.vcpus;
                if usize::from(number) == vcpus.len() && vcpus.len() < MAX_VCPUS {
                    vcpus.push(VcpuState { parts: BTreeMap::new() });
                } else if usize::from(number) + 1 != vcpus.len() {
                    return Err(FormatError::Order { name: name(), at });
                }
                let last = vcpus.last_mut().expect("there is one");
                last.parts.insert(part, content.to_vec());
            }
            Key::Platform(part) => {
                let PlatformState { parts } = &mut self.state.platform;
                parts.insert(part, content.to_vec());
            }
            Key::Device(_) => {
                let name = name().split_off(DEVICE.len());
                if self.state.device(&name).is_some() {
                    return Err(FormatError::Order { name, at });
                }
                let bytes = content.to_vec();
                self.state.devices.push(DeviceBlob { name, version, bytes });
            }
        }
        self.before = Some(key);
        self.at += SECTION + content.len();
        Ok(())
    }

    fn key(&self, name: &str, vcpu: u16, at: usize) -> Result<Key, FormatError> {
        let key = if vcpu == MACHINE {
            match name.strip_prefix(DEVICE) {
                Some(_) => Some(Key::Device(self.state.devices.len())),
                None => find(PlatformPart::ALL, PlatformPart::name, name).map(Key::Platform),
            }
        } else {
            find(VcpuPart::ALL, VcpuPart::name, name).map(|part| Key::Vcpu(vcpu, part))
        };
        key.ok_or_else(|| FormatError::Name { name: name.to_owned(), at })
    }
}

fn find<P: Copy, const N: usize>(
    all: [P; N],
    name_of: impl Fn(P) -> &'static str,
    name: &str,
) -> Option<P> {
    all.into_iter().find(|part| name_of(*part) == name)
}

/// A name with the zeros behind it.
fn name(bytes: &[u8], at: usize) -> Result<&str, FormatError> {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (name, zeros) = bytes.split_at(len);
    let good = name.iter().all(u8::is_ascii_graphic)
        && !name.is_empty()
        && name != DEVICE.as_bytes()
        && zeros.iter().all(|byte| *byte == 0);
    match std::str::from_utf8(name) {
        Ok(name) if good => Ok(name),
        _ => Err(FormatError::Name { name: name.escape_ascii().to_string(), at }),
    }
}
