//! What the switch does in single situations, through its public interface.

use diorama_switch::{
    Accounting, ChannelCounts, CutWanted, Dropped, Epoch, EpochError, FrameReader, Hold, InFlight,
    InjectError, LearnError, Mac, NetworkConfig, NetworkId, PeerId, PortId, RecordingActive, Switch, Time,
};

const ALL: Mac = [0xff; 6];
const QUEUE_BYTES: usize = 4096;

fn mac(n: u8) -> Mac {
    [2, 0, 0, 0, 0, n]
}

fn frame(destination: Mac, source: Mac, len: usize) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    bytes.resize(len, 0x2e);
    bytes
}

/// A network of connected ports.
fn lan(ports: usize) -> (Switch, NetworkId, Vec<PortId>) {
    let mut switch = Switch::new(Epoch(0));
    let network =
        switch.add_network(NetworkConfig { queue_bytes: QUEUE_BYTES, ..NetworkConfig::new(1500, 1) });
    let ports: Vec<PortId> = (0..ports).map(|_| switch.add_port(network)).collect();
    ports.iter().for_each(|&port| switch.set_connected(port, true));
    (switch, network, ports)
}

/// Writes all that is writable; returns how many frames that was.
fn drain(switch: &mut Switch, port: PortId, now: Time) -> usize {
    let bytes = switch.writable(port).concat();
    switch.written(port, bytes.len(), now);
    let mut reader = FrameReader::new(&bytes);
    let frames = reader.by_ref().map(Result::unwrap).count();
    assert_eq!(reader.consumed(), bytes.len());
    frames
}

fn cut(switch: &mut Switch, port: PortId, to: u32, now: u64) {
    switch.hold(port, Hold::Cut, Time(now));
    switch.advance_epoch(port, Epoch(to), Time(now)).unwrap();
    switch.release(port, Hold::Cut, Time(now));
}

#[test]
fn forwards_like_a_learning_bridge() {
    // Sender, source, destination -> frames at each of the three ports. The third stands for group and unknown addresses.
    let cases = [
        ("broadcast floods", 0, mac(1), ALL, [0, 1, 1]),
        ("unknown floods", 0, mac(1), mac(9), [0, 1, 1]),
        ("learned from the frames before", 1, mac(2), mac(1), [1, 0, 0]),
        ("multicast floods, even link-local", 1, mac(2), [1, 0x80, 0xc2, 0, 0, 0], [1, 0, 1]),
        ("a moved address is followed", 2, mac(1), mac(2), [0, 1, 0]),
        ("to where it moved", 1, mac(2), mac(1), [0, 0, 1]),
        ("a group source is not learned", 0, [3, 0, 0, 0, 0, 1], mac(2), [0, 1, 0]),
        ("so a frame to it floods", 0, mac(3), [3, 0, 0, 0, 0, 1], [0, 1, 1]),
        ("its own address stays at home", 0, mac(3), mac(3), [0, 0, 0]),
    ];
    let (mut switch, network, ports) = lan(3);
    for (what, from, source, destination, expected) in cases {
        switch.ingress(ports[from], &frame(destination, source, 60), Time(0));
        let got: Vec<usize> = ports.iter().map(|&port| drain(&mut switch, port, Time(0))).collect();
        assert_eq!(got, expected, "{what}");
    }
    assert_eq!(switch.network_counters(network).dropped.no_receiver, 1, "the one that stayed at home");
    switch.assert_consistent();
}

#[test]
fn what_nobody_receives_is_owed_once() {
    let (mut switch, network, ports) = lan(2);
    switch.learn(network, mac(2), ports[1], Time(0)).unwrap();
    switch.set_connected(ports[1], false);
    for destination in [ALL, mac(9), mac(2), mac(1)] {
        switch.ingress(ports[0], &frame(destination, mac(1), 60), Time(0));
    }
    let counters = switch.network_counters(network);
    assert_eq!((counters.owed, counters.dropped), (4, Dropped { no_receiver: 4, ..Dropped::default() }));
    assert_eq!(switch.counters(ports[1]).dropped.no_receiver, 1, "only what was addressed to it");
}

