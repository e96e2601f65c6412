//! A guest of ordinary threads that write to memory in an order that can be computed again, so
//! that every byte can be checked wherever it has been moved to.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

pub mod proxy;
mod vm;

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering::*},
    },
    time::Duration,
};

use pageferry_dirty::{DirtySet, Tracked, Tracker, WpAsync};
use pageferry_memory::{
    Backing, GranuleIndex, GranuleRange, GuestAddress, Layout, Region, RegionConfig,
};
use pageferry_migrate::{
    DestinationGuest, DestinationMigration, DeviceState, DirtySink, Endpoint, GuestError,
    MigrateOptions, Mode, ReceiveOptions, SourceGuest, SourceMigration, core::RegionInfo,
};
use pageferry_paging::{Builder, Events, Pager};
use pageferry_testing::wait_for;

pub use vm::{EndVm, Lives, Load, PAGE, Vm, initial};

/// What a region is to be.
#[derive(Copy, Clone, Debug)]
pub struct Shape {
    pub backing: Backing,
    pub bytes: u64,
}

pub fn make(shapes: &[(u64, Shape)]) -> Layout {
    let regions = shapes.iter().map(|(base, shape)| {
        let mut config = RegionConfig::new(shape.bytes, shape.backing);
        config.guest_base = GuestAddress::new(*base);
        Arc::new(Region::new(&config).unwrap())
    });
    Layout::new(regions.collect()).unwrap()
}

/// The memory of a guest: two regions of these bytes together.
pub fn layout(backing: Backing, bytes: u64) -> Layout {
    let first = bytes / 4;
    let shapes =
        [(0, Shape { backing, bytes: first }), (1 << 32, Shape { backing, bytes: bytes - first })];
    make(&shapes)
}

