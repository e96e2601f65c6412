//! `pageferry doctor`: what this host can do, each line found by doing.

mod finding;
#[allow(unsafe_code)]
mod host;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod kvm;
mod picks;
mod userfaultfd;

use serde::Serialize;

use self::{finding::Finding, picks::Pick};
use crate::{
    Context,
    exit::{self, Exit},
    output::Output,
};

const EXAMPLES: &str = "\
Examples:
  pageferry doctor
  pageferry doctor --json | jq '.findings[] | select(.status == \"missing\")'

Every line is found by doing, on small private mappings and a virtual machine of three pages.
Nothing on the host is changed. For what is missing it says what that costs, and how to get it.";

/// Report what this host can do, and what is missing
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {}

/// The result. Its JSON form is part of the command's interface.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    findings: Vec<Finding>,
    /// The deliveries that would be picked, each with its reason.
    picks: Vec<Pick>,
}

pub(crate) fn run(_args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let mut findings = host::findings();
    findings.extend(userfaultfd::findings());
    findings.extend(kvm_findings());
    let picks = picks::picks(&findings);
    let report = Report { version: env!("CARGO_PKG_VERSION"), findings, picks };
    write(&report, context.output)?;
    // Served faults are what everything else needs; the rest is worth having.
    Ok(if report.picks.is_empty() { Exit::MissingCapability } else { Exit::Success })
}

#[cfg(target_arch = "x86_64")]
fn kvm_findings() -> Vec<Finding> {
    kvm::findings()
}

#[cfg(not(target_arch = "x86_64"))]
fn kvm_findings() -> Vec<Finding> {
    vec![Finding::untested(finding::Group::Kvm, "kvm", "KVM", "only x86-64 guests are known")]
}

fn write(report: &Report, output: Output) -> std::io::Result<()> {
    if output.json() {
        return output.write_json(report);
    }
    let mut text = finding::render(&report.findings);
    text.push_str(&picks::render(&report.picks));
    output.write_text(&text)
}
