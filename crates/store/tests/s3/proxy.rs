//! A network that is not to be relied on, between a store and its server.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What is on its way through a proxy.
#[derive(Debug, Default)]
pub struct Weather {
    /// Connections are cut once they have carried so many bytes; 0: never.
    pub cut_after: AtomicU64,
    /// Nothing comes through, and nothing is closed.
    pub stalled: AtomicBool,
    /// Connections are closed at once.
    pub refused: AtomicBool,
    /// How many connections were cut.
    pub cuts: AtomicUsize,
}

/// Ends when it is dropped, with all its connections.
pub struct Proxy {
    pub weather: Arc<Weather>,
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn new(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, ends) = (Arc::new(Weather::default()), Arc::new(AtomicBool::new(false)));
        let listening = {
            let (weather, ends) = (Arc::clone(&weather), Arc::clone(&ends));
            thread::spawn(move || {
                for client in listener.incoming().map_while(Result::ok) {
                    if ends.load(Ordering::Relaxed) {
                        return;
                    }
                    if weather.refused.load(Ordering::Relaxed) {
                        continue;
                    }
                    let Ok(server) = TcpStream::connect(server) else { continue };
                    let carried = Arc::new(AtomicU64::new(0));
                    for (from, to) in [(&client, &server), (&server, &client)] {
                        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                        let (weather, ends) = (Arc::clone(&weather), Arc::clone(&ends));
                        let carried = Arc::clone(&carried);
                        thread::spawn(move || carry(from, to, &carried, &weather, &ends));
                    }
                }
            })
        };
        Self { weather, address, ends, listening: Some(listening) }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.listening.take().unwrap().join();
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, carried: &AtomicU64, weather: &Weather, ends: &AtomicBool) {
    let look = Duration::from_millis(20);
    from.set_read_timeout(Some(look)).unwrap();
    let mut buffer = vec![0; 64 << 10];
    loop {
        if ends.load(Ordering::Relaxed) || weather.refused.load(Ordering::Relaxed) {
            break;
        }
        if weather.stalled.load(Ordering::Relaxed) {
            thread::sleep(look);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                let before = carried.fetch_add(read as u64, Ordering::Relaxed);
                let limit = weather.cut_after.load(Ordering::Relaxed);
                let passes =
                    if limit == 0 { read as u64 } else { limit.saturating_sub(before).min(read as u64) };
                if to.write_all(&buffer[..passes as usize]).is_err() {
                    break;
                }
                if passes < read as u64 {
                    weather.cuts.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