#[test]
fn invalid_frames_are_owed_to_nobody() {
    let (mut switch, network, ports) = lan(2);
    for (len, runts, giants, owed) in
        [(0, 1, 0, 0), (13, 2, 0, 0), (14, 2, 0, 1), (1522, 2, 0, 2), (1523, 2, 1, 2)]
    {
        switch.ingress(ports[0], &frame(ALL, mac(1), 1600)[..len], Time(0));
        let counters = switch.counters(ports[0]);
        assert_eq!((counters.runts, counters.giants), (runts, giants), "{len} bytes");
        assert_eq!(switch.network_counters(network).owed, owed, "{len} bytes");
    }
}

#[test]
fn networks_are_apart() {
    let (mut switch, _, ports) = lan(2);
    let other = switch.add_network(NetworkConfig::new(1500, 2));
    let stranger = switch.add_port(other);
    switch.set_connected(stranger, true);
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(0));
    assert_eq!(drain(&mut switch, stranger, Time(0)), 0);
    switch.ingress(stranger, &frame(mac(1), mac(5), 60), Time(0));
    assert_eq!(drain(&mut switch, ports[0], Time(0)), 0);
}

#[test]
fn a_queue_holds_its_bound_and_four_times_that_during_a_cut() {
    // 60 + 4 bytes each: 64 frames fill the bound.
    for (hold, expected) in [(None, 64), (Some(Hold::Pause), 64), (Some(Hold::Cut), 256)] {
        let (mut switch, _, ports) = lan(2);
        if let Some(hold) = hold {
            switch.hold(ports[1], hold, Time(0));
        }
        for _ in 0..300 {
            switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(0));
        }
        let counters = switch.counters(ports[1]);
        assert_eq!(
            (counters.queued_frames, counters.dropped.queue_full),
            (expected, 300 - expected),
            "{hold:?}"
        );
        assert_eq!(counters.peak_queued_bytes, expected * 64);
        if let Some(hold) = hold {
            assert_eq!(drain(&mut switch, ports[1], Time(0)), 0);
            assert_eq!(switch.release(ports[1], hold, Time(70)), Some(70));
            assert_eq!(switch.release(ports[1], hold, Time(90)), None);
        }
        assert_eq!(drain(&mut switch, ports[1], Time(0)) as u64, expected);
    }
}

#[test]
fn a_paused_machine_stays_held_through_its_cut_and_its_queue_is_recorded() {
    let (mut switch, network, ports) = lan(2);
    switch.hold(ports[1], Hold::Pause, Time(0));
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(1));
    switch.start_recording(Epoch(1), InFlight::Record).unwrap();
    cut(&mut switch, ports[1], 1, 5);
    assert!(switch.is_held(ports[1]));
    assert_eq!(switch.pop_dirty(), None);
    switch.ingress(ports[0], &frame(ALL, mac(1), 61), Time(8));
    cut(&mut switch, ports[0], 1, 9);
    let recording = switch.stop_recording().unwrap();
    let seen: Vec<_> = recording.frames.iter().map(|f| (f.to, f.after_cut_ns, f.bytes.len())).collect();
    assert_eq!(seen, [(ports[1], 0, 60), (ports[1], 3, 61)]);
    assert_eq!(switch.accounting(network, Epoch(1)).unwrap().unaccounted(), 0);
    switch.release(ports[1], Hold::Pause, Time(20));
    assert_eq!(switch.pop_dirty(), Some(ports[1]));
    assert_eq!(drain(&mut switch, ports[1], Time(20)), 2);
}

