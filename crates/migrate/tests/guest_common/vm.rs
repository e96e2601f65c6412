//! The guest itself, on either side.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use pageferry_memory::{Layout, RegionId};
use pageferry_testing::{fill_pattern, wait_for, word};

pub const PAGE: u64 = 4096;
/// Words of a page that are written to; the last one never is.
const WORDS: u64 = PAGE / 8 - 1;
/// One page in so many is zero to begin with.
const ZERO: u64 = 5;

/// How many copies of a guest run: never more than one.
#[derive(Default, Debug)]
pub struct Lives {
    running: AtomicUsize,
    most: AtomicUsize,
}

impl Lives {
    fn begin(&self) {
        let now = self.running.fetch_add(1, SeqCst) + 1;
        self.most.fetch_max(now, SeqCst);
    }

    fn end(&self) {
        self.running.fetch_sub(1, SeqCst);
    }

    pub fn running(&self) -> usize {
        self.running.load(SeqCst)
    }

    #[track_caller]
    pub fn assert_never_two(&self) {
        assert!(self.most.load(SeqCst) <= 1, "two copies ran");
    }
}

/// What the guest does.
#[derive(Copy, Clone, Debug)]
pub struct Load {
    pub vcpus: u64,
    /// Steps between two short sleeps; 0: it does nothing.
    pub burst: u64,
}

impl Load {
    pub const IDLE: Self = Self { vcpus: 2, burst: 0 };
    pub const BUSY: Self = Self { vcpus: 2, burst: 40 };
}

/// The guest, on either side.
pub struct Vm {
    pub layout: Layout,
    load: Load,
    pub lives: Arc<Lives>,
    /// Steps made, by vCPU.
    steps: Vec<AtomicU64>,
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
    wrong: AtomicU64,
    pub throttled: AtomicU8,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    running: bool,
    parked: usize,
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x7fb5_d329_728e_a185);
    x ^ (x >> 27)
}

/// Where and what a step writes: region, offset, value.
fn step(layout: &Layout, load: Load, vcpu: u64, step: u64) -> (usize, u64, u64) {
    let x = mix(step.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (vcpu << 60));
    let region = (x % layout.len() as u64) as usize;
    let pages = layout.get(RegionId::new(region as u16)).unwrap().len() / PAGE / load.vcpus;
    // Each vCPU has pages of its own, so that no two of them write the same word.
    let page = (x >> 8) % pages * load.vcpus + vcpu;
    (region, page * PAGE + (x >> 40) % WORDS * 8, step | (vcpu << 56))
}

/// One block of 64 pages in so many is the same word all over.
const PLAIN: u64 = 7;

/// What a region contains before any step.
pub fn initial(region: u16, page: u64, bytes: &mut [u8]) {
    if page % ZERO == 3 {
        bytes.fill(0);
    } else if page / 64 % PLAIN == 2 {
        let word = word(RegionId::new(region), page * PAGE + WORDS * 8).to_ne_bytes();
        bytes.chunks_exact_mut(8).for_each(|place| place.copy_from_slice(&word));
    } else {
        fill_pattern(RegionId::new(region), page * PAGE, bytes);
    }
}

