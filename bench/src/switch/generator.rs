//! The generator: sends numbered frames into one port and takes them out of the other.
//!
//! A frame: destination, source, the ethertype for local experiments, its number in 8 bytes, padding. Numbers go up
//! for as long as the generator lives, so a late frame of an earlier trial is not counted in a later one.

use std::io;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::lab;

const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const NUMBER: std::ops::Range<usize> = 14..22;
/// After the last frame was sent or came: what is not there then is lost.
const QUIET: Duration = Duration::from_millis(100);
/// In the closed loop with no frame coming: what is under way is given up as lost.
const GIVE_UP: Duration = Duration::from_millis(20);
/// How long the switch may take to pass its first frame.
const FIRST: Duration = Duration::from_secs(1);

/// Which of the two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Sender,
    Receiver,
}

/// How frames get into and out of the switch. Nothing here blocks.
pub(super) trait Transport {
    /// Frames to send before the receiving side is looked at.
    const BATCH: usize;

    /// Sends frames that lie one after another, each of `size` bytes; returns how many were taken, in order.
    fn send(&mut self, side: Side, frames: &[u8], size: usize) -> io::Result<usize>;

    /// Hands everything that has come to `each`.
    fn receive(&mut self, side: Side, each: &mut dyn FnMut(&[u8])) -> io::Result<()>;
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    pub(super) sent: u64,
    pub(super) lost: u64,
    received_in_time: u64,
    duration: Duration,
    switch_time: Option<Duration>,
}

impl Trial {
    /// Frames a second that came out while frames were sent.
    pub(super) fn rate(&self) -> f64 {
        self.received_in_time as f64 / self.duration.as_secs_f64()
    }

    /// The switch's processor time for each frame that came out, in nanoseconds.
    pub(super) fn switch_ns_per_frame(&self) -> f64 {
        self.switch_time.map_or(0.0, |time| time.as_secs_f64() * 1e9 / (self.sent - self.lost).max(1) as f64)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Generator<T> {
    transport: T,
    size: usize,
    /// `T::BATCH` frames, whose numbers are set before they are sent.
    batch: Vec<u8>,
    next: u64,
}

impl<T: Transport> Generator<T> {
    /// Makes the switch learn both addresses.
    pub(super) fn new(transport: T, size: usize) -> Result<Self, Failure> {
        let mut batch = vec![0x5a; size * T::BATCH];
        for frame in batch.chunks_exact_mut(size) {
            write_header(frame, RECEIVER, SENDER);
        }
        let mut generator = Self { transport, size, batch, next: 0 };
        let mut hello = vec![0; size];
        write_header(&mut hello, SENDER, RECEIVER);
        let end = Instant::now() + FIRST;
        loop {
            generator
                .transport
                .send(Side::Receiver, &hello, size)
                .map_err(Failure::io("cannot send a frame"))?;
            let mut heard = false;
            generator.drain(Side::Sender, &mut |_| heard = true)?;
            if heard {
                // What was flooded before must not count later.
                generator.drain(Side::Receiver, &mut |_| {})?;
                return Ok(generator);
            }
            if Instant::now() > end {
                return Err(Failure::NoFrames);
            }
            lab::sleep(Duration::from_millis(10))?;
        }
    }

    /// Sends for `duration`, with at most `window` frames under way.
    pub(super) fn run(
        &mut self,
        window: Option<u64>,
        duration: Duration,
        pid: Option<u32>,
    ) -> Result<Trial, Failure> {
        lab::check_interrupted()?;
        let switch_before = pid.and_then(lab::cpu_time);
        let first = self.next;
        let (mut received, mut given_up) = (0_u64, 0_u64);
        let start = Instant::now();
        let mut last_came = start;
        loop {
            let now = Instant::now();
            if now.duration_since(start) >= duration {
                break;
            }
            let under_way = (self.next - first).saturating_sub(received + given_up);
            let allowed = window.map_or(u64::MAX, |window| window.saturating_sub(under_way));
            if allowed == 0 && now.duration_since(last_came) > GIVE_UP {
                given_up += under_way;
            }
            self.send(allowed.min(T::BATCH as u64) as usize)?;
            let before = received;
            self.receive(first, &mut received)?;
            if received > before {
                last_came = now;
            }
        }
        let duration = start.elapsed();
        let received_in_time = received;
        let mut quiet_since = Instant::now();
        while quiet_since.elapsed() < QUIET {
            let before = received;
            self.receive(first, &mut received)?;
            if received > before {
                quiet_since = Instant::now();
            }
        }
        let switch_time =
            pid.and_then(lab::cpu_time).zip(switch_before).map(|(after, before)| after - before);
        let sent = self.next - first;
        Ok(Trial { sent, lost: sent.saturating_sub(received), received_in_time, duration, switch_time })
    }

    fn send(&mut self, count: usize) -> Result<(), Failure> {
        if count == 0 {
            return Ok(());
        }
        let frames = &mut self.batch[..count * self.size];
        for (frame, number) in frames.chunks_exact_mut(self.size).zip(self.next..) {
            frame[NUMBER].copy_from_slice(&number.to_be_bytes());
        }
        let taken = self
            .transport
            .send(Side::Sender, frames, self.size)
            .map_err(Failure::io("cannot send frames"))?;
        self.next += taken as u64;
        Ok(())
    }

    fn receive(&mut self, first: u64, received: &mut u64) -> Result<(), Failure> {
        let size = self.size;
        self.drain(Side::Receiver, &mut |frame| {
            if frame.len() == size && frame[..6] == RECEIVER && number(frame) >= first {
                *received += 1;
            }
        })
    }

    fn drain(&mut self, side: Side, each: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        self.transport.receive(side, each).map_err(Failure::io("cannot receive frames"))
    }
}

fn write_header(frame: &mut [u8], to: [u8; 6], from: [u8; 6]) {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&ETHERTYPE);
}

fn number(frame: &[u8]) -> u64 {
    u64::from_be_bytes(frame[NUMBER].try_into().expect("eight bytes"))
}
