//! Sequence accounting: which numbered datagrams came, exactly.
//!
//! A [`Sequence`] follows one sender from the first number it sees. Invariants:
//!
//! - `received + lost == highest - first + 1`: every number up to the highest has either
//!   come or has not.
//! - The bitmap says, for each of the last [`WINDOW`] numbers, whether it has come. An
//!   older number can no longer be told apart from a duplicate and is counted as
//!   `too_old`, never guessed at.

/// How many numbers back an arrival can still be judged: at 100,000 datagrams a second,
/// more than half a second of reordering.
pub const WINDOW: u64 = 1 << 16;

const WORDS: usize = (WINDOW / 64) as usize;

/// What came of one sender's numbers.
#[derive(Debug, Clone)]
pub struct Sequence {
    first: u64,
    highest: u64,
    seen: Box<[u64]>,
    counts: Counts,
}

/// Totals, in datagrams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Different numbers that came.
    pub received: u64,
    /// Numbers between the first and the highest that have not come (yet).
    pub lost: u64,
    /// Numbers that came again.
    pub duplicated: u64,
    /// Numbers that came first after a higher one.
    pub reordered: u64,
    /// Numbers from before the window or before the first: not judged.
    pub too_old: u64,
}

impl Sequence {
    /// Starts with the first number seen.
    pub fn new(first: u64) -> Self {
        let mut sequence = Self {
            first,
            highest: first,
            seen: vec![0; WORDS].into_boxed_slice(),
            counts: Counts { received: 1, ..Counts::default() },
        };
        sequence.mark(first);
        sequence
    }

    /// Accounts for one arrival.
    pub fn arrive(&mut self, number: u64) {
        if number > self.highest {
            self.advance(number);
            self.mark(number);
            self.counts.received += 1;
        } else if number < self.first || self.highest - number >= WINDOW {
            self.counts.too_old += 1;
        } else if self.is_marked(number) {
            self.counts.duplicated += 1;
        } else {
            self.mark(number);
            self.counts.received += 1;
            self.counts.reordered += 1;
        }
    }

    /// The totals so far.
    pub fn counts(&self) -> Counts {
        // A hostile sender may name any number: the span may be 2^64.
        let span = u128::from(self.highest) - u128::from(self.first) + 1;
        let lost = span - u128::from(self.counts.received);
        Counts { lost: u64::try_from(lost).unwrap_or(u64::MAX), ..self.counts }
    }

    /// The highest number that came.
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// Moves the window's end up to `number`, forgetting what falls out of it.
    fn advance(&mut self, number: u64) {
        if number - self.highest >= WINDOW {
            self.seen.fill(0);
        } else {
            for skipped in self.highest + 1..=number {
                let (word, bit) = place(skipped);
                self.seen[word] &= !bit;
            }
        }
        self.highest = number;
    }

    fn mark(&mut self, number: u64) {
        let (word, bit) = place(number);
        self.seen[word] |= bit;
    }

    fn is_marked(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        self.seen[word] & bit != 0
    }
}

fn place(number: u64) -> (usize, u64) {
    let index = number % WINDOW;
    ((index / 64) as usize, 1 << (index % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn counts(numbers: &[u64]) -> Counts {
        let mut sequence = Sequence::new(numbers[0]);
        for &number in &numbers[1..] {
            sequence.arrive(number);
        }
        sequence.counts()
    }

    #[test]
    fn gaps_duplicates_and_reordering() {
        let cases: &[(&[u64], [u64; 5])] = &[
            (&[0], [1, 0, 0, 0, 0]),
            (&[0, 1, 2], [3, 0, 0, 0, 0]),
            (&[7, 8, 9], [3, 0, 0, 0, 0]),
            (&[0, 3], [2, 2, 0, 0, 0]),
            (&[0, 2, 1], [3, 0, 0, 1, 0]),
            (&[0, 1, 1, 0], [2, 0, 2, 0, 0]),
            (&[5, 4], [1, 0, 0, 0, 1]),
            (&[0, 2, 1, 1], [3, 0, 1, 1, 0]),
        ];
        for (numbers, [received, lost, duplicated, reordered, too_old]) in cases {
            let expected = Counts {
                received: *received,
                lost: *lost,
                duplicated: *duplicated,
                reordered: *reordered,
                too_old: *too_old,
            };
            assert_eq!(counts(numbers), expected, "{numbers:?}");
        }
    }

    #[test]
    fn the_window_s_edges() {
        // The oldest number that can still be judged, and the one before it.
        assert_eq!(counts(&[0, WINDOW, 1]).reordered, 1);
        assert_eq!(counts(&[0, WINDOW, 0]).too_old, 1);
        // A number whose place in the bitmap was used by an older one is not a duplicate.
        assert_eq!(counts(&[0, 1, WINDOW + 1]).duplicated, 0);
        assert_eq!(counts(&[0, 1, WINDOW + 5, WINDOW + 1]).reordered, 1);
    }

    #[test]
    fn any_number_may_be_named() {
        let counts = counts(&[0, u64::MAX, 0, u64::MAX, u64::MAX - 1]);
        assert_eq!(counts.lost, u64::MAX - 2);
        assert_eq!((counts.received, counts.duplicated, counts.reordered), (3, 1, 1));
        assert_eq!(Sequence::new(u64::MAX).counts().lost, 0);
    }

    /// The same question answered by remembering everything.
    fn by_remembering(numbers: &[u64]) -> Counts {
        let first = numbers[0];
        let mut seen = HashSet::from([first]);
        let mut highest = first;
        let mut counts = Counts::default();
        for &number in &numbers[1..] {
            if number < first || highest.saturating_sub(number) >= WINDOW {
                counts.too_old += 1;
            } else if !seen.insert(number) {
                counts.duplicated += 1;
            } else if number < highest {
                counts.reordered += 1;
            }
            highest = highest.max(number);
        }
        counts.received = seen.len() as u64;
        counts.lost = highest - first + 1 - counts.received;
        counts
    }

    proptest! {
        #[test]
        fn agrees_with_remembering_everything(
            start in 0..1000_u64,
            steps in proptest::collection::vec(
                prop_oneof![
                    8 => -4..6_i64,
                    1 => -70_000..70_000_i64,
                    1 => Just(WINDOW as i64),
                    1 => Just(-(WINDOW as i64)),
                ],
                0..300,
            ),
        ) {
            let mut numbers = vec![start];
            let mut at = start;
            for step in steps {
                at = at.saturating_add_signed(step);
                numbers.push(at);
            }
            prop_assert_eq!(counts(&numbers), by_remembering(&numbers));
        }
    }
}
