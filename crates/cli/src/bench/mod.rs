//! `pageferry bench`: measurements that anybody can repeat.

pub(crate) mod case;
mod dirty;
#[allow(unsafe_code)]
mod engine;
mod faults;
#[allow(unsafe_code)]
pub(crate) mod guest;
pub(crate) mod histogram;
mod median;
#[allow(unsafe_code)]
pub(crate) mod memory;
mod migrate;
#[allow(unsafe_code)]
mod reference;
mod vcpus;

use clap::Subcommand;

use crate::{
    Context,
    exit::{self, Exit},
};

const EXAMPLES: &str = "\
Examples:
  pageferry bench faults
  pageferry bench faults --threads 8,32 --json
  pageferry bench vcpus --vcpus 1,8
  pageferry bench dirty --share 1
  pageferry bench migrate --mode post";

/// Measure this host and the engine on it
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand, Debug)]
enum Benchmark {
    Faults(faults::Args),
    Vcpus(vcpus::Args),
    Dirty(dirty::Args),
    Migrate(migrate::Args),
    #[command(hide = true)]
    MigrateEnd(migrate::end::Args),
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    match &args.benchmark {
        Benchmark::Faults(args) => faults::run(args, context),
        Benchmark::Vcpus(args) => vcpus::run(args, context),
        Benchmark::Dirty(args) => dirty::run(args, context),
        Benchmark::Migrate(args) => migrate::run(args, context),
        Benchmark::MigrateEnd(args) => migrate::end::run(args),
    }
}
