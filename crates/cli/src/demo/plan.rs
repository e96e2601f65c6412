//! What a run is to be: what the options leave open is decided here, and what they contradict
//! each other in is refused.

use pageferry::{
    paging::{Delivery, Hints, choose_delivery},
    uffd,
};
use pageferry_kvm::{
    VcpuDelivery, choose,
    probe::{self, Probe, Status},
};
use pageferry_vmm::{Setup, VmConfig};

use super::args::{Args, BackingName, DeliveryName, GuestKind, InstallName, SetupName};
use crate::exit::Failure;

/// Which guest, and what only it needs to know.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Threads,
    Kvm(Setup),
}

/// What a run is to be.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) kind: Kind,
    pub(super) backing: BackingName,
    /// May be [`Delivery::Auto`] with threads: the engine chooses.
    pub(super) delivery: Delivery,
    /// Why the guest is what it is.
    pub(super) guest_why: String,
    /// Why that delivery, if that was decided here.
    pub(super) delivery_why: Option<String>,
}

/// What this host can do, asked for only as far as it matters.
pub(super) trait Host {
    /// What KVM can do.
    fn kvm(&self) -> &Probe;
    /// Whether a userfaultfd sees faults that the kernel takes; or why there is none at all.
    fn kernel_faults(&self) -> Result<bool, String>;
}

/// The host that this runs on.
pub(super) struct ThisHost;

impl Host for ThisHost {
    fn kvm(&self) -> &Probe {
        probe::host()
    }

    fn kernel_faults(&self) -> Result<bool, String> {
        let opened = uffd::Options::new().open();
        opened.map(|opened| !opened.user_mode_only()).map_err(|error| error.to_string())
    }
}

impl Plan {
    /// Decides.
    ///
    /// # Errors
    /// Options that contradict each other; something the host lacks.
    pub(super) fn new(args: &Args, host: &dyn Host) -> Result<Self, Failure> {
        match args.guest {
            Some(GuestKind::Threads) => Self::threads(args, "as asked".to_owned()),
            Some(GuestKind::Kvm) => Self::kvm(args, host, "as asked".to_owned()),
            None => {
                let why = "KVM runs guests here";
                Self::kvm(args, host, why.to_owned()).or_else(|failure| {
                    match for_vcpus_only(args) {
                        // Threads cannot have it: what is wrong is what KVM lacks.
                        Some(_) => Err(failure),
                        None => Self::threads(args, format!("no KVM guest: {failure}")),
                    }
                })
            }
        }
    }

    fn threads(args: &Args, guest_why: String) -> Result<Self, Failure> {
        if let Some(option) = for_vcpus_only(args) {
            return Err(Failure::usage(format!(
                "{option} is about vCPUs: it needs --guest kvm, not --guest threads"
            )));
        }
        Ok(Self {
            kind: Kind::Threads,
            backing: args.backing.unwrap_or(BackingName::Anon),
            delivery: args.delivery.delivery(),
            guest_why,
            delivery_why: None,
        })
    }

    fn kvm(args: &Args, host: &dyn Host, guest_why: String) -> Result<Self, Failure> {
        let (backing, setup) = memory(args)?;
        check_kvm_options(args, setup)?;
        let Some(wanted) = args.delivery.for_vcpus() else {
            return Err(Failure::usage(
                "--delivery signal is for threads: KVM touches the memory from within the kernel, \
                 where no SIGBUS handler runs; a KVM guest takes exit, hybrid, or one of the queues",
            ));
        };
        let probe = host.kvm();
        for needed in [probe::DEVICE, probe::RUNS] {
            if let Some(finding) = probe.find(needed).filter(|found| found.status != Status::Works)
            {
                return Err(Failure::missing(format!("a KVM guest cannot run here: {finding}")));
            }
        }
        let kernel_faults = host.kernel_faults().map_err(Failure::missing)?;
        let (delivery, why) = delivery(args, setup, wanted, probe, kernel_faults)?;
        Ok(Self { kind: Kind::Kvm(setup), backing, delivery, guest_why, delivery_why: Some(why) })
    }
}

/// The option, if there is one, that only a KVM guest can have.
fn for_vcpus_only(args: &Args) -> Option<String> {
    if let Some(setup) = args.setup {
        return Some(format!("--setup {setup}"));
    }
    let exits = matches!(args.delivery, DeliveryName::Exit | DeliveryName::Hybrid);
    exits.then(|| format!("--delivery {}", args.delivery))
}

