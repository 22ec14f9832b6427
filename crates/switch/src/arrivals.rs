//! Which of a tunnel's numbered packets have come: each is let in once, and those that never come are counted.
//!
//! Owns a sliding window over the newest numbers. Numbers begin at 0 and ascend by one at the sender.
//!
//! Invariants: bit `n % WINDOW` stands for number n, for `highest - WINDOW < n <= highest`; bits of numbers that do not
//! exist (at the beginning) are set, so that they never count as lost. `came + lost + missing() = highest + 1`.

/// How far behind the newest number a packet may come, in packets: the reordering that is let pass. At a million packets
/// a second, two milliseconds.
pub const WINDOW: u64 = 2048;

const WORDS: usize = (WINDOW / 64) as usize;

/// Whether a number may be let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It has not come yet.
    New,
    /// It has come before.
    Repeated,
    /// It is too far behind to tell; it has been counted as lost.
    TooOld,
}

/// What has come from one sender.
#[derive(Clone, Debug)]
pub struct Arrivals {
    /// One more than the highest number that has come.
    next: u64,
    seen: [u64; WORDS],
    came: u64,
    lost: u64,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self { next: 0, seen: [u64::MAX; WORDS], came: 0, lost: 0 }
    }
}

impl Arrivals {
    /// Looks, and changes nothing: a packet must be known as genuine before it may move the window.
    #[inline]
    pub fn judge(&self, number: u64) -> Arrival {
        if number == u64::MAX {
            // Nobody sends it: no number would be left to be the next.
            Arrival::TooOld
        } else if number >= self.next {
            Arrival::New
        } else if self.next - number > WINDOW {
            Arrival::TooOld
        } else if self.is_seen(number) {
            Arrival::Repeated
        } else {
            Arrival::New
        }
    }

    /// Notes a genuine packet's arrival; [`Arrival::New`] if it is to be let in.
    #[inline]
    pub fn accept(&mut self, number: u64) -> Arrival {
        let arrival = self.judge(number);
        if arrival == Arrival::New {
            if number >= self.next {
                self.slide(number + 1);
            }
            self.seen[word(number)] |= bit(number);
            self.came += 1;
        }
        arrival
    }

    /// Packets that were let in.
    pub fn came(&self) -> u64 {
        self.came
    }

    /// Packets that did not come before the window left them behind: final.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Packets within the window that have not come yet, older than one that has: lost, or late.
    pub fn missing(&self) -> u64 {
        self.seen.iter().map(|word| u64::from(word.count_zeros())).sum()
    }

    fn slide(&mut self, next: u64) {
        if next - self.next >= WINDOW {
            // Everything in the window and everything skipped between it and the new one.
            self.lost += self.missing() + (next - self.next - WINDOW);
            self.seen = [0; WORDS];
        } else {
            for number in self.next..next {
                self.lost += u64::from(!self.is_seen(number));
                self.seen[word(number)] &= !bit(number);
            }
        }
        self.next = next;
    }

    fn is_seen(&self, number: u64) -> bool {
        self.seen[word(number)] & bit(number) != 0
    }
}

fn word(number: u64) -> usize {
    (number % WINDOW / 64) as usize
}

fn bit(number: u64) -> u64 {
    1 << (number % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_let_in_once_within_the_window() {
        let mut arrivals = Arrivals::default();
        for (number, expected) in [
            (0, Arrival::New),
            (0, Arrival::Repeated),
            (5, Arrival::New),
            (3, Arrival::New),
            (3, Arrival::Repeated),
            (2050, Arrival::New),
            (2, Arrival::TooOld),
            (3, Arrival::Repeated),
            (4, Arrival::New),
            (1 << 40, Arrival::New),
            ((1 << 40) - 2047, Arrival::New),
            ((1 << 40) - 2048, Arrival::TooOld),
        ] {
            assert_eq!(arrivals.accept(number), expected, "number {number}");
        }
        assert_eq!(arrivals.came() + arrivals.lost() + arrivals.missing(), (1 << 40) + 1);
    }

    #[test]
    fn the_greatest_number_breaks_nothing() {
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.accept(u64::MAX), Arrival::TooOld);
        assert_eq!(arrivals.accept(u64::MAX - 1), Arrival::New);
        assert_eq!(arrivals.accept(u64::MAX - 1), Arrival::Repeated);
        assert_eq!(arrivals.lost() + arrivals.missing() + arrivals.came(), u64::MAX);
    }
}
