//! What can become of a process, of the one that tracks it, and of the place its images go to, while
//! `pageferry dirty` and `pageferry checkpoint` work.

#[path = "common/chain.rs"]
mod chain;
mod common;
#[path = "../../checkpoint/tests/common/disk.rs"]
mod disk;
#[allow(dead_code)] // This uses a part of it.
#[path = "common/nobody.rs"]
mod nobody;
#[path = "common/tiny32.rs"]
mod tiny32;
#[path = "common/writer.rs"]
mod writer;

use std::{
    fs,
    path::{Path, PathBuf},
};

use chain::{Saying, assert_last_is, images, lines, named, of, verify};
use common::{Running, expect_code, pageferry, run, text, words};
use rustix::process::Signal;
use tiny32::Tiny32;
use writer::{Writer, can_track};

/// Not a test: what the children of the others do.
#[test]
fn writer() {
    writer::run();
}

/// A checkpoint without end.
fn checkpoint(writer: &Writer, to: &Path) -> Saying {
    let args = "--json checkpoint --rounds 1000000 --downtime 0s";
    Saying::start(of(writer, args).arg("--to").arg(to))
}

/// Waits until it has attached, or has completed this round.
#[track_caller]
fn wait_for(checkpoint: &mut Saying, step: Option<u64>) {
    checkpoint.wait_for(|line| match step {
        None => line["event"] == "attached",
        Some(round) => line["event"] == "round" && line["round"] == round,
    });
}

/// In the first round, between the first two, and later.
const STEPS: [Option<u64>; 3] = [None, Some(0), Some(3)];

#[test]
fn a_process_that_ends_while_its_checkpoint_is_made() {
    if !can_track() {
        return;
    }
    type End = fn(&mut Writer);
    let ends: [(&str, End); 2] = [("exits", Writer::exit), ("is killed", Writer::end)];
    for (how, end) in ends {
        for step in STEPS {
            let mut writer = Writer::start();
            let folder = tempfile::tempdir().expect("a folder");
            let mut checkpoint = checkpoint(&writer, folder.path());
            wait_for(&mut checkpoint, step);
            end(&mut writer);
            let output = checkpoint.end();
            expect_code(&output, 1);
            let said = text(&output);
            assert!(said.contains(&writer.pid().to_string()), "{how} at {step:?}: {said}");
            let words = ["ended", "memory is gone", "No such process"];
            assert!(words.iter().any(|word| said.contains(word)), "{how} at {step:?}: {said}");
            assert_last_is(folder.path(), named(&output).as_deref());
            // What was completed before it ended is there.
            let least = step.map_or(0, |round| round + 1);
            assert!(images(folder.path()).len() as u64 >= least, "{how} at {step:?}: {said}");
        }
    }
}

#[test]
fn a_process_that_starts_another_program_while_its_checkpoint_is_made() {
    if !can_track() {
        return;
    }
    for step in STEPS {
        let mut writer = Writer::start();
        let folder = tempfile::tempdir().expect("a folder");
        let mut checkpoint = checkpoint(&writer, folder.path());
        wait_for(&mut checkpoint, step);
        writer.exec();
        let output = checkpoint.end();
        expect_code(&output, 1);
        // Which of both it seems to be depends on when it is looked at.
        let words = ["another program", "has ended"];
        let said = text(&output);
        assert!(words.iter().any(|word| said.contains(word)), "{step:?}: {said}");
        assert_last_is(folder.path(), named(&output).as_deref());
        writer.assert_untouched();
    }
}

#[test]
fn a_process_that_starts_another_program_while_it_is_watched() {
    if !can_track() {
        return;
    }
    let mut writer = Writer::start();
    let mut dirty = Saying::start(&mut of(&writer, "--json dirty --interval 10ms"));
    dirty.next();
    writer.exec();
    let output = dirty.end();
    expect_code(&output, 1);
    assert!(text(&output).contains("another program"), "{}", text(&output));
    writer.assert_untouched();
}

/// The children are not tracked, and nobody is held up.
#[test]
fn a_process_that_forks_all_the_time() {
    if !can_track() {
        return;
    }
    let mut writer = Writer::start();
    writer.fork();
    let folder = tempfile::tempdir().expect("a folder");
    let args = "checkpoint --rounds 5 --downtime 0s";
    expect_code(&run(of(&writer, args).arg("--to").arg(folder.path())), 0);
    assert_eq!(images(folder.path()).len(), 6);
    verify(folder.path());
    let output = run(&mut of(&writer, "--json dirty --interval 20ms --for 400ms"));
    expect_code(&output, 0);
    assert!(lines(&output).iter().any(|sample| sample["written_pages"].as_u64() > Some(0)));
    writer.assert_untouched();
}

