//! The network between hosts, in user space: each host's interface is a tap whose other end is here. What goes between them
//! can be lost, overtaken and cut off, at rates that are given and by a seed that is printed.
//!
//! Only datagrams (the tunnels) are lost or overtaken at random; a host that is cut off loses everything.
//!
//! Invariant: the interfaces are gone when this is, or when the test's process is.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

// linux/if_tun.h
const TUNSETIFF: nix::libc::Ioctl = 0x4004_54ca;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const NAME_BYTES: usize = 16;
/// `struct ifreq`.
const REQUEST_BYTES: usize = 40;
const FRAME_BYTES: usize = 2048;
/// How long a frame that is to be overtaken waits for another at most.
const OVERTAKEN_WITHIN: Duration = Duration::from_millis(20);
/// How often the thread looks whether it is still wanted.
const TURN_MS: u8 = 10;

/// What happens to frames between hosts.
#[derive(Debug, Clone, Default)]
pub struct Weather {
    /// Of a thousand datagrams, those that are lost.
    pub lost_per_mille: u64,
    /// Of a thousand datagrams, those that others overtake.
    pub overtaken_per_mille: u64,
    /// The places of the hosts that nothing reaches, and nothing from.
    pub cut_off: BTreeSet<usize>,
}

/// See the module.
pub struct Underlay {
    weather: Arc<Mutex<Weather>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The address of the interface at a place: the last byte says which.
pub fn mac(place: usize) -> String {
    format!("02:d1:0a:00:00:{place:02x}")
}

impl Underlay {
    /// Gives each namespace an interface `eth0`, not yet up.
    pub fn new(namespaces: &[String]) -> Self {
        let seed = u64::from(std::process::id()) << 20 | 1;
        println!("the network between hosts has seed {seed}");
        let taps: Vec<File> = namespaces.iter().map(|name| open_tap(name)).collect();
        let (weather, ends) = (Arc::new(Mutex::new(Weather::default())), Arc::new(AtomicBool::new(false)));
        let (shared, end) = (Arc::clone(&weather), Arc::clone(&ends));
        let thread = std::thread::spawn(move || carry(&taps, &shared, &end, seed));
        Self { weather, ends, thread: Some(thread) }
    }

    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        *self.weather.lock().unwrap() = weather;
    }

    /// Cuts one host off, or no host any more.
    pub fn cut_off(&self, place: Option<usize>) {
        self.set(Weather { cut_off: place.into_iter().collect(), ..Weather::default() });
    }
}

impl Drop for Underlay {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes the interface in its namespace. Its end here works wherever this process is.
fn open_tap(namespace: &str) -> File {
    let path = format!("/run/netns/{namespace}");
    let inside = move || {
        setns(File::open(&path).unwrap().as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .unwrap();
        let mut request = [0; REQUEST_BYTES];
        request[..4].copy_from_slice(b"eth0");
        request[NAME_BYTES..NAME_BYTES + 2].copy_from_slice(&(IFF_TAP | IFF_NO_PI).to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, and that many bytes are there.
        let result = unsafe { nix::libc::ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(result, 0, "a tap: {}", std::io::Error::last_os_error());
        tap
    };
    // A thread of its own: it does not come back from the namespace.
    std::thread::spawn(inside).join().unwrap()
}

struct Overtaken {
    to: usize,
    frame: Vec<u8>,
    since: Instant,
}

fn carry(taps: &[File], weather: &Mutex<Weather>, ends: &AtomicBool, mut seed: u64) {
    let mut overtaken: Vec<Overtaken> = Vec::new();
    let mut buffer = [0; FRAME_BYTES];
    while !ends.load(Ordering::Relaxed) {
        let mut ready: Vec<PollFd> =
            taps.iter().map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut ready, PollTimeout::from(TURN_MS));
        let today = weather.lock().unwrap().clone();
        for (from, tap) in taps.iter().enumerate() {
            let mut tap = tap;
            // A bound, so that all have their turn.
            for _ in 0..64 {
                let length = match tap.read(&mut buffer) {
                    Ok(length) => length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // Not up yet.
                    Err(_) => break,
                };
                let frame = &buffer[..length];
                for to in receivers(frame, from, taps.len()) {
                    if today.cut_off.contains(&from) || today.cut_off.contains(&to) {
                        continue;
                    }
                    if is_datagram(frame) {
                        if random(&mut seed) % 1000 < today.lost_per_mille {
                            continue;
                        }
                        if random(&mut seed) % 1000 < today.overtaken_per_mille {
                            overtaken.push(Overtaken { to, frame: frame.to_vec(), since: Instant::now() });
                            continue;
                        }
                    }
                    deliver(&taps[to], frame);
                    // Those before it for the same host, mostly.
                    if !overtaken.is_empty() && random(&mut seed).is_multiple_of(2) {
                        let late = overtaken.swap_remove(0);
                        deliver(&taps[late.to], &late.frame);
                    }
                }
            }
        }
        overtaken.retain(|late| {
            let waits = late.since.elapsed() < OVERTAKEN_WITHIN;
            if !waits {
                deliver(&taps[late.to], &late.frame);
            }
            waits
        });
    }
}

/// An interface that is full loses what comes: as interfaces do.
fn deliver(mut tap: &File, frame: &[u8]) {
    let _ = tap.write(frame);
}

/// Whom a frame is for: by the last byte of its address, or everybody else.
fn receivers(frame: &[u8], from: usize, count: usize) -> Vec<usize> {
    match frame {
        [0x02, 0xd1, 0x0a, 0, 0, place, ..] => {
            Some(usize::from(*place)).filter(|place| *place < count && *place != from).into_iter().collect()
        }
        [first, ..] if first & 1 == 1 => (0..count).filter(|place| *place != from).collect(),
        _ => Vec::new(),
    }
}

/// UDP over IPv4.
fn is_datagram(frame: &[u8]) -> bool {
    frame.len() > 23 && frame[12..14] == [0x08, 0x00] && frame[23] == 17
}

/// Xorshift: what is random need not be good, but the same for the same seed.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
