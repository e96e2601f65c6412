//! A driver of a few lines, well-behaved or not, against real devices on real memory.

use std::{
    io::{Read, Seek, SeekFrom, Write},
    sync::{Arc, mpsc},
    thread,
};

use pageferry_memory::{Backing, GranuleIndex, GranuleRange, Region, RegionConfig};
use pageferry_testing::Random;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    super::{Block, Chain, Disk, Entropy},
    *,
};

const MEMORY: u64 = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4800;
const DATA: u64 = 0x5000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    device: Transport,
    memory: DeviceMemory,
    event: EventFd,
    available: u16,
}

fn region() -> Arc<Region> {
    Arc::new(Region::new(&RegionConfig::new(MEMORY, Backing::Memfd)).unwrap())
}

fn memory() -> DeviceMemory {
    let region = region();
    region.page_map().set_present(region.all_granules());
    DeviceMemory::new(&[region]).unwrap()
}

fn disk(bytes: usize, read_only: bool) -> (tempfile::NamedTempFile, Box<Block>) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let contents: Vec<u8> = (0..bytes).map(|index| (index / 512) as u8).collect();
    file.write_all(&contents).unwrap();
    let disk = Disk { path: file.path().to_owned(), read_only };
    (file, Box::new(Block::open(&disk).unwrap()))
}

impl Driver {
    fn new(backend: Box<dyn Backend>) -> Self {
        Self::with_memory(backend, memory())
    }

    fn with_memory(backend: Box<dyn Backend>, memory: DeviceMemory) -> Self {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(event.try_clone().unwrap());
        let device = Transport::new(backend, memory.clone(), interrupt);
        Self { device, memory, event, available: 0 }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) -> bool {
        self.device.write(offset, &value.to_le_bytes())
    }