impl Vm {
    pub fn new(layout: Layout, load: Load, lives: Arc<Lives>, steps: &[u64]) -> Arc<Self> {
        let vm = Arc::new(Self {
            layout,
            load,
            lives,
            steps: steps.iter().map(|steps| AtomicU64::new(*steps)).collect(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
            wrong: AtomicU64::new(0),
            throttled: AtomicU8::new(0),
            threads: Mutex::new(Vec::new()),
        });
        for vcpu in 0..load.vcpus {
            let this = Arc::clone(&vm);
            vm.threads.lock().unwrap().push(thread::spawn(move || this.vcpu(vcpu)));
        }
        vm
    }

    fn vcpu(&self, vcpu: u64) {
        let mut made = self.steps[vcpu as usize].load(SeqCst);
        loop {
            {
                let mut state = self.state.lock().unwrap();
                if !state.running && !self.ended.load(SeqCst) {
                    self.steps[vcpu as usize].store(made, SeqCst);
                    state.parked += 1;
                    self.changed.notify_all();
                    state = self
                        .changed
                        .wait_while(state, |state| !state.running && !self.ended.load(SeqCst))
                        .unwrap();
                    state.parked -= 1;
                }
            }
            if self.ended.load(SeqCst) {
                return;
            }
            for _ in 0..self.load.burst {
                made += 1;
                let (region, offset, value) = step(&self.layout, self.load, vcpu, made);
                let region = self.layout.get(RegionId::new(region as u16)).unwrap();
                let view = region.guest_view();
                // What is never written to tells whether this is the page that it should be.
                let mut last = [0; 8];
                view.read_at(offset / PAGE * PAGE + WORDS * 8, &mut last).unwrap();
                let page = offset / PAGE;
                let id = self.layout.iter().find(|(_, r)| Arc::ptr_eq(r, region)).unwrap().0;
                let expected = if page % ZERO == 3 { 0 } else { word(id, page * PAGE + WORDS * 8) };
                if u64::from_ne_bytes(last) != expected {
                    self.wrong.fetch_add(1, SeqCst);
                }
                view.write_at(offset, &value.to_ne_bytes()).unwrap();
            }
            self.steps[vcpu as usize].store(made, SeqCst);
            let slower = u64::from(self.throttled.load(Relaxed));
            thread::sleep(Duration::from_micros(500 + 50 * slower));
        }
    }

    pub fn start(&self) {
        self.lives.begin();
        self.state.lock().unwrap().running = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap();
        if !std::mem::replace(&mut state.running, false) {
            return;
        }
        let all = self.load.vcpus as usize;
        drop(self.changed.wait_while(state, |state| state.parked < all).unwrap());
        self.lives.end();
    }

    pub fn is_running(&self) -> bool {
        self.state.lock().unwrap().running
    }

    pub fn steps(&self) -> Vec<u64> {
        self.steps.iter().map(|steps| steps.load(SeqCst)).collect()
    }

    /// Waits until every vCPU has made so many more steps.
    #[track_caller]
    pub fn work(&self, more: u64) {
        if self.load.burst == 0 {
            return;
        }
        let wanted: Vec<u64> = self.steps().iter().map(|steps| steps + more).collect();
        wait_for("the guest to work", || {
            self.steps().iter().zip(&wanted).all(|(now, wanted)| now >= wanted)
        });
    }

    /// Stops it and checks every byte.
    #[track_caller]
    pub fn verify(&self) {
        self.stop();
        assert_eq!(self.wrong.load(SeqCst), 0, "pages that a vCPU found to be others");
        let mut expected: Vec<Vec<u8>> = Vec::new();
        for (id, region) in self.layout.iter() {
            let mut bytes = vec![0; region.len() as usize];
            for (page, bytes) in (0..).zip(bytes.chunks_exact_mut(PAGE as usize)) {
                initial(id.get(), page, bytes);
            }
            expected.push(bytes);
        }
        for (vcpu, steps) in (0..).zip(self.steps()) {
            for number in 1..=steps {
                let (region, offset, value) = step(&self.layout, self.load, vcpu, number);
                let at = offset as usize;
                expected[region][at..at + 8].copy_from_slice(&value.to_ne_bytes());
            }
        }
        let mut page = vec![0; PAGE as usize];
        for ((id, region), expected) in self.layout.iter().zip(&expected) {
            for (number, expected) in (0..).zip(expected.chunks_exact(PAGE as usize)) {
                region.guest_view().read_at(number * PAGE, &mut page).unwrap();
                assert!(page == expected, "region {id} page {number} differs");
            }
        }
    }
}

/// Ends the threads of a guest when the test is done with it.
pub struct EndVm(pub Arc<Vm>);

impl Drop for EndVm {
    fn drop(&mut self) {
        self.0.ended.store(true, SeqCst);
        {
            let _state = self.0.state.lock();
            self.0.changed.notify_all();
        }
        for thread in std::mem::take(&mut *self.0.threads.lock().unwrap()) {
            let _ = thread.join();
        }
    }
}
