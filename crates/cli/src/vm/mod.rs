//! `pageferry vm`: guests, each with a process and a control socket of its own.

mod args;
mod connection;
mod host;
pub(crate) mod line;
pub(crate) mod place;
pub(crate) mod protocol;
mod receive;
mod sending;

use std::{os::fd::AsFd as _, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use pageferry_vmm::{Machine, MachineSource, Vm, VmError};

pub(crate) use self::args::Args;
use self::{
    args::{Command, RunArgs},
    host::Host,
    place::{Name, Place},
    protocol::{Heard, Reply, Request, Status, Wire},
};
use crate::{
    Context,
    exit::{Exit, Failure},
    output::{Align, Table},
    size,
};

/// For an answer that takes no work. Longer than any pause of the guest's.
pub(crate) const TO_ANSWER: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Run(args) => run_guest(args, context),
        Command::Receive(args) => receive::run(args, context),
        Command::List => list(context),
        Command::Status(args) => match ask(&args.name, &Request::Status, context)? {
            Reply::Status(status) => show(&status, context),
            other => Err(unexpected(&other)),
        },
        Command::Stop(args) => {
            // It may be in the middle of a migration, which is called off first.
            let mut wire = connect(&args.name)?;
            done(answer(&mut wire, &args.name, &Request::Stop, None, context)?, context)
        }
    }
}

/// For `map_err`: why there is no machine.
fn no_machine(error: VmError) -> anyhow::Error {
    match error {
        VmError::Config { .. } => Failure::usage(error.to_string()).into(),
        VmError::Kvm { .. } => Failure::missing(error.to_string()).into(),
        error => anyhow::Error::new(error).context("building the guest"),
    }
}

fn run_guest(args: &RunArgs, context: &Context) -> anyhow::Result<Exit> {
    let config = args.config().map_err(Failure::usage)?;
    let control = Place::open()?.take(&args.name)?;
    let vm = Arc::new(Vm::new(config).map_err(no_machine)?);
    vm.fill().context("filling the guest's memory")?;
    context.stop_if_asked()?;
    let machine = Arc::new(Machine::new(vm, None));
    machine.start().context("starting the guest")?;
    let host = Arc::new(Host::new(args.name.clone(), args.tracking())?);
    host.runs(Arc::new(MachineSource::new(machine, args.tracking())));
    host.running_line(&control.path).write(context.output)?;
    host.serve(control, context)
}

/// Asks the process of a guest something that takes it no time.
pub(crate) fn ask(name: &Name, request: &Request, context: &Context) -> anyhow::Result<Reply> {
    answer(&mut connect(name)?, name, request, Some(TO_ANSWER), context)
}

/// A connection to the process of a guest.
pub(crate) fn connect(name: &Name) -> anyhow::Result<Wire> {
    let Some(stream) = Place::open()?.connect(name)? else {
        bail!("there is no guest {name} here (`pageferry vm list`)");
    };
    Wire::new(stream).with_context(|| format!("asking {name}"))
}

/// The first answer. Whoever is asked may refuse, which is an error. Where it may take however long,
/// a signal ends the waiting.
pub(crate) fn answer(
    wire: &mut Wire,
    name: &Name,
    request: &Request,
    limit: Option<Duration>,
    context: &Context,
) -> anyhow::Result<Reply> {
    let what = || format!("asking {name}");
    wire.say(request).with_context(what)?;
    let signals = limit.is_none().then(|| context.signals.as_fd());
    match wire.hear(signals, limit).with_context(what)? {
        Heard::Line(Reply::Refused { why }) => bail!("{name}: {why}"),
        Heard::Line(reply) => Ok(reply),
        Heard::Closed => {
            Err(Failure::source_lost(format!("the process of {name} has gone")).into())
        }
        Heard::Interrupted => {
            context.stop_if_asked()?;
            bail!("interrupted by nobody")
        }
        Heard::TimedOut => bail!("the process of {name} does not answer"),
    }
}

pub(crate) fn unexpected(reply: &Reply) -> anyhow::Error {
    anyhow::anyhow!("an answer to something else: {reply:?}")
}

/// Says what was done.
pub(crate) fn done(reply: Reply, context: &Context) -> anyhow::Result<Exit> {
    let Reply::Done { said } = &reply else { return Err(unexpected(&reply)) };
    if context.output.json() {
        context.output.write_json_line(&reply)?;
    } else {
        context.output.write_text(&format!("{said}\n"))?;
    }
    Ok(Exit::Success)
}

fn show(status: &Status, context: &Context) -> anyhow::Result<Exit> {
    if context.output.json() {
        context.output.write_json(status)?;
        return Ok(Exit::Success);
    }
    let Status { name, pid, state, vcpus, memory_bytes, touches, listening } = status;
    let memory = size::display(*memory_bytes);
    let mut text = format!("{name} ({pid}): {state}\n");
    if let Some(address) = listening {
        text += &format!("  listens  {address}\n");
    }
    if *vcpus > 0 {
        text += &format!("  vCPUs    {vcpus}\n");
    }
    text += &format!("  memory   {memory}\n  touches  {touches} pages, each checked\n");
    context.output.write_text(&text)?;
    Ok(Exit::Success)
}

fn list(context: &Context) -> anyhow::Result<Exit> {
    let place = Place::open()?;
    let mut guests = Vec::new();
    for name in place.names()? {
        // One that ends just now, or was left behind, is not there.
        let Some(stream) = place.connect(&name)? else { continue };
        let wire = Wire::new(stream).with_context(|| format!("asking {name}"));
        let asked = wire.and_then(|mut wire| {
            answer(&mut wire, &name, &Request::Status, Some(TO_ANSWER / 5), context)
        });
        match asked {
            Ok(Reply::Status(status)) => guests.push(status),
            Ok(other) => eprintln!("pageferry: {name}: {}", unexpected(&other)),
            Err(error) => eprintln!("pageferry: {error:#}"),
        }
    }
    if context.output.json() {
        context.output.write_json(&guests)?;
        return Ok(Exit::Success);
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("PID", Align::Right),
        ("STATE", Align::Left),
        ("VCPUS", Align::Right),
        ("MEMORY", Align::Right),
        ("TOUCHES", Align::Right),
    ]);
    for Status { name, pid, state, vcpus, memory_bytes, touches, .. } in guests {
        let memory = size::display(memory_bytes);
        let numbers = [vcpus.to_string(), memory, touches.to_string()];
        let [vcpus, memory, touches] = numbers;
        table.row(vec![name, pid.to_string(), state, vcpus, memory, touches]);
    }
    context.output.write_text(&table.render())?;
    Ok(Exit::Success)
}