#[test]
fn a_newer_colour_waits_and_asks_for_the_cut_once() {
    let (mut switch, _, ports) = lan(3);
    cut(&mut switch, ports[0], 1, 0);
    for _ in 0..3 {
        switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(1));
    }
    let mut wanted: Vec<_> = std::iter::from_fn(|| switch.pop_cut_wanted()).collect();
    wanted.sort_by_key(|w| w.port);
    assert_eq!(wanted, [1, 2].map(|n| CutWanted { port: ports[n], epoch: Epoch(1) }));
    assert_eq!(switch.waiting_for(ports[1]), Some(Epoch(1)));
    assert_eq!((switch.pop_dirty(), drain(&mut switch, ports[1], Time(1))), (None, 0));
    cut(&mut switch, ports[1], 1, 2);
    assert_eq!((switch.pop_dirty(), switch.waiting_for(ports[1])), (Some(ports[1]), None));
    assert_eq!(drain(&mut switch, ports[1], Time(3)), 3);
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(4));
    assert_eq!(switch.pop_cut_wanted(), None, "port 2 has asked already");
    cut(&mut switch, ports[0], 2, 5);
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(6));
    assert_eq!(
        std::iter::from_fn(|| switch.pop_cut_wanted()).map(|w| w.epoch).collect::<Vec<_>>(),
        [Epoch(2); 2]
    );
}

#[test]
fn epochs_advance_only_under_a_hold_and_never_go_back() {
    let (mut switch, _, ports) = lan(1);
    let port = ports[0];
    assert_eq!(switch.advance_epoch(port, Epoch(1), Time(0)), Err(EpochError::NotHeld { port }));
    switch.hold(port, Hold::Pause, Time(0));
    assert_eq!(switch.advance_epoch(port, Epoch(1), Time(0)), Err(EpochError::NotHeld { port }));
    switch.hold(port, Hold::Cut, Time(0));
    switch.advance_epoch(port, Epoch(4), Time(0)).unwrap();
    switch.advance_epoch(port, Epoch(4), Time(9)).unwrap();
    let back = EpochError::Backwards { port, current: Epoch(4), requested: Epoch(3) };
    assert_eq!(switch.advance_epoch(port, Epoch(3), Time(0)), Err(back));
    assert_eq!((switch.epoch(port), switch.newest_epoch()), (Epoch(4), Epoch(4)));
}

#[test]
fn a_frame_begun_before_the_cut_is_finished_during_it_and_recorded_whole() {
    for policy in [InFlight::Record, InFlight::Drop] {
        let (mut switch, network, ports) = lan(2);
        for _ in 0..2 {
            switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(0));
        }
        switch.written(ports[1], 10, Time(0));
        switch.start_recording(Epoch(1), policy).unwrap();
        switch.hold(ports[1], Hold::Cut, Time(1));
        assert!(switch.mid_frame(ports[1]));
        assert_eq!(switch.writable(ports[1]).concat().len(), 54);
        switch.advance_epoch(ports[1], Epoch(1), Time(2)).unwrap();
        switch.written(ports[1], 54, Time(3));
        assert_eq!(switch.writable(ports[1]).concat().len(), 0);
        switch.release(ports[1], Hold::Cut, Time(4));
        cut(&mut switch, ports[0], 1, 5);
        let delivered = drain(&mut switch, ports[1], Time(6));
        let recording = switch.stop_recording().unwrap();
        let books = switch.accounting(network, Epoch(1)).unwrap();
        let dropped = usize::from(policy == InFlight::Drop);
        assert_eq!((delivered, recording.frames.len()), (1 - dropped, 2 - dropped), "{policy:?}");
        assert_eq!(recording.frames[0].bytes[..], frame(ALL, mac(1), 60));
        assert_eq!((books.dropped.cut_drop, books.unaccounted()), (dropped as u64, 0), "{policy:?}");
    }
}

#[test]
fn a_recording_that_overflows_says_so_and_the_books_do_not_balance() {
    let (mut switch, network, ports) = lan(2);
    switch.set_recording_limit(1500);
    switch.start_recording(Epoch(1), InFlight::Record).unwrap();
    assert_eq!(switch.start_recording(Epoch(2), InFlight::Record), Err(RecordingActive { cut: Epoch(1) }));
    cut(&mut switch, ports[1], 1, 0);
    for _ in 0..3 {
        switch.ingress(ports[0], &frame(ALL, mac(1), 1000), Time(1));
        drain(&mut switch, ports[1], Time(1));
    }
    let recording = switch.stop_recording().unwrap();
    assert_eq!((recording.frames.len(), recording.overflow.frames, recording.overflow.bytes), (1, 2, 2000));
    assert!(!recording.is_complete());
    let books = switch.accounting(network, Epoch(1)).unwrap();
    assert_eq!((books.in_flight, books.unrecorded, books.unaccounted()), (1, 2, 2));
    assert!(switch.stop_recording().is_none());
}

