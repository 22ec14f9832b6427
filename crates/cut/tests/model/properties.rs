//! What must always hold, what must come to pass, and what has to happen somewhere for the rest to mean anything.
//!
//! The judge's marks on machines and frames (which cuts a machine had made when a frame was sent and when it was
//! delivered) come from the order of events alone; no colour, count or message goes into them.

use stateright::{Model, Property};

use crate::{
    host::{Attempts, Frame, FrameAt},
    world::{Bounds, State},
};

pub fn all(bounds: &Bounds) -> Vec<Property<Bounds>> {
    let faults = bounds.faults;
    let mut properties = always();
    properties.extend([
        Property::sometimes("a snapshot comes to exist", |_: &Bounds, s: &State| s.manifests != 0),
        Property::sometimes("a frame is in flight in a snapshot that exists", |_, s: &State| {
            s.frames.iter().any(|frame| frame.recorded_in & s.manifests != 0)
        }),
        Property::sometimes("a frame of a newer colour waits", |_, s: &State| {
            s.hosts.iter().any(|host| host.waiting_for(&s.frames).is_some())
        }),
        Property::sometimes("a frame begins a cut that becomes a snapshot", |_, s: &State| {
            s.frame_began_a_cut && s.manifests != 0
        }),
    ]);
    if !bounds.forever {
        properties
            .push(Property::eventually("every run ends", |bounds: &Bounds, s: &State| bounds.has_ended(s)));
    }
    if faults.fail + faults.hurries + faults.crash_host + faults.crash_initiator > 0 {
        properties.push(Property::sometimes("a cut is aborted", |_, s: &State| {
            s.hosts.iter().any(|host| host.discarded != 0)
        }));
        properties.push(Property::sometimes(
            "a cut is aborted when some machine has made it",
            |_, s: &State| {
                s.hosts.iter().any(|host| host.ports.iter().any(|port| port.passed & host.discarded != 0))
            },
        ));
    }
    if faults.lose_frame > 0 {
        properties
            .push(Property::sometimes("a snapshot that exists declares a frame lost", |_, s: &State| {
                s.frames.iter().any(|frame| frame.lost_in & s.manifests != 0)
            }));
    }
    if bounds.attempts > 1 {
        properties
            .push(Property::sometimes("the cut after an aborted one becomes a snapshot", |_, s: &State| {
                s.hosts.iter().any(|host| host.discarded & 1 != 0) && s.manifests & 2 != 0
            }));
    }
    if faults.crash_host > 0 {
        properties.extend(a_host_can_crash_in_each_state());
    }
    if faults.crash_host > 0 && faults.fail + faults.hurries > 0 {
        properties.push(Property::sometimes("a crash when discarding", |_, s: &State| {
            s.faults.crash_host > 0
                && s.hosts.iter().any(|host| host.participant.state_name() == "discarding")
        }));
    }
    if faults.crash_initiator > 0 {
        properties.extend(the_initiator_can_crash_in_each_state());
    }
    properties
}

