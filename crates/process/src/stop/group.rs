//! The control group of a process.
//!
//! Source: `Documentation/admin-guide/cgroup-v2.rst`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::process::Pid;

use crate::{ProcessError, status};

/// A group of version 2 in which a process is alone.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pid: Pid,
    directory: PathBuf,
}

impl Group {
    /// The group of a process, if it could be frozen for it alone.
    pub(super) fn of(pid: Pid) -> Result<Self, ProcessError> {
        let no = |why: &str| ProcessError::NoOwnGroup { pid, why: why.to_owned() };
        let directory = find(pid)?.ok_or_else(|| no("it is in no group of version 2 here"))?;
        let group = Self { pid, directory };
        if !group.freezer().exists() {
            return Err(no("the kernel cannot freeze groups of version 2"));
        }
        group.check_alone()?;
        if group.read("cgroup.freeze")?.trim() != "0" {
            return Err(no("it is frozen already, by somebody who may thaw it at any time"));
        }
        Ok(group)
    }

    /// The file that freezes it.
    pub(super) fn freezer(&self) -> PathBuf {
        self.directory.join("cgroup.freeze")
    }

    pub(super) fn failed(&self, doing: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
        let (pid, group) = (self.pid, self.directory.clone());
        move |source| ProcessError::Group { pid, group, doing, source }
    }

    fn read(&self, file: &str) -> Result<String, ProcessError> {
        fs::read_to_string(self.directory.join(file)).map_err(self.failed("read its files"))
    }

    /// Finds out whether nobody else would be frozen too.
    pub(super) fn check_alone(&self) -> Result<(), ProcessError> {
        let no = |why: String| Err(ProcessError::NoOwnGroup { pid: self.pid, why });
        // Of a threaded group the processes cannot be read, and it may have but some of the threads.
        if self.read("cgroup.type")?.trim() != "domain" {
            return no("its group is a threaded one".to_owned());
        }
        let processes = self.read("cgroup.procs")?;
        let others =
            processes.lines().filter(|other| other.parse() != Ok(self.pid.as_raw_pid())).count();
        if others > 0 {
            return no(format!("{others} other processes are in its group"));
        }
        let statistics = self.read("cgroup.stat")?;
        let below = statistics.lines().find_map(|line| line.strip_prefix("nr_descendants "));
        if below != Some("0") {
            return no("its group has groups below it".to_owned());
        }
        Ok(())
    }

    /// The file that says whether it is frozen, to be polled.
    pub(super) fn events(&self) -> Result<File, ProcessError> {
        File::open(self.directory.join("cgroup.events")).map_err(self.failed("watch its events"))
    }

    /// Whether all of it is frozen. Polling the file waits for a change from then on.
    pub(super) fn is_frozen(&self, events: &File) -> Result<bool, ProcessError> {
        let mut text = [0; 256];
        let read = events.read_at(&mut text, 0).map_err(self.failed("read its events"))?;
        Ok(text[..read].split(|&byte| byte == b'\n').any(|line| line == b"frozen 1"))
    }

    /// Freezes or thaws it. Thawing has happened when this returns, freezing may take a while.
    pub(super) fn set_frozen(&self, frozen: bool) -> Result<(), ProcessError> {
        let (value, doing) = if frozen { ("1", "freeze it") } else { ("0", "thaw it") };
        match fs::write(self.freezer(), value) {
            // A group is removed only when nobody is left in it.
            Err(error) if !frozen && status::is_gone(&error) => Ok(()),
            other => other.map_err(self.failed(doing)),
        }
    }
}

/// Where the group of a process is; `None` when it is the root, or is not mounted here.
fn find(pid: Pid) -> Result<Option<PathBuf>, ProcessError> {
    let text = |path: PathBuf| match fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if status::is_gone(&error) => {
            Err(ProcessError::Ended { pid, doing: "looking for its control group" })
        }
        Err(source) => Err(ProcessError::Proc { pid, path, source }),
    };
    let groups = text(status::path(pid, "cgroup"))?;
    let Some(name) = groups.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Ok(None);
    };
    if name == "/" {
        return Ok(None);
    }
    let mounts = text("/proc/self/mountinfo".into())?;
    Ok(mounts.lines().find_map(|line| directory(line, name)))
}

/// Whether the group that a process is in is frozen, be it its own or not.
pub(crate) fn is_frozen(pid: Pid) -> Result<bool, ProcessError> {
    let Some(directory) = find(pid)? else { return Ok(false) };
    let group = Group { pid, directory };
    // The file says so too where it is a group above that was frozen.
    group.is_frozen(&group.events()?)
}

/// Where a group is, by a line of `/proc/PID/mountinfo`; `None` when that is another mount.
fn directory(line: &str, name: &str) -> Option<PathBuf> {
    let (fields, kind) = line.split_once(" - ")?;
    if kind.split(' ').next() != Some("cgroup2") {
        return None;
    }
    let mut fields = fields.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    // Groups outside the namespace begin with `/..`, which is below no root that could be mounted.
    let below = if root == "/" { name } else { name.strip_prefix(root)? };
    let below = below.strip_prefix('/').unwrap_or(below);
    if below.split('/').any(|part| part == "..") {
        return None;
    }
    Some(Path::new(point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_below_their_mount() {
        let line = |root: &str| {
            format!("36 30 0:31 {root} /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw")
        };
        for (root, name, expected) in [
            ("/", "/a/b", Some("/sys/fs/cgroup/unified/a/b")),
            ("/a", "/a/b", Some("/sys/fs/cgroup/unified/b")),
            ("/x", "/a/b", None),
            ("/", "/../b", None),
        ] {
            assert_eq!(directory(&line(root), name), expected.map(PathBuf::from), "{root} {name}");
        }
        assert_eq!(directory("36 30 0:31 / /sys rw - sysfs sysfs rw", "/a"), None);
    }
}
