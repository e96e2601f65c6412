//! What a migration is compared with: the same bytes, sent and received plainly, between two
//! processes, over as many connections, from and to memory of the same kind.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    slice, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use pageferry::memory::{GuestAddress, Region, RegionConfig};
use pageferry_vmm::Pattern;
use serde::{Deserialize, Serialize};

use super::{
    case::Backing,
    end::{self, Listening},
};

/// What is sent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Plain {
    pub(super) memory_bytes: u64,
    pub(super) backing: Backing,
    pub(super) connections: u16,
}

/// What the source measured: from connecting to hearing that all has come.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlainSent {
    pub(super) total: Duration,
}

/// That all has come, and as it was sent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlainReceived {}

/// Where the bytes are said to be, which says what they are.
const BASE: GuestAddress = GuestAddress::new(1 << 30);

impl Plain {
    fn memory(&self) -> anyhow::Result<Memory> {
        let config = RegionConfig::new(self.memory_bytes, self.backing.memory());
        let region = Region::new(&config)
            .with_context(|| format!("{} bytes of {} memory", self.memory_bytes, self.backing))?;
        Ok(Memory(region))
    }

    /// How much the first connections carry, each. The last ones may carry less.
    fn part(&self) -> usize {
        self.memory_bytes.div_ceil(self.connections.max(1).into()) as usize
    }
}

/// Memory that nobody else has.
struct Memory(Region);

impl Memory {
    fn bytes(&mut self) -> &mut [u8] {
        let view = self.0.guest_view();
        // SAFETY: the mapping is readable and writable, lives as long as the region, which is
        // borrowed for as long as the slice is, and is known to nobody but this value.
        unsafe { slice::from_raw_parts_mut(view.as_ptr(), self.0.len() as usize) }
    }
}

pub(super) fn send(plain: &Plain, to: &str) -> anyhow::Result<PlainSent> {
    let mut memory = plain.memory()?;
    Pattern::default().fill(BASE, memory.bytes());
    let begun = Instant::now();
    thread::scope(|scope| {
        let parts = (0_u16..).zip(memory.bytes().chunks(plain.part()));
        let sending: Vec<_> =
            parts.map(|(number, part)| scope.spawn(move || send_part(number, part, to))).collect();
        sending.into_iter().try_for_each(|one| one.join().expect("no sender panics"))
    })?;
    Ok(PlainSent { total: begun.elapsed() })
}

fn send_part(number: u16, part: &[u8], to: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.write_all(&number.to_le_bytes()).context("sending")?;
    stream.write_all(part).context("sending")?;
    stream.read_exact(&mut [0]).context("waiting for the other side")
}

pub(super) fn receive(plain: &Plain) -> anyhow::Result<PlainReceived> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let mut memory = plain.memory()?;
    end::tell(&Listening { at: listener.local_addr()?.to_string() })?;
    let mut parts: Vec<Option<&mut [u8]>> =
        memory.bytes().chunks_mut(plain.part()).map(Some).collect();
    thread::scope(|scope| {
        let mut receiving = Vec::new();
        for _ in 0..parts.len() {
            let (mut stream, _) = listener.accept().context("waiting for a connection")?;
            let mut number = [0; 2];
            stream.read_exact(&mut number).context("receiving")?;
            let number = usize::from(u16::from_le_bytes(number));
            let part = parts.get_mut(number).and_then(Option::take);
            let part = part.with_context(|| format!("part {number} is none, or came twice"))?;
            receiving.push(scope.spawn(move || receive_part(part, stream)));
        }
        receiving.into_iter().try_for_each(|one| one.join().expect("no receiver panics"))
    })?;
    let mut expected = vec![0; 1 << 20];
    let mut at = BASE.get();
    for found in memory.bytes().chunks(expected.len()) {
        let expected = &mut expected[..found.len()];
        Pattern::default().fill(GuestAddress::new(at), expected);
        ensure!(found == expected, "what was sent plainly has not come as it was");
        at += found.len() as u64;
    }
    Ok(PlainReceived {})
}

fn receive_part(part: &mut [u8], mut stream: TcpStream) -> anyhow::Result<()> {
    stream.read_exact(part).context("receiving")?;
    stream.write_all(&[0]).context("telling the other side")
}