fn always() -> Vec<Property<Bounds>> {
    vec![
        Property::always(
            "no frame is received before a cut that was sent after it",
            |_: &Bounds, s: &State| {
                s.each_snapshot(|snapshot| s.frames.iter().all(|f| !crosses_backwards(f, snapshot)))
            },
        ),
        Property::always(
            "a recorded frame was sent before the cut and not delivered before it",
            |_, s: &State| {
                s.each_snapshot(|snapshot| {
                    let recorded = s.frames.iter().filter(|frame| frame.recorded_in & snapshot != 0);
                    recorded.fold(true, |good, f| {
                        good && f.sent_after & snapshot == 0 && !delivered_before(f, snapshot)
                    })
                })
            },
        ),
        Property::always(
            "each frame sent before is delivered before, recorded or lost, and one of these",
            |_, s: &State| {
                s.each_snapshot(|snapshot| {
                    s.frames.iter().filter(|frame| frame.sent_after & snapshot == 0).all(|frame| {
                        let fates = [
                            delivered_before(frame, snapshot),
                            frame.recorded_in & snapshot != 0,
                            frame.lost_in & snapshot != 0,
                        ];
                        fates.into_iter().filter(|&fate| fate).count() == 1
                    })
                })
            },
        ),
        Property::always("every machine has made the cut of a snapshot that exists", |_, s: &State| {
            let ports = || s.hosts.iter().flat_map(|host| &host.ports);
            s.each_snapshot(|snapshot| ports().all(|port| port.passed & snapshot != 0))
        }),
        Property::always("a snapshot that exists was reported by every host", |_, s: &State| {
            s.hosts.iter().all(|host| s.manifests & !host.reported == 0)
        }),
        Property::always("nobody keeps what does not exist or discards what does", |_, s: &State| {
            s.hosts.iter().all(|host| host.kept & !s.manifests == 0 && host.discarded & s.manifests == 0)
        }),
        Property::always("what the user is told is so", |_, s: &State| {
            s.told_committed & !s.manifests == 0 && s.told_aborted & s.manifests == 0
        }),
        Property::always(
            "a host in no cut holds nothing, records nothing, and is at one epoch",
            |_, s: &State| {
                s.hosts.iter().filter(|host| host.participant.active().is_none()).all(|host| {
                    let epoch = host.participant.epoch();
                    !host.held
                        && host.recording.is_none()
                        && host.work.is_none()
                        && host.in_doubt.is_none()
                        && host.ports.iter().all(|port| port.epoch == epoch)
                })
            },
        ),
        Property::always("no rule is broken on the way", |_, s: &State| s.broken.is_none()),
        Property::always("a run that cannot go on has ended well", |bounds: &Bounds, s: &State| {
            if bounds.forever || !s.at_rest_or_stuck() {
                return true;
            }
            let mut actions = Vec::new();
            bounds.actions(s, &mut actions);
            !actions.is_empty() || bounds.has_ended(s)
        }),
    ]
}

impl Bounds {
    /// Everything has been tried and nothing is left of it: no cut, no message, no frame that waits. Who has a part in a
    /// snapshot that exists keeps it; and an attempt that nothing stood against has succeeded.
    pub fn has_ended(&self, state: &State) -> bool {
        state.at_rest()
            && state.attempts == self.attempts
            && state.frames.len() == self.frames.len()
            && state.frames.iter().all(|f| matches!(f.at, FrameAt::Delivered { .. } | FrameAt::Gone))
            && state.hosts.iter().all(|host| host.kept == state.manifests)
            && state.must_succeed & !state.manifests == 0
    }
}

impl State {
    fn each_snapshot(&self, good: impl Fn(Attempts) -> bool) -> bool {
        (0..Attempts::BITS).map(|n| 1 << n).filter(|&bit: &Attempts| self.manifests & bit != 0).all(good)
    }

    /// Cheap: rules out almost every state that can go on.
    fn at_rest_or_stuck(&self) -> bool {
        self.network.is_empty() && self.writing.is_none() && self.hosts.iter().all(|host| host.work.is_none())
    }
}

fn delivered_before(frame: &Frame, snapshot: Attempts) -> bool {
    matches!(frame.at, FrameAt::Delivered { after, .. } if after & snapshot == 0)
}

fn crosses_backwards(frame: &Frame, snapshot: Attempts) -> bool {
    frame.sent_after & snapshot != 0 && delivered_before(frame, snapshot)
}

/// A state in which the crash is still to come: the checker goes on with it from there.
macro_rules! can_crash {
    ($budget:ident, $who:expr, $($state:literal),+) => {
        [$(Property::sometimes(concat!("a crash when ", $state), |_: &Bounds, s: &State| {
            s.faults.$budget > 0 && $who(s, $state)
        })),+]
    };
}

fn a_host_can_crash_in_each_state() -> impl IntoIterator<Item = Property<Bounds>> {
    fn somebody(s: &State, state: &str) -> bool {
        s.hosts.iter().any(|host| host.participant.state_name() == state)
    }
    can_crash!(
        crash_host,
        somebody,
        "idle",
        "preparing",
        "prepared",
        "cutting",
        "capturing",
        "in doubt",
        "keeping"
    )
}

fn the_initiator_can_crash_in_each_state() -> impl IntoIterator<Item = Property<Bounds>> {
    fn it(s: &State, state: &str) -> bool {
        s.initiator.state_name() == state
    }
    // Its names of states are no participant's, but for the first.
    let preparing =
        Property::sometimes("a crash of the initiator when preparing", |_: &Bounds, s: &State| {
            s.faults.crash_initiator > 0 && it(s, "preparing")
        });
    let others = can_crash!(crash_initiator, it, "taking", "collecting", "writing", "committing");
    others.into_iter().chain([preparing])
}
