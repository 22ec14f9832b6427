//! The judge: decides whether cuts were consistent, knowing only what happened at machines and in which order.
//!
//! It is told of four kinds of event, each at one machine: a frame is sent, a frame is received, the machine is cut for an
//! attempt, and (from the store's side) a frame is recorded for a machine. It has never heard of colours, epochs,
//! counters or messages, and shares no code with what it judges.
//!
//! # Two ways to judge one cut
//!
//! **Vector clocks** (`whole clocks`): each machine counts its events in a vector, merges the sender's at each receipt, and
//! notes the vector at its cut. The cut is consistent exactly if no machine's noted vector knows more of another
//! machine than that machine's own noted vector: `C_j[i] <= C_i[i]` for all i and j (Mattern 1989). With n machines a
//! frame carries n numbers: too much for 10,000.
//!
//! **Crossings**: each machine has the set of attempts that it has been cut for, a frame carries its sender's. The cut for
//! attempt s is inconsistent exactly if some frame was sent by a machine that had been cut for s and received by one that
//! had not been.
//!
//! They judge the same. If a frame crosses backwards, from i to j, then j's noted vector knows i's event of sending it,
//! which is past i's cut: `C_j[i] > C_i[i]`. Conversely, if `C_j[i] > C_i[i]`, then a chain of events leads from an event
//! of i past its cut to an event of j before its cut; each link is either "later on the same machine" or "sent, then
//! received"; the chain begins past a cut and ends before one, and the former kind of link never leads back, so some
//! frame of the chain crosses backwards. Where both are on (small runs), the judge compares them.
//!
//! # The channel state
//!
//! For a snapshot that exists, the frames that crossed forwards (sent before the sender's cut, received after the
//! receiver's) must be exactly those of its recording, each once, but for recorded ones that were received by nobody,
//! because their receiver's host died first.

use std::collections::{BTreeMap, HashMap, HashSet};

/// One machine of the environment.
pub type Machine = u32;
/// One frame that some machine sent; it may reach several.
pub type FrameId = u64;

/// What was wrong with a cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Verdict {
    /// A machine of the environment was not cut.
    #[error("attempt {attempt}: machine {machine} was not cut")]
    NotCut {
        /// The attempt.
        attempt: u32,
        /// The machine.
        machine: Machine,
    },
    /// An effect is in the snapshot and its cause is not.
    #[error(
        "attempt {attempt}: frame {frame} was received by {to} before its cut and sent by {from} after its own"
    )]
    CrossedBackwards {
        /// The attempt.
        attempt: u32,
        /// The frame.
        frame: FrameId,
        /// Who sent it.
        from: Machine,
        /// Who received it.
        to: Machine,
    },
    /// The same, found by vector clocks.
    #[error(
        "attempt {attempt}: machine {knower} knows {knows} events of {of}, which had {had} when it was cut"
    )]
    KnowsTooMuch {
        /// The attempt.
        attempt: u32,
        /// The machine with the later knowledge.
        knower: Machine,
        /// How many events of the other it knows of.
        knows: u32,
        /// The other.
        of: Machine,
        /// How many it had.
        had: u32,
    },
    /// A frame in flight is missing from the snapshot.
    #[error("attempt {attempt}: frame {frame} to {to} was in flight and is not recorded")]
    NotRecorded {
        /// The attempt.
        attempt: u32,
        /// The frame.
        frame: FrameId,
        /// Its receiver.
        to: Machine,
    },
    /// A recorded frame was not in flight.
    #[error(
        "attempt {attempt}: frame {frame} to {to} is recorded and was not in flight, or is recorded twice"
    )]
    WronglyRecorded {
        /// The attempt.
        attempt: u32,
        /// The frame.
        frame: FrameId,
        /// Its receiver.
        to: Machine,
    },
    /// A frame reached a machine twice.
    #[error("frame {frame} was received twice by {to}")]
    ReceivedTwice {
        /// The frame.
        frame: FrameId,
        /// The receiver.
        to: Machine,
    },
}

/// A set of attempts; bit n is attempt n. Runs have fewer than 64.
type Attempts = u64;

#[derive(Debug)]
struct Sent {
    by: Machine,
    after: Attempts,
    clock: Option<Box<[u32]>>,
}

#[derive(Debug, Default)]
struct Attempt {
    /// Frames that crossed forwards, by receiver.
    crossed: HashSet<(FrameId, Machine)>,
    /// Frame, sender and receiver.
    crossed_backwards: Vec<(FrameId, Machine, Machine)>,
    recorded: Vec<(FrameId, Machine)>,
    /// Noted vectors, by machine.
    clocks: BTreeMap<Machine, Box<[u32]>>,
    finished: bool,
}