/// The one who stops a process is killed while it stands still: it goes on.
#[test]
fn a_checkpoint_that_is_killed_while_the_process_stands_still() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    for _ in 0..3 {
        let folder = tempfile::tempdir().expect("a folder");
        let args = "checkpoint --stop ptrace --rounds 0";
        let mut checkpoint = Running::start(of(&writer, args).arg("--to").arg(folder.path()));
        checkpoint.wait_until("it stands still", |_| (writer.state() == 't').then_some(()));
        checkpoint.signal(Signal::KILL);
        let output = checkpoint.end();
        assert_eq!(output.status.code(), None, "{output:?}");
        writer.assert_untouched();
        // An image is there or it is not.
        if !images(folder.path()).is_empty() {
            verify(folder.path());
        }
    }
}

/// The same where it is its control group that stands still.
#[test]
fn a_checkpoint_that_is_killed_while_the_control_group_is_frozen() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let Some(group) = Group::of(&writer) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let args = "--json checkpoint --stop cgroup --rounds 1 --downtime 0s";
    let output = run(of(&writer, args).arg("--to").arg(folder.path()));
    expect_code(&output, 0);
    let last = lines(&output).into_iter().rfind(|line| line["event"] == "round").expect("rounds");
    assert_eq!(last["stopped_by"], "cgroup");
    for number in 0..3 {
        let to = folder.path().join(number.to_string());
        let args = "checkpoint --stop cgroup --rounds 0";
        let mut checkpoint = Running::start(of(&writer, args).arg("--to").arg(&to));
        checkpoint.wait_until("it stands still", |_| group.is_frozen().then_some(()));
        checkpoint.signal(Signal::KILL);
        let output = checkpoint.end();
        assert_eq!(output.status.code(), None, "{output:?}");
        common::wait_for("it is thawed", || (!group.is_frozen()).then_some(()));
        writer.assert_untouched();
    }
}

/// Whoever interrupts the wait for a process that does not stop has interrupted it.
#[test]
fn ctrl_c_while_a_process_does_not_stop() {
    if !can_track() {
        return;
    }
    let writer = Writer::start();
    let Some(group) = Group::of(&writer) else { return };
    fs::write(group.0.join("cgroup.freeze"), "1").expect("frozen");
    common::wait_for("it stands still", || group.is_frozen().then_some(()));
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().to_str().expect("UTF-8");
    let never = [
        "dirty --for 1h --method wp-async".to_owned(),
        format!("checkpoint --method wp-async --to {to}"),
    ];
    for args in &never {
        // Not interrupted, it says why it cannot be.
        let output = run(&mut of(&writer, args));
        expect_code(&output, 1);
        let mut command = Running::start(&mut of(&writer, args));
        command.wait_catches(Signal::INT);
        command.signal(Signal::INT);
        let output = command.end();
        expect_code(&output, 130);
        assert!(text(&output).contains("SIGINT"), "{args}: {}", text(&output));
    }
    assert_eq!(images(folder.path()), [""; 0]);
    fs::write(group.0.join("cgroup.freeze"), "0").expect("thawed");
    writer.assert_untouched();
}

/// A control group that has nobody but a writer in it; removed on drop, with the writer.
struct Group(PathBuf);

impl Group {
    /// `None`, having said so, where none can be made.
    fn of(writer: &Writer) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the mounts");
        let mounted = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
        let root = Path::new(mounted.and_then(|line| line.split(' ').nth(1)).unwrap_or("/none"));
        let path = root.join(format!("pageferry-fates-{}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            println!("skipped: needs control groups of version 2: {}: {error}", path.display());
            return None;
        }
        let group = Self(path);
        fs::write(group.0.join("cgroup.procs"), writer.pid().to_string()).expect("moved");
        Some(group)
    }

    fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.0.join("cgroup.events")).expect("its state");
        events.contains("frozen 1")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What is left of a test that failed may be frozen.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        common::wait_for("an empty control group", || fs::remove_dir(&self.0).ok());
    }
}

/// No system call is made in the name of a process that it could kill, or that it is not for.
#[test]
fn processes_in_whose_name_no_system_call_is_made() {
    if !can_track() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let confined = Writer::start_with(nobody::without_userfaultfd);
    refused(&confined.pid().to_string(), "confined by seccomp", folder.path());
    confined.assert_untouched();
    if let Some(tiny) = Tiny32::start(folder.path()) {
        refused(&tiny.pid().to_string(), "is a 32-bit program", folder.path());
        tiny.assert_untouched();
    }
}

