//! A link that can be cut, stalled, and restored.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
    time::Duration,
};

use pageferry_migrate::Endpoint;

#[derive(Default)]
struct Shared {
    streams: Mutex<Vec<(TcpStream, TcpStream)>>,
    refusing: AtomicBool,
    stalled: AtomicBool,
    /// After so many bytes more it is cut.
    left: AtomicU64,
    cuts: AtomicUsize,
    ended: AtomicBool,
}

pub struct Proxy {
    shared: Arc<Shared>,
    endpoint: Endpoint,
}

impl Proxy {
    pub fn new(to: &Endpoint) -> Self {
        let shared = Arc::new(Shared { left: AtomicU64::new(u64::MAX), ..Shared::default() });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().into();
        let (ours, to) = (Arc::clone(&shared), to.to_string());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if ours.ended.load(SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { return };
                if ours.refusing.load(SeqCst) {
                    continue;
                }
                let Ok(other) = TcpStream::connect(&to) else { continue };
                stream.set_nodelay(true).unwrap();
                other.set_nodelay(true).unwrap();
                let pair = (stream.try_clone().unwrap(), other.try_clone().unwrap());
                ours.streams.lock().unwrap().push(pair);
                for (from, to) in
                    [(stream.try_clone().unwrap(), other.try_clone().unwrap()), (other, stream)]
                {
                    let ours = Arc::clone(&ours);
                    thread::spawn(move || copy(&ours, from, to));
                }
            }
        });
        Self { shared, endpoint }
    }

    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Cuts one of the connections.
    pub fn cut_one(&self, index: usize) {
        let streams = self.shared.streams.lock().unwrap();
        let (a, b) = &streams[index];
        let _ = (a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both));
    }

    /// Cuts every connection when so many bytes more have passed.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.left.store(bytes, SeqCst);
    }

    pub fn cuts(&self) -> usize {
        self.shared.cuts.load(SeqCst)
    }

    /// Takes no connection any more, or does again.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, SeqCst);
    }

    /// Lets nothing pass, and says nothing.
    pub fn stall(&self, stall: bool) {
        self.shared.stalled.store(stall, SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        self.shared.stalled.store(false, SeqCst);
        self.cut();
        let _ = TcpStream::connect(self.endpoint.to_string());
    }
}

impl Shared {
    fn cut(&self) {
        self.cuts.fetch_add(1, SeqCst);
        for (a, b) in self.streams.lock().unwrap().drain(..) {
            let _ = (a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both));
        }
    }
}

fn copy(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        while shared.stalled.load(SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        let bytes = n as u64;
        let cut = shared.left.fetch_update(SeqCst, SeqCst, |left| match left {
            u64::MAX => None,
            left => Some(if left <= bytes { u64::MAX } else { left - bytes }),
        });
        if cut.is_ok_and(|left| left <= bytes) {
            shared.cut();
            return;
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
