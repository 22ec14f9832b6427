//! A Linux bridge with two taps, in a network namespace that ends with the thread.
//!
//! The bridge forwards in the context of whoever writes to the tap: the generator. Receive packet steering moves that
//! to the switch's core, so that it has a core to itself as the others do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::SWITCH_CORE;
use super::generator::{Side, Transport};
use crate::failure::Failure;
use crate::lab::ip;

const BRIDGE: &str = "bench0";
// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const NAME_BYTES: usize = 16;
/// `struct ifreq`.
const REQUEST_BYTES: usize = 40;

/// Gives the calling thread network and mount namespaces of its own, with a /sys that shows the former.
pub(super) fn enter_namespaces() -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).map_err(Failure::io("cannot unshare"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .and_then(|()| mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none))
        .map_err(Failure::io("cannot mount /sys"))?;
    // Nobody in there needs IPv6, and its chatter would be counted by nobody.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    Ok(())
}

/// A new bridge (in place of one made before) and its taps.
pub(super) fn start() -> Result<Taps, Failure> {
    // There is none the first time.
    let _ = ip(&["link", "del", BRIDGE]);
    ip(&["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])?;
    let taps = Taps([Tap::open("bench1")?, Tap::open("bench2")?]);
    for name in ["bench1", "bench2"] {
        let steering = format!("/sys/class/net/{name}/queues/rx-0/rps_cpus");
        fs::write(&steering, format!("{:x}", 1 << SWITCH_CORE))
            .map_err(Failure::io(format!("cannot write {steering}")))?;
        ip(&["link", "set", name, "master", BRIDGE, "up"])?;
    }
    ip(&["link", "set", BRIDGE, "up"])?;
    Ok(taps)
}

/// Both ports.
#[derive(Debug)]
pub(super) struct Taps([Tap; 2]);

#[derive(Debug)]
struct Tap {
    file: File,
    buffer: Box<[u8; 4096]>,
}

impl Tap {
    fn open(name: &str) -> Result<Self, Failure> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(Failure::io("cannot open /dev/net/tun"))?;
        let mut request = [0; REQUEST_BYTES];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[NAME_BYTES..NAME_BYTES + 2].copy_from_slice(&(IFF_TAP | IFF_NO_PI).to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, and that many bytes are there.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } != 0 {
            return Err(Failure::io(format!("cannot make tap {name}"))(io::Error::last_os_error()));
        }
        Ok(Self { file, buffer: Box::new([0; 4096]) })
    }
}

impl Transport for Taps {
    const BATCH: usize = 64;

    fn send(&mut self, side: Side, frames: &[u8], size: usize) -> io::Result<usize> {
        let tap = &mut self.0[side as usize];
        for (sent, frame) in frames.chunks_exact(size).enumerate() {
            match tap.file.write(frame) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(sent),
                // The interface is not up yet, or out of buffers.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOBUFS)) => {
                    return Ok(sent);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(frames.len() / size)
    }

    fn receive(&mut self, side: Side, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let tap = &mut self.0[side as usize];
        // As many as one batch of each side: the sending side must have its turn.
        for _ in 0..2 * Self::BATCH {
            match tap.file.read(&mut tap.buffer[..]) {
                Ok(length) => each(&tap.buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
