//! `pageferry vm receive`: the process of a guest that comes from elsewhere.

use std::sync::{Arc, mpsc};

use anyhow::Context as _;
use pageferry::migrate::{DestinationMigration, Endpoint, Event, MigrateError, ReceiveOptions};
use pageferry_vmm::{MachineDestination, MachineSource};

use super::{
    args::ReceiveArgs,
    host::{Fate, Host},
    line::{Ended, Faults, Line, Progress},
    place::Place,
    sending::{follow, is_peer_lost},
};
use crate::{
    Context,
    exit::{Exit, Failure},
    output::Output,
};

pub(super) fn run(args: &ReceiveArgs, context: &Context) -> anyhow::Result<Exit> {
    let endpoint: Endpoint =
        args.listen.parse().map_err(|error| Failure::usage(format!("--listen: {error}")))?;
    let control = Place::open()?.take(&args.name)?;
    let host = Arc::new(Host::new(args.name.clone(), args.tracking())?);
    let place = Arc::new(MachineDestination::new(args.arrival()));
    let (sender, events) = mpsc::channel();
    let mut options = ReceiveOptions::default();
    options.max_memory = args.max_memory.unwrap_or(options.max_memory);
    options.observer = Some(Arc::new(move |event: &Event| {
        // Nobody listens any more when it is over.
        let _ = sender.send(event.clone());
    }));
    let migration = DestinationMigration::listen(Arc::clone(&place) as _, &endpoint, options)?;
    let migration = Arc::new(migration);
    let address = migration.endpoint().map_or_else(|| endpoint.to_string(), |at| at.to_string());
    let socket = control.path.display().to_string();
    let (name, pid) = (args.name.to_string(), std::process::id());
    Line::Listening { name, pid, address, socket: socket.clone() }.write(context.output)?;
    host.awaits(Arc::clone(&migration));
    let arriving = Arriving { host: Arc::clone(&host), place, output: context.output, socket };
    let thread = std::thread::Builder::new()
        .name("arriving".to_owned())
        .spawn(move || arriving.run(migration, &events))
        .context("starting a thread")?;
    let exit = host.serve(control, context);
    if thread.join().is_err() {
        anyhow::bail!("the thread that receives the guest panicked");
    }
    exit
}

struct Arriving {
    host: Arc<Host>,
    place: Arc<MachineDestination>,
    output: Output,
    socket: String,
}

impl Arriving {
    /// Until all of the guest is here, or it will not come.
    fn run(&self, migration: Arc<DestinationMigration>, events: &mpsc::Receiver<Event>) {
        follow(events, |event| {
            self.look();
            let status = migration.status();
            let waited = self.host.waited(&status);
            match event {
                Some(event) => Line::of(event).into_iter().for_each(|line| self.say(&line)),
                // There is nothing to be told of who only waits.
                None if status.memory == 0 => {}
                None => self.say(&Line::Progress(Progress::of_destination(&status, waited))),
            }
        });
        let result = migration.wait();
        self.look();
        let status = migration.status();
        let mut ended = Ended::of_destination(&status, self.host.waited(&status));
        if let Some(machine) = self.place.machine()
            && let Some(pager) = machine.pager()
        {
            ended.faults = Faults::of(&pager.pager().statistics());
        }
        let came = self.host.has_guest();
        let guest = if came { "here" } else { "there" };
        let outcome = match &result {
            Ok(()) => "completed",
            Err(error) if matches!(**error, MigrateError::CalledOff(_)) => "cancelled",
            Err(_) => "failed",
        };
        (ended.outcome, ended.guest) = (outcome.to_owned(), guest.to_owned());
        ended.error = result.as_ref().err().map(ToString::to_string);
        ended.peer_lost = result.as_ref().is_err_and(|error| is_peer_lost(error));
        self.say(&Line::Ended(ended.clone()));
        let peer_lost = ended.peer_lost;
        match result {
            // One whose missing memory was given up runs on, until it touches it.
            _ if came => self.host.arrived(ended),
            Ok(()) => {
                let why = "it was received, and does not run".to_owned();
                self.host.end(Fate::NeverCame { why, peer_lost });
            }
            Err(error) => {
                self.host.end(Fate::NeverCame { why: error.to_string(), peer_lost });
            }
        }
    }

    /// Takes the guest over once it runs.
    fn look(&self) {
        if !self.host.has_guest()
            && let Some(machine) = self.place.machine()
        {
            self.host.runs(Arc::new(MachineSource::new(machine, self.host.tracking)));
            self.say(&self.host.running_line(self.socket.as_ref()));
        }
    }

    fn say(&self, line: &Line) {
        if let Err(error) = line.write(self.output) {
            eprintln!("pageferry: writing to standard output: {error}");
        }
    }
}