    /// As section 3.1.1 has it, with all features that the device offers.
    fn start(&self, size: u16) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for word in 0..2 {
            self.write(0x14, word);
            self.write(0x24, word);
            self.write(0x20, self.read(0x10));
        }
        self.write(0x70, 3 | STATUS_FEATURES_OK);
        assert_eq!(self.read(0x70), 3 | STATUS_FEATURES_OK);
        self.write(0x30, 0);
        self.write(0x38, size.into());
        for (offset, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        self.write(0x70, 3 | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    fn describe(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESCRIPTORS + 16 * index);
        let memory = self.memory.marked();
        memory.write_obj(address, at).unwrap();
        memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Puts descriptor 0 into the ring and tells of it.
    fn tell(&mut self, size: u16) {
        let memory = self.memory.marked();
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % size);
        memory.write_obj(0_u16, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        if self.write(0x50, 0) {
            assert!(!self.device.work());
        }
    }

    /// A request to a disk. Returns its status, and how much was written.
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        const UNTOUCHED: u8 = 0xee;
        let data = if kind == 1 { 0 } else { WRITE };
        self.describe(0, HEADER, 16, NEXT, if len > 0 { 1 } else { 2 });
        self.describe(1, DATA, len, NEXT | data, 2);
        self.describe(2, STATUS, 1, WRITE, 0);
        let memory = self.memory.marked();
        memory.write_obj(u64::from(kind), GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let slot = USED + 4 + 8 * u64::from(self.available % 8);
        self.tell(8);
        let used: u16 = self.memory.marked().read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.available, "{kind} {sector} {len}");
        let status = self.memory.marked().read_obj(GuestAddress(STATUS)).unwrap();
        (status, self.memory.marked().read_obj(GuestAddress(slot + 4)).unwrap())
    }
}

#[test]
fn a_disk_reads_writes_and_refuses() {
    let (mut file, block) = disk(64 * 512, false);
    let mut driver = Driver::new(block);
    driver.start(8);
    assert_eq!((driver.read(0), driver.read(4), driver.read(8)), (MAGIC, 2, 2));
    assert_eq!((driver.read(0x100), driver.read(0x104)), (64, 0), "sectors");
    // Kind, sector, bytes; what is answered.
    for (kind, sector, len, status, written) in [
        (0, 0, 512, 0, 513),
        (0, 62, 1024, 0, 1025),
        (0, 63, 1024, 1, 1),
        (0, u64::MAX, 512, 1, 1),
        (0, u64::MAX / 512 + 1, 512, 1, 1),
        (0, 0, 100, 1, 1),
        (1, 5, 512, 0, 1),
        (1, 64, 512, 1, 1),
        (4, 0, 0, 0, 1),
        (8, 0, 20, 0, 21),
        (8, 0, 3, 0, 4),
        (77, 0, 512, 2, 1),
    ] {
        let answered = driver.request(kind, sector, len);
        assert_eq!(answered, (status, written), "{kind} {sector:#x} {len}");
        assert_eq!(driver.event.read().unwrap(), 1, "one interrupt");
        assert_eq!(driver.read(0x60), INTERRUPT_QUEUE);
        driver.write(0x64, INTERRUPT_QUEUE);
        assert_eq!(driver.read(0x60), 0);
    }
    // What was in memory went to the disk: the identity, over sector 63.
    let mut sector = [0; 512];
    file.as_file_mut().seek(SeekFrom::Start(5 * 512)).unwrap();
    file.as_file_mut().read_exact(&mut sector).unwrap();
    assert_eq!(sector, [62; 512], "the sector that was read before");
    // And what the device wrote is marked.
    let marks = driver.memory.marks(pageferry_memory::GuestAddress::new(0)).unwrap();
    assert!(marks.is_marked(DATA) && marks.is_marked(USED) && !marks.is_marked(0));
}

#[test]
fn a_disk_that_may_only_be_read() {
    let (_file, block) = disk(8 * 512, true);
    let mut driver = Driver::new(block);
    driver.start(8);
    assert_eq!(driver.request(1, 0, 512), (1, 1));
    assert_eq!(driver.request(0, 7, 512), (0, 513));
}

#[test]
fn random_numbers() {
    let mut driver = Driver::new(Box::new(Entropy::open().unwrap()));
    driver.start(8);
    driver.describe(0, DATA, 64, WRITE, 0);
    driver.tell(8);
    let bytes: [u64; 8] = driver.memory.marked().read_obj(GuestAddress(DATA)).unwrap();
    assert!(bytes.iter().all(|word| *word != 0), "{bytes:x?}");
}

/// The state goes to another device, which continues where the first one was.
#[test]
fn a_device_goes_on_elsewhere() {
    let (_file, block) = disk(64 * 512, false);
    let mut driver = Driver::new(block);
    driver.start(8);
    for sector in 0..11 {
        assert_eq!(driver.request(0, sector, 512), (0, 513));
    }
    let saved = driver.device.save();
    let (_other, block) = disk(64 * 512, false);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Interrupt::new(event.try_clone().unwrap());
    driver.device = Transport::new(block, driver.memory.clone(), interrupt);
    driver.device.restore(&saved).unwrap();
    assert_eq!(driver.device.save(), saved);
    assert_eq!(event.read().unwrap(), 1, "what was not acknowledged is raised again");
    assert_eq!(driver.request(0, 12, 512), (0, 513));

    let mut other = Driver::new(Box::new(Entropy::open().unwrap()));
    assert!(other.device.restore(&saved).is_err(), "another kind of device");
    other.start(8);
    other.describe(0, DATA, 64, WRITE, 0);
    other.tell(8);
    for cut in 0..saved.len() {
        assert!(driver.device.restore(&saved[..cut]).is_err());
    }
}

/// Each of these makes the device ask to be reset, and a reset makes it work again.
#[test]
fn rings_that_make_no_sense() {
    type Break = fn(&mut Driver);
    let cases: [(&str, Break); 7] = [
        ("a ring outside of memory", |driver| {
            driver.write(0x70, 0);
            driver.start(8);
            driver.device.registers().queues[0]
                .as_mut()
                .unwrap()
                .set_used_ring_address(Some(0xffff_f000), None);
        }),
        ("more requests than the ring can hold", |driver| {
            driver.memory.marked().write_obj(100_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("a descriptor that is none", |driver| {
            driver.memory.marked().write_obj(9_u16, GuestAddress(AVAILABLE + 4)).unwrap();
            driver.memory.marked().write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("no room for a status", |driver| {
            driver.describe(0, HEADER, 16, 0, 0);
            driver.memory.marked().write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("a request that is too short", |driver| {
            driver.describe(0, HEADER, 4, NEXT, 1);
            driver.describe(1, STATUS, 1, WRITE, 0);
            driver.memory.marked().write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("a buffer outside of memory", |driver| {
            driver.describe(0, MEMORY - 8, 16, NEXT, 1);
            driver.describe(1, STATUS, 1, WRITE, 0);
            driver.memory.marked().write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
        ("a circle", |driver| {
            driver.describe(0, HEADER, 16, NEXT, 0);
            driver.memory.marked().write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        }),
    ];
    for (what, break_it) in cases {
        let (_file, block) = disk(64 * 512, false);
        let mut driver = Driver::new(block);
        driver.start(8);
        break_it(&mut driver);
        if driver.write(0x50, 0) {
            driver.device.work();
        }
        let used: u16 = driver.memory.marked().read_obj(GuestAddress(USED + 2)).unwrap();
        let needs_reset = driver.read(0x70) & STATUS_NEEDS_RESET != 0;
        assert!(needs_reset || used == 0, "{what}");
        driver.memory.marked().write_obj(0_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        driver.memory.marked().write_obj(0_u16, GuestAddress(USED + 2)).unwrap();
        driver.start(8);
        assert_eq!(driver.request(0, 3, 512), (0, 513), "after {what}");
    }
}

/// Any accesses and any memory: no panic, and never more than a queue's worth at once.
#[test]
fn any_driver() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let (_file, block) = disk(8 * 512, false);
        let driver = Driver::new(block);
        driver.start(8);
        for _ in 0..200 {
            let address = random.below(0x6000);
            let value = match random.below(4) {
                0 => random.next(),
                1 => random.below(16),
                2 => random.below(MEMORY),
                _ => 0,
            };
            driver.memory.marked().write_obj(value as u32, GuestAddress(address)).unwrap();
            let offset = if random.below(2) == 0 { 0x50 } else { random.below(0x110) };
            let mut data = vec![0; random.below(9) as usize];
            driver.device.read(offset, &mut data);
            if driver.write(offset, value as u32) {
                driver.device.work();
            }
            if random.below(8) == 0 {
                driver.start(1 << random.below(8));
            }
        }
        let saved = driver.device.save();
        driver.device.restore(&saved).unwrap();
    }
}

/// Whatever is restored, and whatever the driver then does: it is refused, or the device works or asks
/// to be reset.
#[test]
fn any_state() {
    let (_file, block) = disk(8 * 512, false);
    let driver = Driver::new(block);
    driver.start(8);
    let good = driver.device.save();
    let mut taken = 0;
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let mut bytes = good.clone();
        for _ in 0..=random.below(3) {
            let at = 2 + random.below(good.len() as u64 - 2) as usize;
            bytes[at] = random.next() as u8;
        }
        if driver.device.restore(&bytes).is_err() {
            continue;
        }
        taken += 1;
        // The queue may be the third of one, the descriptors anywhere.
        for offset in [0x00, 0x34, 0x44, 0x60, 0x70, 0x100] {
            driver.read(offset);
        }
        if driver.device.has_work() || driver.write(0x50, 0) {
            driver.device.work();
        }
        driver.device.restore(&driver.device.save()).unwrap();
    }
    assert!(taken > 100, "{taken} were no state at all");
}

/// A buffer in memory that can never come: the device does not touch it.
#[test]
fn memory_that_cannot_come() {
    let region = region();
    let page = |address: u64| GranuleRange::new(GranuleIndex::new(address / 4096), 1);
    for address in (0..MEMORY).step_by(4096) {
        if address == DATA {
            assert_eq!(region.page_map().poison(page(address)), 1);
        } else {
            region.page_map().set_present(page(address));
        }
    }
    let (_file, block) = disk(8 * 512, false);
    let mut driver = Driver::with_memory(block, DeviceMemory::new(&[region]).unwrap());
    driver.start(8);
    driver.describe(0, DATA - 8, 16, NEXT | WRITE, 1);
    driver.describe(1, STATUS, 1, WRITE, 0);
    driver.tell(8);
    assert_eq!(driver.read(0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
    assert_eq!(driver.read(0x60), INTERRUPT_CONFIG);
}

/// Takes as long as it is told to.
#[derive(Debug)]
struct Slow {
    begun: mpsc::SyncSender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Backend for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &[8]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&self, _: Chain<'_>, _: &DeviceMemory) -> Result<u32, Broken> {
        self.begun.send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        Ok(0)
    }
}

/// What is told while somebody is at work is done by whoever is at work, and a reset waits for them.
#[test]
fn several_vcpus() {
    let (begun, has_begun) = mpsc::sync_channel(0);
    let (go_on, may_go_on) = mpsc::channel();
    let driver = Driver::new(Box::new(Slow { begun, go_on: Mutex::new(may_go_on) }));
    driver.start(8);
    driver.describe(0, DATA, 64, WRITE, 0);
    let put = |count: u16| {
        driver.memory.marked().write_obj(count, GuestAddress(AVAILABLE + 2)).unwrap();
        assert!(driver.write(0x50, 0));
    };
    thread::scope(|scope| {
        put(1);
        let first = scope.spawn(|| driver.device.work());
        has_begun.recv().unwrap();
        // The registers can be read, and another request told of: nobody waits.
        assert_eq!(driver.read(0x08), 4);
        put(2);
        assert!(!driver.device.work(), "it is not this one's to do");
        go_on.send(()).unwrap();
        has_begun.recv().unwrap();
        let reset = scope.spawn(|| driver.write(0x70, 0));
        // However long that takes to begin, it cannot end before the request does.
        while driver.read(0x70) != 0 {
            thread::yield_now();
        }
        assert!(!reset.is_finished());
        go_on.send(()).unwrap();
        reset.join().unwrap();
        assert!(!first.join().unwrap());
    });
    assert!(driver.device.registers().queues[0].is_some());
    assert_eq!(driver.read(0x60), 0, "nobody is interrupted after a reset");
}
