//! A machine for a test, with its console at hand.

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use pageferry_memory::RegionId;
use pageferry_paging::{Completion, PageSink, PageSource, SourceError, Span, Urgency};
use pageferry_vmm::linux::{LinuxConfig, LinuxVm};

/// What the guest said, from the first of its machines to the last.
#[derive(Clone, Default)]
pub struct Console(Arc<(Mutex<Said>, Condvar)>);

#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    /// How much of it was found by [`Console::expect`].
    found: usize,
}

impl Console {
    /// Waits until `vm` says text that has not been found before, and returns the rest of its line.
    #[track_caller]
    pub fn expect(&self, vm: &LinuxVm, text: &str, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        let (said, changed) = &*self.0;
        loop {
            let mut locked = said.lock().unwrap();
            let new = String::from_utf8_lossy(&locked.bytes[locked.found..]).into_owned();
            if let Some(at) = new.find(text)
                && let Some(end) = new[at..].find('\n')
            {
                // The console prints ASCII: bytes and characters are the same.
                locked.found += at + end;
                return new[at + text.len()..at + end].trim().to_owned();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // Woken or not, it is looked at again; the machine's end does not wake it.
            drop(changed.wait_timeout(locked, left.min(Duration::from_secs(1))));
            let end = vm.wait(Duration::ZERO);
            assert_eq!(end, None, "waiting for {text:?}:\n{new}");
            for wrong in ["FAILED", "Kernel panic", "BUG:"] {
                assert!(!new.contains(wrong), "waiting for {text:?}:\n{new}");
            }
            assert!(!left.is_zero(), "waited {patience:?} for {text:?}, and got:\n{new}");
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (said, changed) = &*self.0;
        said.lock().unwrap().bytes.extend(bytes);
        changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a kernel for guests is: see `lab/guest`. Says so if there is none, if this host cannot run it,
/// or if this program could not be the guest's first process.
pub fn guest_kernel() -> Option<PathBuf> {
    let directory = std::env::var_os("PAGEFERRY_GUEST").map_or("/guest".into(), PathBuf::from);
    if !directory.join("vmlinuz").exists() {
        let what = "a kernel for guests (lab/guest makes one, PAGEFERRY_GUEST says where)";
        println!("skipped: needs {what}: there is none in {}", directory.display());
        return None;
    }
    if !cfg!(target_feature = "crt-static") {
        println!(
            "skipped: needs this program to be linked statically (-C target-feature=+crt-static)"
        );
        return None;
    }
    match pageferry_vmm::linux::native() {
        Ok(native) if native.is_native() => Some(directory),
        Ok(native) => {
            let took = native.instruction;
            println!(
                "skipped: needs KVM that runs a guest's kernel natively: {took:?} an instruction"
            );
            None
        }
        Err(error) => {
            println!("skipped: needs KVM: {error}");
            None
        }
    }
}

/// Types a line.
pub fn type_line(vm: &LinuxVm, line: &str) {
    assert_eq!(vm.input(format!("{line}\n").as_bytes()), line.len() + 1);
}

/// A machine with what it says going to `console`.
pub fn machine(config: &LinuxConfig, console: &Console) -> LinuxVm {
    LinuxVm::new(config.clone(), Box::new(console.clone())).unwrap()
}

/// Another machine's memory, which nobody changes any more.
pub struct Memory(pub Arc<LinuxVm>);

impl Memory {
    fn read(&self, region: RegionId, offset: u64, bytes: &mut [u8]) {
        let layout = self.0.layout();
        let region = layout.get(region).expect("machines made alike");
        region.guest_view().read_at(offset, bytes).unwrap();
    }

    /// The first address, in a region, at which the other machine's memory is not the same.
    pub fn first_difference(&self, vm: &LinuxVm) -> Option<(RegionId, u64)> {
        let (mut here, mut there) = (vec![0; 4096], vec![0; 4096]);
        for (id, region) in vm.layout().iter() {
            for offset in (0..region.len()).step_by(here.len()) {
                self.read(id, offset, &mut here);
                region.guest_view().read_at(offset, &mut there).unwrap();
                if here != there {
                    return Some((id, offset));
                }
            }
        }
        None
    }

    /// Copies all of it.
    pub fn copy_to(&self, vm: &LinuxVm) {
        let mut bytes = vec![0; 1 << 20];
        for (id, region) in vm.layout().iter() {
            for offset in (0..region.len()).step_by(bytes.len()) {
                self.read(id, offset, &mut bytes);
                // Zeros are there already, and cost nothing.
                if bytes.iter().any(|byte| *byte != 0) {
                    region.guest_view().write_at(offset, &bytes).unwrap();
                }
            }
            region.page_map().set_present(region.all_granules());
        }
    }
}

impl PageSource for Memory {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let granule = sink.layout().get(span.region).expect("its own").granule().bytes();
        let fill = sink.fill(span, &mut |bytes| {
            self.read(span.region, span.granules.first().get() * granule, bytes);
            Ok(())
        });
        fill.map_err(|error| SourceError::Lost(error.to_string()))
    }

    fn complete(&self, _: Completion) -> Result<(), SourceError> {
        Ok(())
    }

    fn detach(&self) {}
}
