//! `pageferry migrate`: a guest is asked to move, and watched.

mod args;

use std::{io::IsTerminal as _, os::fd::AsFd as _};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};

pub(crate) use self::args::Args;
use self::args::{Action, GoArgs, endpoint};
use crate::{
    Context,
    exit::{Exit, Failure},
    signals::Signal,
    vm::{
        self,
        line::{Ended, Line},
        place::Name,
        protocol::{Heard, Reply, Request, Wire},
    },
};

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let Some(action) = &args.action else { return go(&args.go, context) };
    let (name, request) = match action {
        Action::Status(args) => return status(&args.name, context),
        Action::Cancel(args) => (&args.name, Request::Cancel),
        Action::Postcopy(args) => (&args.name, Request::PostCopy),
        Action::Recover(args) => (&args.name, Request::Recover { at: endpoint("--at", &args.at)? }),
        Action::Reclaim(args) => (&args.name, Request::Reclaim),
        Action::GiveUp(args) => (&args.name, Request::GiveUp),
        Action::Abandon(args) => (&args.name, Request::Abandon),
    };
    vm::done(vm::ask(name, &request, context)?, context)
}

fn status(name: &Name, context: &Context) -> anyhow::Result<Exit> {
    let reply = vm::ask(name, &Request::Migration, context)?;
    let Reply::Event(line) = &reply else { return Err(vm::unexpected(&reply)) };
    if context.output.json() {
        context.output.write_json_line(line)?;
    } else {
        context.output.write_text(&(line.text() + "\n"))?;
    }
    Ok(Exit::Success)
}

/// The line in a terminal that says where it stands, below what has happened.
struct View<'a> {
    bar: ProgressBar,
    context: &'a Context,
}

impl<'a> View<'a> {
    fn new(context: &'a Context) -> anyhow::Result<Self> {
        let seen = std::io::stderr().is_terminal() && !context.output.json();
        let bar = if seen { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("{spinner} {wide_msg}")?);
        Ok(Self { bar, context })
    }

    fn show(&self, line: &Line) -> std::io::Result<()> {
        if let Line::Progress(progress) = line {
            self.bar.set_message(progress.text());
            self.bar.tick();
        }
        self.bar.suspend(|| line.write(self.context.output))
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn go(args: &GoArgs, context: &Context) -> anyhow::Result<Exit> {
    let (name, request) = args.request()?;
    let mut wire = vm::connect(name)?;
    let view = View::new(context)?;
    let asked = Request::Migrate(request);
    let mut reply = vm::answer(&mut wire, name, &asked, Some(vm::TO_ANSWER), context)?;
    let mut asked_by = None;
    let mut moved = false;
    loop {
        let Reply::Event(line) = reply else { return Err(vm::unexpected(&reply)) };
        view.show(&line)?;
        moved |= line.is_moved();
        if let Line::Ended(ended) = line {
            drop(view);
            return came_to(name, &ended, asked_by);
        }
        let Some(next) = next(&mut wire, name, context, &mut asked_by)? else {
            let guest = match moved {
                true => "while the guest runs there, and some of its memory may never come",
                false => "and the guest with it",
            };
            let why = format!("the process of {name} has gone, {guest}");
            return Err(Failure::source_lost(why).into());
        };
        reply = next;
    }
}

/// Waits for the next line; a signal meanwhile calls the migration off, or ends this command.
/// `None` if the guest's process has gone.
fn next(
    wire: &mut Wire,
    name: &Name,
    context: &Context,
    asked_by: &mut Option<Signal>,
) -> anyhow::Result<Option<Reply>> {
    loop {
        let signals = asked_by.is_none().then(|| context.signals.as_fd());
        match wire.hear(signals, None).with_context(|| format!("listening to {name}"))? {
            Heard::Line(reply) => return Ok(Some(reply)),
            Heard::Closed | Heard::TimedOut => return Ok(None),
            Heard::Interrupted => {
                let Some(signal) = context.signals.caught() else { continue };
                *asked_by = Some(signal);
                match vm::ask(name, &Request::Cancel, context) {
                    Ok(_) => eprintln!("pageferry: {signal}: the migration is called off"),
                    Err(error) => {
                        // It goes on without this command, and whoever asked need not wait.
                        let stopped = anyhow::Error::new(Failure::interrupted(signal));
                        return Err(stopped.context(error.to_string()));
                    }
                }
            }
        }
    }
}

fn came_to(name: &Name, ended: &Ended, asked_by: Option<Signal>) -> anyhow::Result<Exit> {
    let place = match ended.guest.as_str() {
        "here" => format!("{name} goes on where it was"),
        "stopped-here" => format!("{name} stands still where it was"),
        "lost" => format!("{name} is lost"),
        _ => format!("{name} runs there"),
    };
    match (ended.outcome.as_str(), asked_by) {
        ("completed", _) => Ok(Exit::Success),
        ("cancelled", Some(signal)) => {
            Err(anyhow::Error::new(Failure::interrupted(signal)).context(place))
        }
        ("cancelled", None) => bail!("called off; {place}"),
        _ => {
            let why = ended.error.as_deref().unwrap_or("the migration failed");
            let why = format!("{why}; {place}");
            match ended.peer_lost {
                true => Err(Failure::source_lost(why).into()),
                false => bail!("{why}"),
            }
        }
    }
}