/// What the memory is made of, and how it is mapped.
fn memory(args: &Args) -> Result<(BackingName, Setup), Failure> {
    let hybrid = args.delivery == DeliveryName::Hybrid;
    let backing = args.backing.unwrap_or(match args.setup {
        None if hybrid => BackingName::Memfd,
        None | Some(SetupName::Missing) => BackingName::Anon,
        Some(SetupName::Minor | SetupName::MinorOwnView | SetupName::NoQueue) => BackingName::Memfd,
    });
    let huge = matches!(backing, BackingName::Hugetlb2m | BackingName::Hugetlb1g);
    let setup = args.setup.unwrap_or(match backing {
        BackingName::Anon => SetupName::Missing,
        _ if huge && args.install == InstallName::Copy => SetupName::Missing,
        _ if hybrid => SetupName::MinorOwnView,
        _ => SetupName::Minor,
    });
    match (setup, backing) {
        (SetupName::Missing, BackingName::Memfd) => Err(Failure::usage(
            "--setup missing has one mapping of anonymous memory or of huge pages: it does not go \
             with --backing memfd, for which there is --setup minor",
        )),
        (SetupName::Minor | SetupName::MinorOwnView | SetupName::NoQueue, BackingName::Anon) => {
            Err(Failure::usage(format!(
                "--setup {setup} needs memory that can be mapped twice: --backing memfd, \
                 hugetlb-2m or hugetlb-1g, not anon"
            )))
        }
        _ => Ok((backing, setup.setup())),
    }
}

fn check_kvm_options(args: &Args, setup: Setup) -> Result<(), Failure> {
    let (delivery, install) = (args.delivery, args.install);
    let missing = setup == Setup::Missing;
    let fits = match install {
        InstallName::Auto => true,
        InstallName::Copy | InstallName::Move => missing,
        InstallName::Continue => !missing,
    };
    if !fits {
        let how = if missing { "COPY or MOVE" } else { "CONTINUE" };
        return Err(Failure::usage(format!(
            "--install {install} does not go with the set-up {setup} of a KVM guest, whose pages \
             are installed by {how}"
        )));
    }
    let exits = matches!(delivery, DeliveryName::Exit | DeliveryName::Hybrid);
    if install == InstallName::Move && exits {
        return Err(Failure::usage(format!(
            "--install move does not go with --delivery {delivery}: MOVE does not replace the \
             markers that vCPUs leave KVM_RUN for"
        )));
    }
    if setup == Setup::NoQueue && !matches!(delivery, DeliveryName::Auto | DeliveryName::Exit) {
        return Err(Failure::usage(format!(
            "--setup no-queue does not go with --delivery {delivery}: nobody reads a queue, all \
             that there is is --delivery exit"
        )));
    }
    if args.threads.get() > VmConfig::MAX_VCPUS {
        return Err(Failure::usage(format!(
            "--threads {}: a KVM guest has {} vCPUs at most",
            args.threads,
            VmConfig::MAX_VCPUS
        )));
    }
    Ok(())
}

/// How a KVM guest's faults are delivered, and why.
fn delivery(
    args: &Args,
    setup: Setup,
    wanted: VcpuDelivery,
    probe: &Probe,
    kernel_faults: bool,
) -> Result<(Delivery, String), Failure> {
    const NO_KERNEL_FAULTS: &str = "the userfaultfd that this user can have sees no faults that \
         KVM takes, which rules out queues (see `pageferry doctor`)";
    let hints = pageferry_kvm::Hints {
        vcpus: Some(args.threads.get()),
        // The machine has them in memory of their own.
        guest_page_tables_resident: true,
        // Whoever verifies asks first, unless there is a view with a queue for that.
        only_vcpus: setup != Setup::MinorOwnView,
        measured: None,
    };
    let choose = |wanted| {
        let chosen = choose(wanted, probe, &hints);
        chosen.map_err(|error| Failure::missing(error.to_string()))
    };
    let auto = wanted == VcpuDelivery::Auto;
    let by_exit =
        if setup == Setup::MinorOwnView { VcpuDelivery::Hybrid(0) } else { VcpuDelivery::Exit };
    if setup == Setup::NoQueue && auto {
        let (delivery, _) = choose(VcpuDelivery::Exit)?;
        return Ok((delivery, "the set-up no-queue has no other".to_owned()));
    }
    if args.install == InstallName::Move && auto {
        if !kernel_faults {
            return Err(Failure::missing(format!("--install move: {NO_KERNEL_FAULTS}")));
        }
        let hints = Hints { guest_threads: hints.vcpus, user_mode_only: false };
        let (delivery, why) = choose_delivery(Delivery::Auto, hints, false, false);
        return Ok((delivery, format!("MOVE does not replace the markers of exits; {why}")));
    }
    if !kernel_faults {
        return match wanted {
            VcpuDelivery::Auto => {
                let (delivery, _) = choose(by_exit)?;
                Ok((delivery, NO_KERNEL_FAULTS.to_owned()))
            }
            VcpuDelivery::Exit | VcpuDelivery::Hybrid(_) => choose(wanted),
            _ => Err(Failure::missing(format!("--delivery {}: {NO_KERNEL_FAULTS}", args.delivery))),
        };
    }
    choose(wanted)
}

#[cfg(test)]
mod tests;