#[test]
fn disconnecting_drops_the_queue_and_a_recorded_copy_stays_in_flight() {
    let (mut switch, network, ports) = lan(2);
    switch.start_recording(Epoch(1), InFlight::Record).unwrap();
    cut(&mut switch, ports[1], 1, 0);
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(1));
    switch.written(ports[1], 7, Time(1));
    switch.set_connected(ports[1], false);
    assert!(!switch.mid_frame(ports[1]) && switch.pop_dirty().is_none());
    switch.ingress(ports[0], &frame(ALL, mac(1), 60), Time(2));
    let books = switch.accounting(network, Epoch(1)).unwrap();
    assert_eq!((books.in_flight, books.dropped.no_receiver, books.unaccounted()), (1, 1, 0));
    let books = switch.accounting(network, Epoch(2)).unwrap();
    assert_eq!((books.in_flight, books.dropped.no_receiver, books.unaccounted()), (0, 2, 0));
    switch.assert_consistent();
}

#[test]
fn refuses_what_a_damaged_snapshot_may_hold() {
    let (mut switch, network, ports) = lan(1);
    let other = switch.add_network(NetworkConfig { mac_entries: 0, ..NetworkConfig::new(1500, 2) });
    let stranger = switch.add_port(other);
    let port = ports[0];
    let injected = switch.inject(port, &[0; 13], Epoch(0), Time(0));
    assert_eq!(injected, Err(InjectError::Length { to: port, len: 13, max: 1522 }));
    assert!(switch.inject(port, &[0; 1523], Epoch(u32::MAX), Time(0)).is_err());
    assert_eq!(switch.learn(network, ALL, port, Time(0)), Err(LearnError::NotUnicast { mac: ALL }));
    let elsewhere = LearnError::OtherNetwork { network, port: stranger };
    assert_eq!(switch.learn(network, mac(1), stranger, Time(0)), Err(elsewhere));
    for n in 0..4 {
        switch.learn(other, mac(n), stranger, Time(0)).unwrap();
    }
    let full = LearnError::Full { network: other, port: stranger, mac: mac(4) };
    assert_eq!(switch.learn(other, mac(4), stranger, Time(0)), Err(full));
    assert_eq!(switch.learned(other).count(), 4);
    switch.inject(port, &frame(mac(1), mac(2), 60), Epoch(u32::MAX), Time(0)).unwrap();
    assert_eq!(drain(&mut switch, port, Time(0)), 0, "from a future cut");
    switch.assert_consistent();
}

/// Two hosts with a network of two ports each, and a machine's address on each port.
struct Hosts {
    switches: [Switch; 2],
    network: NetworkId,
    ports: [PortId; 2],
    peer: PeerId,
}

impl Hosts {
    fn new() -> Self {
        let (a, network, ports) = lan(2);
        let (b, ..) = lan(2);
        let mut switches = [a, b];
        let mut peer = PeerId(0);
        for switch in &mut switches {
            peer = switch.add_peer(0);
            switch.set_peer_attached(peer, network, true);
            switch.set_peer_connected(peer, true);
        }
        Self { switches, network, ports: [ports[0], ports[1]], peer }
    }

    /// What the tunnel would carry from a host, in order.
    fn sent(&mut self, host: usize) -> Vec<(Epoch, Vec<u8>)> {
        let switch = &mut self.switches[host];
        let mut frames = Vec::new();
        while let Some(outgoing) = switch.outgoing(self.peer) {
            assert_eq!(outgoing.network, self.network);
            frames.push((outgoing.colour, outgoing.bytes.concat()));
            assert!(switch.outgoing_taken(self.peer, Time(9)));
        }
        frames
    }

    fn arrive(&mut self, host: usize, (colour, frame): &(Epoch, Vec<u8>), now: u64) -> bool {
        let let_in = self.switches[host].remote_ingress(self.peer, self.network, *colour, frame, Time(now));
        self.switches[host].assert_consistent();
        let_in
    }