type Step = dyn Fn(&'static str) -> Result<(), GuestError> + Send + Sync;

/// A guest that can be moved away.
pub struct Source {
    pub vm: Arc<Vm>,
    tracker: Mutex<Option<(WpAsync, DirtySet)>>,
    pub released: AtomicBool,
    pub before: Box<Step>,
    _end: EndVm,
}

impl Source {
    pub fn new(layout: Layout, load: Load, lives: &Arc<Lives>) -> Arc<Self> {
        Self::with(layout, load, lives, Box::new(|_| Ok(())))
    }

    /// `before` is asked before each step.
    pub fn with(layout: Layout, load: Load, lives: &Arc<Lives>, before: Box<Step>) -> Arc<Self> {
        let mut page = vec![0; PAGE as usize];
        for (id, region) in layout.iter() {
            for number in 0..region.len() / PAGE {
                initial(id.get(), number, &mut page);
                // What is zero stays untouched.
                if page.iter().any(|byte| *byte != 0) {
                    region.guest_view().write_at(number * PAGE, &page).unwrap();
                }
            }
        }
        let vm = Vm::new(layout, load, Arc::clone(lives), &vec![0; load.vcpus as usize]);
        vm.start();
        Arc::new(Self {
            tracker: Mutex::new(None),
            released: AtomicBool::new(false),
            before,
            _end: EndVm(Arc::clone(&vm)),
            vm,
        })
    }

    /// Checks that it goes on here as if nothing had been.
    #[track_caller]
    pub fn assert_goes_on(&self) {
        assert!(self.vm.is_running(), "the guest does not run here");
        assert!(!self.released.load(SeqCst));
        assert_eq!(self.vm.throttled.load(SeqCst), 0);
        assert!(self.tracker.lock().unwrap().is_none(), "writes are still tracked");
        self.vm.work(50);
        self.vm.verify();
        self.vm.lives.assert_never_two();
    }
}

fn failed(what: &'static str) -> impl Fn(pageferry_dirty::DirtyError) -> GuestError {
    move |error| GuestError::failed(what, error)
}

impl SourceGuest for Source {
    fn layout(&self) -> Layout {
        self.vm.layout.clone()
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        (self.before)("start_tracking")?;
        let views: Vec<_> =
            self.vm.layout.iter().map(|(_, region)| Arc::clone(region.guest_view())).collect();
        let ranges: Vec<_> = self
            .vm
            .layout
            .iter()
            .map(|(_, region)| Tracked {
                range: region.guest_view().range(),
                page: region.page_size(),
            })
            .collect();
        let mut tracker = WpAsync::own(views).map_err(failed("starting to track"))?;
        tracker.arm(&ranges).map_err(failed("arming"))?;
        let set = DirtySet::new(&ranges).map_err(failed("making a set"))?;
        *self.tracker.lock().unwrap() = Some((tracker, set));
        Ok(())
    }

    fn harvest(&self, into: &mut DirtySink<'_>) -> Result<(), GuestError> {
        (self.before)("harvest")?;
        let mut tracker = self.tracker.lock().unwrap();
        let (tracker, set) = tracker.as_mut().expect("it is tracked");
        tracker.harvest(set).map_err(failed("harvesting"))?;
        for range in set.take() {
            for (id, region) in self.vm.layout.iter() {
                let view = region.guest_view().range();
                if let Some(part) = view.intersection(range) {
                    let first = part.start().offset_from(view.start()).unwrap() / PAGE;
                    into(id, GranuleRange::new(GranuleIndex::new(first), part.len() / PAGE));
                }
            }
        }
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        *self.tracker.lock().unwrap() = None;
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        (self.before)("pause")?;
        self.vm.stop();
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        if !self.vm.is_running() {
            self.vm.start();
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, GuestError> {
        (self.before)("save")?;
        let bytes = self.vm.steps().iter().flat_map(|steps| steps.to_ne_bytes()).collect();
        Ok(DeviceState { name: "test-threads".into(), version: 1, bytes })
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.vm.throttled.store(percent, SeqCst);
        Ok(())
    }

    fn release(&self) {
        self.released.store(true, SeqCst);
    }
}

/// A place for a guest.
pub struct Destination {
    backing: Backing,
    load: Load,
    lives: Arc<Lives>,
    events: Events,
    layout: OnceLock<Layout>,
    steps: Mutex<Vec<u64>>,
    pager: Mutex<Option<Arc<Pager>>>,
    pub dropped: AtomicBool,
    pub before: Box<Step>,
    vm: OnceLock<EndVm>,
}

impl Destination {
    pub fn new(backing: Backing, load: Load, lives: &Arc<Lives>) -> Arc<Self> {
        Self::with(backing, load, lives, Events::Ignore, Box::new(|_| Ok(())))
    }

    pub fn with(
        backing: Backing,
        load: Load,
        lives: &Arc<Lives>,
        events: Events,
        before: Box<Step>,
    ) -> Arc<Self> {
        Arc::new(Self {
            backing,
            load,
            lives: Arc::clone(lives),
            events,
            layout: OnceLock::new(),
            steps: Mutex::default(),
            pager: Mutex::new(None),
            dropped: AtomicBool::new(false),
            before,
            vm: OnceLock::new(),
        })
    }

    /// The guest, once it runs here.
    #[track_caller]
    pub fn vm(&self) -> &Arc<Vm> {
        wait_for("the guest to run at the destination", || self.vm.get().is_some());
        &self.vm.get().unwrap().0
    }

    pub fn has_run(&self) -> bool {
        self.vm.get().is_some()
    }

    /// Checks that all of the guest is here, and goes on.
    #[track_caller]
    pub fn assert_goes_on(&self) {
        let vm = self.vm();
        assert!(vm.is_running());
        vm.work(50);
        vm.verify();
        self.lives.assert_never_two();
    }

    /// Checks that nothing of the guest is here.
    #[track_caller]
    pub fn assert_dropped(&self) {
        assert!(self.dropped.load(SeqCst), "the guest was not dropped");
        assert!(!self.has_run());
    }
}

impl DestinationGuest for Destination {
    fn prepare(&self, regions: &[RegionInfo]) -> Result<Layout, GuestError> {
        (self.before)("prepare")?;
        let shapes: Vec<_> = regions
            .iter()
            .map(|region| {
                (region.guest_base, Shape { backing: self.backing, bytes: region.length })
            })
            .collect();
        let layout = make(&shapes);
        self.layout.set(layout.clone()).expect("prepared once");
        Ok(layout)
    }

    fn deliver(&self, builder: Builder) -> Builder {
        builder.events(self.events)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), GuestError> {
        (self.before)("restore")?;
        assert_eq!((state.name.as_str(), state.version), ("test-threads", 1));
        let words = state.bytes.as_chunks::<8>().0;
        *self.steps.lock().unwrap() = words.iter().map(|w| u64::from_ne_bytes(*w)).collect();
        Ok(())
    }

    fn run(&self, pager: Option<Arc<Pager>>) -> Result<(), GuestError> {
        (self.before)("run")?;
        *self.pager.lock().unwrap() = pager;
        let layout = self.layout.get().expect("it was prepared").clone();
        let steps = self.steps.lock().unwrap().clone();
        let vm = Vm::new(layout, self.load, Arc::clone(&self.lives), &steps);
        vm.start();
        assert!(self.vm.set(EndVm(vm)).is_ok(), "run twice");
        Ok(())
    }

    fn drop_guest(&self) {
        self.dropped.store(true, SeqCst);
    }
}

/// Options that do not wait for long.
pub fn options(mode: Mode) -> MigrateOptions {
    let mut options = MigrateOptions::default();
    options.mode = mode;
    options.downtime = Duration::from_millis(50);
    options
}

pub fn local() -> Endpoint {
    "127.0.0.1:0".parse().unwrap()
}

pub fn listen(guest: &Arc<Destination>) -> DestinationMigration {
    listen_with(guest, ReceiveOptions::default())
}

pub fn listen_with(guest: &Arc<Destination>, options: ReceiveOptions) -> DestinationMigration {
    let guest: Arc<dyn DestinationGuest> = Arc::clone(guest) as _;
    DestinationMigration::listen(guest, &local(), options).unwrap()
}

pub fn start(guest: &Arc<Source>, to: Endpoint, options: MigrateOptions) -> SourceMigration {
    let guest: Arc<dyn SourceGuest> = Arc::clone(guest) as _;
    SourceMigration::start(guest, to, options).unwrap()
}
