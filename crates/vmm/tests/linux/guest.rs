//! What runs in the guest, as its first process: this test program again. It answers commands on the
//! console, of one line each.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, Read, Write},
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use rustix::{
    mount::{MountFlags, mount},
    system::{RebootCommand, finit_module, reboot},
    termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr},
    time::{ClockId, clock_gettime},
};

/// In the guest's environment, from the kernel's command line.
pub const IN_GUEST: &str = "PAGEFERRY_IN_GUEST";
pub const PROMPT: &str = "guest ready";
/// Where on the disk the command `disk` writes, and how much.
pub const DISK_OFFSET: u64 = 1 << 20;
pub const DISK_BYTES: usize = 256 << 10;
/// What the workload fills.
const WORKLOAD_BYTES: usize = 8 << 20;

pub fn is_guest() -> bool {
    std::env::var_os(IN_GUEST).is_some()
}

/// What `disk` writes.
pub fn disk_byte(index: usize) -> u8 {
    (mix(index as u64 / 8) >> (8 * (index % 8))) as u8
}

/// The last step of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Memory that is filled again in each round, and checked: what is in it follows from the round.
pub struct Workload {
    words: Vec<u64>,
    pub round: u64,
}

impl Workload {
    pub fn new(bytes: usize) -> Self {
        Self { words: vec![0; bytes / 8], round: 0 }
    }

    fn word(round: u64, index: usize) -> u64 {
        mix(round << 32 | index as u64)
    }

    /// Goes to the next round: half of the words are written, each after a look at what was there.
    /// Returns the sum over all.
    pub fn next(&mut self) -> Result<u64, String> {
        self.check()?;
        self.round += 1;
        for (index, word) in self.words.iter_mut().enumerate() {
            *word = Self::word(self.round, index);
        }
        self.check()
    }

    pub fn check(&self) -> Result<u64, String> {
        let mut sum = 0_u64;
        for (index, word) in self.words.iter().enumerate() {
            let expected = if self.round == 0 { 0 } else { Self::word(self.round, index) };
            if *word != expected {
                let round = self.round;
                return Err(format!("word {index} of round {round}: {word:#x}, not {expected:#x}"));
            }
            sum = sum.rotate_left(5) ^ mix(*word);
        }
        Ok(sum)
    }

    pub fn damage(&mut self, index: usize) {
        self.words[index] ^= 1 << 17;
    }
}

/// The guest's life. It never returns.
pub fn main() -> ! {
    let prepared = prepare();
    println!("{PROMPT}: {prepared:?}");
    for line in std::io::stdin().lock().lines() {
        let line = match line {
            Ok(line) => line,
            Err(error) => {
                println!("the console: {error}");
                continue;
            }
        };
        match answer(line.trim()) {
            Ok(said) => println!("{said}"),
            Err(error) => println!("FAILED {line}: {error}"),
        }
    }
    panic!("the console came to its end");
}

type Answer = Result<String, Box<dyn std::error::Error>>;

fn prepare() -> Answer {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, at, kind, MountFlags::empty(), None)?;
    }
    for name in fs::read_to_string("/modules/order")?.lines() {
        let module = File::open(format!("/modules/{name}"))?;
        finit_module(&module, c"", 0).map_err(|error| format!("{name}: {error}"))?;
    }
    // What is typed would stand in the middle of what is said.
    let mut console = tcgetattr(std::io::stdin())?;
    console.local_modes.remove(LocalModes::ECHO);
    tcsetattr(std::io::stdin(), OptionalActions::Now, &console)?;
    Ok(fs::read_to_string("/proc/version")?.trim().to_owned())
}

fn answer(command: &str) -> Answer {
    match command {
        "" => Ok(String::new()),
        "clock" => clock(),
        "cpus" => {
            Ok(format!("cpus {}", fs::read_to_string("/sys/devices/system/cpu/online")?.trim()))
        }
        "clocksource" => {
            let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
            Ok(format!("clocksource {}", fs::read_to_string(path)?.trim()))
        }
        "disk" => disk(),
        "read-only" => read_only(),
        "random" => random(),
        "work" => work(1),
        "work twice" => work(2),
        "stop" => {
            WORKING.store(false, Relaxed);
            Ok("stopping".to_owned())
        }
        "off" => end(RebootCommand::PowerOff),
        "reboot" => end(RebootCommand::Restart),
        other => match other.strip_prefix("echo ") {
            Some(rest) => Ok(rest.chars().rev().collect()),
            None => Err(format!("there is no command {other}").into()),
        },
    }
}

fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn clock() -> Answer {
    let real = clock_gettime(ClockId::Realtime);
    Ok(format!("clock {} ns, {} s", monotonic(), real.tv_sec))
}

static WORKING: AtomicBool = AtomicBool::new(false);

/// Starts the workload on so many threads, of which the first tells of each round.
fn work(threads: usize) -> Answer {
    WORKING.store(true, Relaxed);
    for thread in 0..threads {
        thread::Builder::new().spawn(move || {
            let mut workload = Workload::new(WORKLOAD_BYTES);
            while WORKING.load(Relaxed) {
                match workload.next() {
                    Ok(sum) if thread == 0 => {
                        println!("round {} sum {sum:016x} at {} ns", workload.round, monotonic());
                    }
                    Ok(_) => {}
                    Err(why) => {
                        println!("FAILED workload: {why}");
                        return;
                    }
                }
            }
            println!("stopped after {} rounds", workload.round);
        })?;
    }
    Ok("working".to_owned())
}

/// Writes to the disk, drops what is cached of it, and reads it back.
fn disk() -> Answer {
    let path = "/dev/vda";
    let written: Vec<u8> = (0..DISK_BYTES).map(disk_byte).collect();
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    file.write_all_at(&written, DISK_OFFSET)?;
    file.sync_all()?;
    File::create("/proc/sys/vm/drop_caches")?.write_all(b"3")?;
    let mut read = vec![0; DISK_BYTES];
    file.read_exact_at(&mut read, DISK_OFFSET)?;
    if read != written {
        return Err("something else is read".into());
    }
    Ok(format!("disk ok, {DISK_BYTES} bytes"))
}

/// Linux lets a disk that may only be read be opened, and refuses to write.
fn read_only() -> Answer {
    let file = OpenOptions::new().write(true).open("/dev/vdb")?;
    match file.write_all_at(&[1; 512], 0) {
        Err(error) => Ok(format!("refused: {error}")),
        Ok(()) => Err("it can be written".into()),
    }
}

fn random() -> Answer {
    let mut bytes = [[0; 16]; 2];
    let mut file = File::open("/dev/hwrng")?;
    for bytes in &mut bytes {
        file.read_exact(bytes)?;
    }
    if bytes[0] == bytes[1] || bytes[0] == [0; 16] {
        return Err(format!("not random: {bytes:x?}").into());
    }
    let name = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    Ok(format!("random from {}", name.trim()))
}

fn end(how: RebootCommand) -> Answer {
    std::io::stdout().flush()?;
    Err(reboot(how).expect_err("it returns only if it failed").into())
}
