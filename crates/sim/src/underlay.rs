//! What lies between hosts: who reaches whom, when, how often. Owns positions and partitions; carries nothing itself.

use crate::{random::Random, scenario::Link};

/// The network that hosts are joined by.
#[derive(Debug)]
pub struct Underlay {
    link: Link,
    /// Places on a square of 2^16 by 2^16.
    at: Vec<(i64, i64)>,
    /// Which side of the partition each host is on, if there is one.
    sides: Option<Vec<bool>>,
}

impl Underlay {
    /// Puts hosts at random places.
    pub fn new(link: Link, hosts: usize, random: &mut Random) -> Self {
        let mut place = || random.below(1 << 16) as i64;
        Self { link, at: (0..hosts).map(|_| (place(), place())).collect(), sides: None }
    }

    /// Delay one way without jitter. By the greater of the two distances: no square root, so equal on every machine.
    pub fn delay_ns(&self, from: usize, to: usize) -> u64 {
        if from == to {
            return 0;
        }
        let ((ax, ay), (bx, by)) = (self.at[from], self.at[to]);
        let distance = (ax - bx).abs().max((ay - by).abs()) as u64;
        let (least, most) = self.link.delay_ns;
        least + (most - least) * distance / (1 << 16)
    }

    /// The longest that a round trip between this host and any other takes.
    pub fn longest_round_trip_ns(&self, from: usize) -> u64 {
        let farthest = (0..self.at.len()).map(|to| self.delay_ns(from, to)).max().unwrap_or(0);
        2 * (farthest + self.link.jitter_ns)
    }

    /// After which times a tunnel's packet arrives: never, once or twice.
    pub fn packet(&self, from: usize, to: usize, random: &mut Random) -> [Option<u64>; 2] {
        if !self.joined(from, to) || random.chance_ppm(self.link.loss_ppm) {
            return [None, None];
        }
        let first = self.delay_ns(from, to) + random.below(self.link.jitter_ns + 1);
        let again = random.chance_ppm(self.link.repeat_ppm);
        [Some(first), again.then(|| first + random.below(4 * self.link.jitter_ns + 1))]
    }

    /// The same for a control message.
    pub fn message(&self, from: usize, to: usize, random: &mut Random) -> [Option<u64>; 2] {
        if from == to {
            // In one process.
            return [Some(0), None];
        }
        if !self.joined(from, to) || random.chance_ppm(self.link.message_loss_ppm) {
            return [None, None];
        }
        let first = self.delay_ns(from, to) + random.below(self.link.jitter_ns + 1);
        let again = random.chance_ppm(self.link.repeat_ppm);
        [Some(first), again.then(|| first + random.below(20 * self.link.jitter_ns + 1))]
    }

    /// Cuts a random part of the hosts off from the rest.
    pub fn part(&mut self, random: &mut Random) {
        let share = random.within((1, 99));
        self.sides = Some(self.at.iter().map(|_| random.below(100) < share).collect());
    }

    /// Everybody reaches everybody again.
    pub fn heal(&mut self) {
        self.sides = None;
    }

    /// The link loses and repeats no more.
    pub fn calm(&mut self) {
        self.heal();
        self.link.loss_ppm = 0;
        self.link.repeat_ppm = 0;
        self.link.message_loss_ppm = 0;
    }

    fn joined(&self, a: usize, b: usize) -> bool {
        self.sides.as_ref().is_none_or(|sides| sides[a] == sides[b])
    }
}