#[track_caller]
fn refused(pid: &str, why: &str, folder: &Path) {
    let directory = folder.join(pid);
    let to = directory.to_str().expect("UTF-8");
    for method in ["wp-async", "wp-blocking"] {
        for (command, instead) in [("dirty", "soft-dirty"), ("checkpoint", "--rounds 0")] {
            let mut asked = pageferry([command, "--pid", pid, "--method", method]);
            if command == "checkpoint" {
                asked.args(["--to", to]);
            }
            let output = run(&mut asked);
            expect_code(&output, 1);
            let said = text(&output);
            assert!(said.contains(why) && said.contains(pid), "{command}: {said}");
            assert!(said.contains(instead), "what can be done: {said}");
        }
    }
    assert_eq!(images(&directory), [""; 0]);
    // And it can be.
    let args = format!("checkpoint --pid {pid} --rounds 0 --to {to}");
    expect_code(&run(&mut pageferry(words(&args))), 0);
    verify(&directory);
}

/// A method that the kernel has not is something that the host lacks.
#[test]
fn a_method_that_there_is_not() {
    if !can_track() {
        return;
    }
    let doctor = common::json(&run(&mut pageferry(["--json", "doctor"])));
    let findings = doctor["findings"].as_array().expect("findings");
    if findings.iter().any(|one| one["id"] == "soft-dirty" && one["status"] == "works") {
        println!("skipped: needs a kernel without soft-dirty bits");
        return;
    }
    let writer = Writer::start();
    let folder = tempfile::tempdir().expect("a folder");
    for command in ["dirty --method soft-dirty", "checkpoint --method soft-dirty"] {
        let mut command = of(&writer, command);
        if command.get_args().any(|word| word == "checkpoint") {
            command.arg("--to").arg(folder.path());
        }
        let output = run(&mut command);
        expect_code(&output, 3);
        assert!(text(&output).contains("CONFIG_MEM_SOFT_DIRTY"), "{}", text(&output));
    }
    // Times beyond any clock.
    let output = run(&mut of(&writer, "dirty --interval 500000000000y"));
    expect_code(&output, 2);
    let mut dirty = Saying::start(&mut of(&writer, "--json dirty --interval 5ms --for 99999999y"));
    dirty.next();
    dirty.running.signal(Signal::INT);
    expect_code(&dirty.end(), 130);
    writer.assert_untouched();
}

#[test]
fn a_disk_that_is_full() {
    if !can_track() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let Some(_disk) = disk::small_disk(folder.path(), 16 << 20) else { return };
    let writer = Writer::start();
    let output = checkpoint(&writer, folder.path()).end();
    expect_code(&output, 1);
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    let last = named(&output).expect("room for one");
    assert_last_is(folder.path(), Some(&last));
    writer.assert_untouched();
    // Nothing of what was begun takes room.
    let names = fs::read_dir(folder.path()).expect("the folder");
    assert_eq!(names.count(), images(folder.path()).len());
}

#[test]
fn a_directory_that_is_gone() {
    if !can_track() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("checkpoints");
    let writer = Writer::start();
    let mut checkpoint = checkpoint(&writer, &directory);
    wait_for(&mut checkpoint, Some(1));
    fs::rename(&directory, folder.path().join("elsewhere")).expect("renamed");
    let output = checkpoint.end();
    expect_code(&output, 1);
    let said = text(&output);
    assert!(said.contains(directory.to_str().expect("UTF-8")), "{said}");
    // What is missed first depends on how far it was.
    let words = ["No such file or directory", "is missing"];
    assert!(words.iter().any(|word| said.contains(word)), "{said}");
    // Whatever was complete by then is where it went.
    let last = named(&output).expect("two rounds were complete");
    let name = Path::new(&last).file_name().expect("a name");
    let elsewhere = folder.path().join("elsewhere");
    assert_last_is(&elsewhere, elsewhere.join(name).to_str());
    assert!(!directory.exists(), "nobody makes it again");
    writer.assert_untouched();
}

/// Where there can be no directory.
#[test]
fn a_directory_that_cannot_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("written");
    let writer = Writer::start();
    for to in [file.clone(), file.join("below")] {
        let output = run(of(&writer, "checkpoint").arg("--to").arg(&to));
        expect_code(&output, 1);
        assert!(text(&output).contains(to.to_str().expect("UTF-8")), "{}", text(&output));
    }
    writer.assert_untouched();
}
