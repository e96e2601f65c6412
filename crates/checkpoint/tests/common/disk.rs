//! A disk that is soon full.
#![allow(unreachable_pub, reason = "test programs of two crates have it")]

use std::{path::Path, process::Command};

/// A file system of this size, unmounted on drop.
pub struct SmallDisk<'a>(&'a Path);

pub fn small_disk(at: &Path, bytes: u64) -> Option<SmallDisk<'_>> {
    let options = format!("size={bytes}");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(at).output();
    match mounted {
        Ok(output) if output.status.success() => Some(SmallDisk(at)),
        _ => {
            println!("skipped: needs the right to mount a tmpfs");
            None
        }
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(
            unmounted.is_ok_and(|status| status.success()),
            "{} is left mounted",
            self.0.display()
        );
    }
}