    fn drain_all(&mut self, host: usize) -> [usize; 2] {
        self.ports.map(|port| drain(&mut self.switches[host], port, Time(9)))
    }
}

#[test]
fn a_flooded_frame_crosses_a_tunnel_once_and_never_goes_back() {
    let mut hosts = Hosts::new();
    hosts.switches[0].ingress(hosts.ports[0], &frame(ALL, mac(1), 60), Time(1));
    let sent = hosts.sent(0);
    assert_eq!(sent, [(Epoch(0), frame(ALL, mac(1), 60))]);
    assert_eq!(hosts.drain_all(0), [0, 1]);
    assert!(hosts.arrive(1, &sent[0], 2));
    assert_eq!(hosts.drain_all(1), [1, 1]);
    assert_eq!(hosts.sent(1), []);

    // The answer finds its way, and no other host or port sees it.
    hosts.switches[1].ingress(hosts.ports[1], &frame(mac(1), mac(4), 60), Time(3));
    assert_eq!(hosts.drain_all(1), [0, 0]);
    let sent = hosts.sent(1);
    assert!(hosts.arrive(0, &sent[0], 4));
    assert_eq!(hosts.drain_all(0), [1, 0]);
    let learned: Vec<_> = hosts.switches[0].learned_at_peers(hosts.network).collect();
    assert_eq!(learned, [(mac(4), hosts.peer)]);
    assert_eq!(hosts.switches[0].learned(hosts.network).collect::<Vec<_>>(), [(mac(1), hosts.ports[0])]);

    // A frame to a machine that is behind the tunnel it came from is nobody's here.
    assert!(hosts.arrive(0, &(Epoch(0), frame(mac(4), mac(5), 60)), 5));
    assert_eq!((hosts.drain_all(0), hosts.sent(0)), ([0, 0], vec![]));
    assert_eq!(hosts.switches[0].network_counters(hosts.network).dropped.no_receiver, 1);
}

#[test]
fn a_colour_from_another_host_is_held_recorded_and_wants_a_cut() {
    let mut hosts = Hosts::new();
    let [first, second] = hosts.ports;
    let old = (Epoch(0), frame(ALL, mac(1), 60));
    let new = (Epoch(1), frame(ALL, mac(1), 70));
    let receiver = &mut hosts.switches[1];
    receiver.start_recording(Epoch(1), InFlight::Record).unwrap();
    cut(receiver, first, 1, 10);
    assert!(hosts.arrive(1, &new, 12));
    assert!(hosts.arrive(1, &old, 15));
    let receiver = &mut hosts.switches[1];
    assert_eq!(receiver.pop_cut_wanted(), Some(CutWanted { port: second, epoch: Epoch(1) }));
    assert_eq!(hosts.drain_all(1), [2, 0]);
    cut(&mut hosts.switches[1], second, 1, 20);
    assert_eq!(hosts.drain_all(1), [0, 2]);
    let receiver = &mut hosts.switches[1];
    let recorded: Vec<_> = receiver
        .stop_recording()
        .unwrap()
        .frames
        .iter()
        .map(|f| (f.to, f.after_cut_ns, f.bytes.len()))
        .collect();
    assert_eq!(recorded, [(first, 5, 60), (second, 0, 60)]);
    let counts = receiver.channel(hosts.peer, hosts.network, Epoch(1)).unwrap();
    assert_eq!(counts, ChannelCounts { sent: 0, received: 1, lost: 0 });
}

