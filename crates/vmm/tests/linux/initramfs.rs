//! A guest's first file system: an archive as `cpio -H newc` makes it. Source: the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::{fs::File, io::Write, path::Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTERS: u32 = 0o020_600;

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            contents.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").into_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Writes one with this very program as its `/init`, and the modules of `guest` in `/modules`.
pub fn write(guest: &Path, to: &mut File) {
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "proc", "sys", "tmp"] {
        archive.add(directory, DIRECTORY, (0, 0), &[]);
    }
    archive.add("dev/console", CHARACTERS, (5, 1), &[]);
    let init = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    archive.add("init", PROGRAM, (0, 0), &init);
    let modules = guest.join("modules");
    let order = std::fs::read(modules.join("order")).unwrap();
    archive.add("modules/order", PROGRAM, (0, 0), &order);
    for name in String::from_utf8(order).unwrap().lines() {
        let module = std::fs::read(modules.join(name)).unwrap();
        archive.add(&format!("modules/{name}"), PROGRAM, (0, 0), &module);
    }
    archive.add("TRAILER!!!", 0, (0, 0), &[]);
    to.write_all(&archive.bytes).unwrap();
}