/// See the module's page.
#[derive(Debug)]
pub struct Judge {
    frames: Vec<Sent>,
    passed: Vec<Attempts>,
    clocks: Option<Vec<Box<[u32]>>>,
    attempts: Vec<Attempt>,
    received: HashMap<FrameId, Vec<Machine>>,
    twice: Option<Verdict>,
    /// How many receipts there were.
    pub receipts: u64,
}

impl Judge {
    /// For machines `0..machines`.
    pub fn new(machines: usize, whole_clocks: bool) -> Self {
        let clock = || vec![0; machines].into_boxed_slice();
        Self {
            frames: Vec::new(),
            passed: vec![0; machines],
            clocks: whole_clocks.then(|| (0..machines).map(|_| clock()).collect()),
            attempts: Vec::new(),
            received: HashMap::new(),
            twice: None,
            receipts: 0,
        }
    }

    /// An attempt at a snapshot begins. Returns its number.
    ///
    /// # Panics
    ///
    /// With 64 attempts.
    pub fn attempt(&mut self) -> u32 {
        assert!(self.attempts.len() < Attempts::BITS as usize, "the judge tells 64 attempts apart");
        self.attempts.push(Attempt::default());
        self.attempts.len() as u32 - 1
    }

    /// A machine sends a frame. Returns its number, which the frame is to carry.
    pub fn send(&mut self, by: Machine) -> FrameId {
        let clock = self.tick(by);
        self.frames.push(Sent { by, after: self.passed[by as usize], clock });
        self.frames.len() as FrameId - 1
    }

    /// A machine receives a frame. Returns who sent it.
    pub fn receive(&mut self, to: Machine, frame: FrameId) -> Machine {
        let sent = &self.frames[frame as usize];
        self.receipts += 1;
        let receivers = self.received.entry(frame).or_default();
        if receivers.contains(&to) {
            self.twice.get_or_insert(Verdict::ReceivedTwice { frame, to });
        }
        receivers.push(to);
        let passed = self.passed[to as usize];
        if passed != sent.after {
            for (number, attempt) in self.attempts.iter_mut().enumerate() {
                let (sent_after, received_after) = (sent.after >> number & 1 != 0, passed >> number & 1 != 0);
                if sent_after && !received_after {
                    attempt.crossed_backwards.push((frame, sent.by, to));
                } else if received_after && !sent_after {
                    attempt.crossed.insert((frame, to));
                }
            }
        }
        let by = sent.by;
        if let (Some(clocks), Some(theirs)) = (&mut self.clocks, &sent.clock) {
            let mine = &mut clocks[to as usize];
            mine.iter_mut().zip(theirs).for_each(|(mine, &theirs)| *mine = theirs.max(*mine));
        }
        self.tick(to);
        by
    }

    /// A machine is cut: the instant at which its state is what the snapshot will hold.
    pub fn cut(&mut self, machine: Machine, attempt: u32) {
        self.passed[machine as usize] |= 1 << attempt;
        if let Some(clocks) = &self.clocks {
            let noted = clocks[machine as usize].clone();
            self.attempts[attempt as usize].clocks.insert(machine, noted);
        }
    }

    /// A machine's host takes part in an attempt, again if it has left it or died in it: a cut that the machine may have made
    /// is none of the snapshot's.
    pub fn takes_part(&mut self, machine: Machine, attempt: u32) {
        let bit = 1 << attempt;
        if self.passed[machine as usize] & bit == 0 {
            return;
        }
        self.passed[machine as usize] &= !bit;
        self.frames.iter_mut().filter(|frame| frame.by == machine).for_each(|frame| frame.after &= !bit);
        let attempt = &mut self.attempts[attempt as usize];
        attempt.crossed.retain(|(_, to)| *to != machine);
        attempt.crossed_backwards.retain(|(_, from, _)| *from != machine);
        attempt.recorded.retain(|(_, to)| *to != machine);
        attempt.clocks.remove(&machine);
    }

    /// The snapshot, should it come to exist, holds this frame for this machine.
    pub fn recorded(&mut self, attempt: u32, frame: FrameId, to: Machine) {
        self.attempts[attempt as usize].recorded.push((frame, to));
    }

    /// How many attempts were begun.
    pub fn attempts(&self) -> u32 {
        self.attempts.len() as u32
    }

    /// Judges the cut of a snapshot that has come to exist. The recording is judged at the end of the run.
    pub fn judge_cut(&mut self, attempt: u32) -> Result<(), Verdict> {
        self.attempts[attempt as usize].finished = true;
        if let Some(machine) = self.passed.iter().position(|passed| passed >> attempt & 1 == 0) {
            return Err(Verdict::NotCut { attempt, machine: machine as Machine });
        }
        let crossing = self.attempts[attempt as usize].crossed_backwards.first().copied();
        let too_much = self.knows_too_much(attempt);
        if self.clocks.is_some() {
            assert_eq!(
                crossing.is_some(),
                too_much.is_some(),
                "the two ways to judge disagree: {crossing:?}"
            );
        }
        match (crossing, too_much) {
            (Some((frame, from, to)), _) => Err(Verdict::CrossedBackwards { attempt, frame, from, to }),
            (None, Some(verdict)) => Err(verdict),
            (None, None) => Ok(()),
        }
    }

