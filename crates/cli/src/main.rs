//! The `pageferry` command: what the library can do, for people and for scripts.

#![deny(unsafe_code)]

mod bench;
mod checkpoint;
mod demo;
mod dirty;
mod doctor;
mod exit;
mod image;
mod migrate;
mod output;
mod receive;
mod room;
mod serve;
#[allow(unsafe_code)]
mod signals;
mod size;
mod vm;

use std::{os::fd::AsFd as _, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use pageferry::migrate::Stop;

use crate::{
    exit::{Exit, Failure},
    output::Output,
    signals::Signals,
};

const EXAMPLES: &str = "\
Examples:
  pageferry demo
  pageferry doctor
  pageferry serve guest.mem --listen 127.0.0.1:7777
  pageferry dirty --pid 4711
  pageferry checkpoint --pid 4711 --to checkpoints/
  pageferry image ls checkpoints/
  pageferry vm run --name a
  pageferry migrate --from a --to 192.0.2.7:7000
  pageferry bench faults --threads 8
  pageferry bench faults --help";

/// Memory of KVM guests and processes that arrives on demand.
#[derive(Parser, Debug)]
#[command(name = "pageferry", version, propagate_version = true)]
#[command(after_help = exit::help(EXAMPLES))]
struct Cli {
    /// Print the result as JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Doctor(doctor::Args),
    Demo(demo::Args),
    Serve(serve::Args),
    Bench(bench::Args),
    Dirty(dirty::Args),
    Checkpoint(checkpoint::Args),
    Receive(receive::Args),
    Image(image::Args),
    Vm(vm::Args),
    Migrate(migrate::Args),
    #[command(hide = true)]
    DemoSource(demo::source::Args),
    #[command(hide = true)]
    DemoKeeper(demo::reserve::Args),
}

/// What every command is given.
#[derive(Debug)]
struct Context {
    output: Output,
    signals: Signals,
}

impl Context {
    /// An error if a signal has asked the command to stop.
    fn stop_if_asked(&self) -> anyhow::Result<()> {
        match self.signals.caught() {
            Some(signal) => Err(Failure::interrupted(signal).into()),
            None => Ok(()),
        }
    }

    /// The same for what waits for something itself.
    fn stop_signal(&self) -> anyhow::Result<Stop> {
        let event = self.signals.as_fd().try_clone_to_owned().context("duplicating an eventfd")?;
        Stop::when_readable(event).context("making an eventfd")
    }
}

fn run(cli: &Cli, context: &Context) -> anyhow::Result<Exit> {
    match &cli.command {
        Command::Doctor(args) => doctor::run(args, context),
        Command::Demo(args) => demo::run(args, context),
        Command::Serve(args) => serve::run(args, context),
        Command::Bench(args) => bench::run(args, context),
        Command::Dirty(args) => dirty::run(args, context),
        Command::Checkpoint(args) => checkpoint::run(args, context),
        Command::Receive(args) => receive::run(args, context),
        Command::Image(args) => image::run(args, context),
        Command::Vm(args) => vm::run(args, context),
        Command::Migrate(args) => migrate::run(args, context),
        Command::DemoSource(args) => demo::source::run(args, context),
        Command::DemoKeeper(args) => demo::reserve::keep(args),
    }
}

/// The error and its causes, each said once: most errors say their cause themselves.
fn describe(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            cause
        } else if text.ends_with(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

/// What `--json` prints on standard output when a command fails.
#[derive(serde::Serialize)]
struct ErrorReport {
    error: String,
    exit_code: u8,
}

/// What clap says, its way; and with `--json` (which it may not have come to) as a report too.
fn refuse(error: &clap::Error) -> ExitCode {
    let asked = std::env::args_os().skip(1).take_while(|argument| argument != "--");
    let json = error.use_stderr() && asked.into_iter().any(|argument| argument == "--json");
    let failed = |error: std::io::Error| {
        eprintln!("pageferry: writing to standard output: {error}");
        Exit::Failed.into()
    };
    if let Err(error) = error.print() {
        return failed(error);
    }
    if !json {
        return if error.use_stderr() { Exit::Usage } else { Exit::Success }.into();
    }
    let text = match error.kind() {
        clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing",
        _ => &error.to_string(),
    };
    // The error itself is the first paragraph; usage and hints follow.
    let paragraph: Vec<&str> =
        text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let text = paragraph.join(" ");
    let text = text.strip_prefix("error: ").unwrap_or(&text).to_owned();
    let report = ErrorReport { error: text, exit_code: Exit::Usage.code() };
    match Output::new(true).write_json(&report) {
        Ok(()) => Exit::Usage.into(),
        Err(error) => failed(error),
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let output = Output::new(cli.json);
    let result = Signals::install()
        .context("installing the handlers of SIGINT and SIGTERM")
        .and_then(|signals| run(&cli, &Context { output, signals }));
    let error = match result {
        Ok(exit) => return exit.into(),
        Err(error) => error,
    };
    let exit = exit::of_error(&error);
    let text = describe(&error);
    eprintln!("pageferry: {text}");
    if output.json() {
        let report = ErrorReport { error: text, exit_code: exit.code() };
        // On one line: of some commands it ends a stream of lines.
        if let Err(error) = output.write_json_line(&report) {
            eprintln!("pageferry: writing to standard output: {error}");
        }
    }
    exit.into()
}
