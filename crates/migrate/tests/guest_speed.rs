//! How fast guests move, beside plainly sending the same bytes. Not run by itself: build with
//! `--release` and ask for ignored tests.

mod guest_common;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Instant,
};

use guest_common::*;
use pageferry_memory::{Backing, Layout, RegionId};
use pageferry_migrate::{Compression, Mode, Outcome, Stage};
use pageferry_testing::Random;

const MIB: u64 = 1 << 20;

/// Sends all of the memory over a loopback connection; bytes a second.
fn plainly(layout: &Layout) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let total = layout.total_bytes();
    // Into fresh memory, as a migration does.
    let to = guest_common::layout(Backing::Anonymous, total);
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 256 << 10];
        for (_, region) in to.iter() {
            let mut at = 0;
            while at < region.len() {
                let most = buffer.len().min((region.len() - at) as usize);
                let n = stream.read(&mut buffer[..most]).unwrap();
                region.guest_view().write_at(at, &buffer[..n]).unwrap();
                at += n as u64;
            }
        }
    });
    let mut stream = TcpStream::connect(address).unwrap();
    let begun = Instant::now();
    let mut buffer = vec![0; 256 << 10];
    for (_, region) in layout.iter() {
        for at in (0..region.len()).step_by(buffer.len()) {
            region.guest_view().read_at(at, &mut buffer).unwrap();
            stream.write_all(&buffer).unwrap();
        }
    }
    receiver.join().unwrap();
    total as f64 / begun.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn rates() {
    let bytes = 512 * MIB;
    let lives = Arc::new(Lives::default());
    for (name, load) in [("idle", Load::IDLE), ("busy", Load { vcpus: 1, burst: 20 })] {
        for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
            let memory = layout(Backing::Anonymous, bytes);
            let source = Source::new(memory.clone(), load, &lives);
            let plain = plainly(&memory);
            let destination = Destination::new(Backing::Anonymous, load, &lives);
            let receiving = listen(&destination);
            let mut options = options(mode);
            options.compression = Compression::None;
            let begun = Instant::now();
            let sending = start(&source, receiving.endpoint().unwrap(), options);
            assert_eq!(sending.wait().unwrap(), Outcome::Completed);
            let took = begun.elapsed();
            receiving.wait().unwrap();
            let (status, there) = (sending.status(), receiving.status());
            let sent = status.counts.data * PAGE;
            println!(
                "{name} {mode:?}: {took:?}, {:.0} MB/s of pages sent, {:.2} of plain; downtime {:?}; {:?}",
                sent as f64 / took.as_secs_f64() / 1e6,
                sent as f64 / took.as_secs_f64() / plain,
                status.downtime,
                status.counts,
            );
            drop(there);
            destination.assert_goes_on();
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn latency_of_faults() {
    let bytes = 256 * MIB;
    let lives = Arc::new(Lives::default());
    let memory = layout(Backing::Anonymous, bytes);
    let source = Source::new(memory, Load::IDLE, &lives);
    let destination = Destination::new(Backing::Anonymous, Load::IDLE, &lives);
    let receiving = listen(&destination);
    let mut options = options(Mode::PostCopy);
    options.compression = Compression::None;
    let sending = start(&source, receiving.endpoint().unwrap(), options);
    let vm = Arc::clone(destination.vm());
    let region = vm.layout.get(RegionId::new(1)).unwrap();
    let mut random = Random::new(3);
    let mut times = Vec::new();
    while sending.stage() != Stage::Completed {
        let page = random.below(region.len() / PAGE);
        let begun = Instant::now();
        region.guest_view().read_at(page * PAGE, &mut [0; 8]).unwrap();
        times.push(begun.elapsed());
    }
    sending.wait().unwrap();
    receiving.wait().unwrap();
    let faults: Vec<_> = {
        let mut faults: Vec<_> = times.into_iter().filter(|time| time.as_micros() > 10).collect();
        faults.sort();
        faults
    };
    if let Some(last) = faults.last() {
        println!(
            "{} reads waited: p50 {:?}, p99 {:?}, most {last:?}; {:?}; {:?}",
            faults.len(),
            faults[faults.len() / 2],
            faults[faults.len() * 99 / 100],
            sending.status().counts,
            sending.status().elapsed,
        );
    }
    destination.assert_goes_on();
}