    /// Judges the recordings of all snapshots that exist, and that nothing was received twice.
    pub fn judge_recordings(&self) -> Result<(), Verdict> {
        if let Some(verdict) = &self.twice {
            return Err(verdict.clone());
        }
        let snapshots = self.attempts.iter().enumerate().filter(|(_, attempt)| attempt.finished);
        for (number, found) in snapshots {
            let attempt = number as u32;
            let mut recorded = HashSet::new();
            for &(frame, to) in &found.recorded {
                let sent_after = self.frames[frame as usize].after >> number & 1 != 0;
                let received = self.received.get(&frame).is_some_and(|receivers| receivers.contains(&to));
                let crossed = found.crossed.contains(&(frame, to));
                if sent_after || (received && !crossed) || !recorded.insert((frame, to)) {
                    return Err(Verdict::WronglyRecorded { attempt, frame, to });
                }
            }
            // The least one, so that the verdict does not depend on the order of a hash table.
            if let Some(&(frame, to)) = found.crossed.difference(&recorded).min() {
                return Err(Verdict::NotRecorded { attempt, frame, to });
            }
        }
        Ok(())
    }

    /// How many frames crossed an attempt's cut forwards and were received.
    pub fn crossed(&self, attempt: u32) -> usize {
        self.attempts[attempt as usize].crossed.len()
    }

    fn knows_too_much(&self, attempt: u32) -> Option<Verdict> {
        let clocks = &self.attempts[attempt as usize].clocks;
        for (&knower, noted) in clocks {
            for (&of, own) in clocks {
                let (knows, had) = (noted[of as usize], own[of as usize]);
                if knows > had {
                    return Some(Verdict::KnowsTooMuch { attempt, knower, knows, of, had });
                }
            }
        }
        None
    }

    /// One more event of a machine; returns its clock then.
    fn tick(&mut self, machine: Machine) -> Option<Box<[u32]>> {
        let clock = &mut self.clocks.as_mut()?[machine as usize];
        clock[machine as usize] += 1;
        Some(clock.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_after_the_cut_and_an_effect_before_it_are_found_even_along_a_chain() {
        for whole_clocks in [false, true] {
            let mut judge = Judge::new(3, whole_clocks);
            let attempt = judge.attempt();
            judge.cut(0, attempt);
            let first = judge.send(0);
            judge.receive(1, first);
            let second = judge.send(1);
            judge.receive(2, second);
            judge.cut(2, attempt);
            judge.cut(1, attempt);
            let verdict = judge.judge_cut(attempt);
            assert_eq!(verdict, Err(Verdict::CrossedBackwards { attempt, frame: first, from: 0, to: 1 }));
        }
    }

    #[test]
    fn in_flight_is_what_was_sent_before_and_received_after() {
        for (recorded, expected) in [
            (vec![0], Ok(())),
            (vec![], Err(Verdict::NotRecorded { attempt: 0, frame: 0, to: 1 })),
            (vec![0, 0], Err(Verdict::WronglyRecorded { attempt: 0, frame: 0, to: 1 })),
            (vec![0, 1], Err(Verdict::WronglyRecorded { attempt: 0, frame: 1, to: 1 })),
            (vec![0, 2], Err(Verdict::WronglyRecorded { attempt: 0, frame: 2, to: 1 })),
        ] {
            let mut judge = Judge::new(2, true);
            let attempt = judge.attempt();
            let in_flight = judge.send(0);
            let before = judge.send(0);
            judge.receive(1, before);
            judge.cut(0, attempt);
            judge.cut(1, attempt);
            judge.receive(1, in_flight);
            let after = judge.send(0);
            judge.receive(1, after);
            recorded.into_iter().for_each(|frame| judge.recorded(attempt, frame, 1));
            assert_eq!(judge.judge_cut(attempt), Ok(()));
            assert_eq!(judge.judge_recordings(), expected);
        }
    }

    #[test]
    fn a_machine_that_was_not_cut_and_a_frame_that_comes_twice_are_found() {
        let mut judge = Judge::new(2, false);
        let attempt = judge.attempt();
        judge.cut(0, attempt);
        assert_eq!(judge.judge_cut(attempt), Err(Verdict::NotCut { attempt, machine: 1 }));
        let frame = judge.send(0);
        judge.receive(1, frame);
        judge.receive(1, frame);
        assert_eq!(judge.judge_recordings(), Err(Verdict::ReceivedTwice { frame, to: 1 }));
    }
}
