//! One line of the report.

use std::fmt::Write as _;

use serde::Serialize;

/// What a finding is about; the report's headings, in their order.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Group {
    Host,
    Userfaultfd,
    Kvm,
}

impl Group {
    fn heading(self) -> &'static str {
        match self {
            Group::Host => "Host",
            Group::Userfaultfd => "userfaultfd and page tables",
            Group::Kvm => "KVM",
        }
    }
}

/// How it came out.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Status {
    /// It was done, and it worked.
    Works,
    /// It was tried, and is not there.
    Missing,
    /// It could not be tried; the detail says why.
    Untested,
    /// A fact that is neither good nor bad.
    Fact,
}

impl Status {
    fn label(self) -> &'static str {
        match self {
            Status::Works => "ok",
            Status::Missing => "MISSING",
            Status::Untested => "untested",
            Status::Fact => "",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    pub(super) group: Group,
    /// A stable name for programs.
    pub(super) id: String,
    /// The same for people.
    pub(super) what: String,
    pub(super) status: Status,
    /// The value found, or why it is missing or untested.
    pub(super) detail: Option<String>,
    /// What being without it costs. Only with [`Status::Missing`].
    pub(super) costs: Option<String>,
    /// How to get it. Only with [`Status::Missing`].
    pub(super) remedy: Option<String>,
}

impl Finding {
    fn new(group: Group, id: &str, what: &str, status: Status) -> Self {
        let (id, what) = (id.to_owned(), what.to_owned());
        Self { group, id, what, status, detail: None, costs: None, remedy: None }
    }

    pub(super) fn works(group: Group, id: &str, what: &str) -> Self {
        Self::new(group, id, what, Status::Works)
    }

    pub(super) fn fact(group: Group, id: &str, what: &str, value: impl Into<String>) -> Self {
        Self::new(group, id, what, Status::Fact).detail(value)
    }

    pub(super) fn untested(group: Group, id: &str, what: &str, why: impl Into<String>) -> Self {
        Self::new(group, id, what, Status::Untested).detail(why)
    }

    pub(super) fn missing(group: Group, id: &str, what: &str, why: impl Into<String>) -> Self {
        Self::new(group, id, what, Status::Missing).detail(why)
    }

    pub(super) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(super) fn costs(mut self, costs: impl Into<String>) -> Self {
        self.costs = Some(costs.into());
        self
    }

    pub(super) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// The findings as text, in groups.
pub(super) fn render(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.what.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    let mut group = None;
    for finding in findings {
        if group != Some(finding.group) {
            let gap = if group.is_some() { "\n" } else { "" };
            let _ = writeln!(text, "{gap}{}", finding.group.heading());
            group = Some(finding.group);
        }
        let Finding { what, status, detail, costs, remedy, .. } = finding;
        // A reason can be long: it gets a line of its own.
        let (inline, why) = match status {
            Status::Works | Status::Fact => (detail.as_deref(), &None),
            Status::Missing | Status::Untested => (None, detail),
        };
        let inline = inline.unwrap_or_default();
        let line = format!("  {:8}  {what:width$}  {inline}", status.label());
        text.push_str(line.trim_end());
        text.push('\n');
        for (label, note) in [("why", why), ("costs", costs), ("get it", remedy)] {
            if let Some(note) = note {
                let _ = writeln!(text, "            {label:>6}: {note}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_says_what_it_costs_and_how_to_get_it() {
        let text = render(&[
            Finding::fact(Group::Host, "kernel", "kernel", "Linux 6.18"),
            Finding::works(Group::Kvm, "a", "longer name"),
            Finding::missing(Group::Kvm, "b", "b", "no such file")
                .costs("speed")
                .remedy("modprobe"),
        ]);
        let expected = "\
Host
            kernel       Linux 6.18

KVM
  ok        longer name
  MISSING   b
               why: no such file
             costs: speed
            get it: modprobe
";
        assert_eq!(text, expected);
    }
}