#[test]
fn what_was_declared_lost_stays_lost_and_the_books_of_both_hosts_balance() {
    let mut hosts = Hosts::new();
    let (network, peer) = (hosts.network, hosts.peer);
    for n in 0..5 {
        hosts.switches[0].ingress(hosts.ports[0], &frame(ALL, mac(1), 60 + n), Time(1));
    }
    let sent = hosts.sent(0);
    for switch in &mut hosts.switches {
        switch.start_recording(Epoch(1), InFlight::Record).unwrap();
        hosts.ports.iter().for_each(|&port| cut(switch, port, 1, 10));
    }
    for frame in &sent[..3] {
        assert!(hosts.arrive(1, frame, 11));
    }
    let counts = hosts.switches[0].channel(peer, network, Epoch(1)).unwrap();
    assert_eq!(counts, ChannelCounts { sent: 5, received: 0, lost: 0 });
    assert_eq!(hosts.switches[1].close_channel(peer, network, Epoch(1), counts.sent), Some(2));
    assert_eq!(hosts.switches[0].close_channel(peer, network, Epoch(1), 0), Some(0));
    assert_eq!(hosts.switches[1].stop_recording().unwrap().frames.len(), 6);
    assert!(!hosts.arrive(1, &sent[3], 12), "declared lost");
    assert_eq!(hosts.switches[1].peer_counters(peer).late_frames, 1);

    let parts = hosts.switches.each_ref().map(|s| s.accounting(network, Epoch(1)).unwrap());
    assert_eq!(parts.map(|part| part.unaccounted_here()), [0, 0]);
    let all: Accounting = parts.into_iter().sum();
    // One local copy and one for the other host each, of which three became two.
    assert_eq!((all.sent_before, all.in_flight, all.dropped.wire_loss), (13, 11, 2));
    assert_eq!(all.unaccounted(), 0);
    let counts = hosts.switches[1].channel(peer, network, Epoch(1)).unwrap();
    assert_eq!(counts, ChannelCounts { sent: 0, received: 3, lost: 2 });

    // The next cut does not wait for them again.
    assert!(hosts.arrive(1, &(Epoch(1), frame(ALL, mac(1), 80)), 13));
    assert_eq!(hosts.switches[1].close_channel(peer, network, Epoch(2), 6), Some(2));
    assert_eq!(hosts.switches[1].close_channel(peer, network, Epoch(1), 5), None);
}

#[test]
fn a_peer_is_refused_what_it_may_not_send_and_bounded_in_what_waits_for_it() {
    let mut hosts = Hosts::new();
    let (network, peer) = (hosts.network, hosts.peer);
    let good = (Epoch(0), frame(ALL, mac(1), 60));
    assert!(!hosts.switches[1].remote_ingress(peer, NetworkId(7), Epoch(0), &good.1, Time(1)));
    hosts.switches[1].set_peer_attached(peer, network, false);
    assert!(!hosts.arrive(1, &good, 1));
    hosts.switches[1].set_peer_attached(peer, network, true);
    assert!(!hosts.arrive(1, &(Epoch(0), vec![0; 13]), 1));
    assert!(!hosts.arrive(1, &(Epoch(0), vec![0; 1523]), 1));
    assert!(hosts.arrive(1, &good, 1));
    let counters = hosts.switches[1].peer_counters(peer);
    assert_eq!((counters.foreign_frames, counters.invalid_frames, counters.received_frames), (2, 2, 1));

    let big = frame(ALL, mac(1), 1514);
    for _ in 0..100 {
        hosts.switches[0].ingress(hosts.ports[0], &big, Time(1));
    }
    let counters = hosts.switches[0].peer_counters(peer);
    assert!(counters.queued_bytes <= 1 << 17 && counters.peak_queued_bytes == counters.queued_bytes);
    assert_eq!(counters.dropped.queue_full, 100 - counters.sent_frames);
    assert_eq!(hosts.switches[0].pop_dirty_peer(), Some(peer));
    assert_eq!(hosts.switches[0].pop_dirty_peer(), None);

    // Both forget: as if nothing had passed between them.
    hosts.switches[0].restart_peer(peer);
    hosts.switches[1].restart_peer(peer);
    assert_eq!(hosts.sent(0), []);
    hosts.switches.iter().for_each(Switch::assert_consistent);
    let parts = hosts.switches.each_ref().map(|s| s.accounting(network, Epoch(1)).unwrap());
    assert_eq!(parts.map(|part| (part.passed_on, part.arrived, part.unaccounted())), [(0, 0, 0); 2]);

    hosts.switches[0].set_peer_connected(peer, false);
    hosts.switches[0].ingress(hosts.ports[0], &big, Time(2));
    assert_eq!(hosts.sent(0), []);
}
