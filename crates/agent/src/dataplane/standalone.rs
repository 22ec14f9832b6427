//! The data plane alone: a plain switch between streams, without an agent around it.

use std::io;
use std::os::unix::net::UnixStream;

use diorama_switch::{Epoch, NetworkConfig, Switch};

use super::{DataPlane, Segment};

/// One network of `mtu` between streams that speak as QEMU's `-netdev stream` does. It lasts as long as the
/// process: the thread it runs on is the data plane's, as in the agent.
///
/// For measuring the switch as it is, and for nothing else.
///
/// # Errors
/// When the kernel refuses the thread, epoll, or a stream.
pub fn switch_streams(streams: Vec<UnixStream>, mtu: u16) -> io::Result<()> {
    let plane = DataPlane::start()?;
    let mut switch = Switch::new(Epoch(0));
    let network = switch.add_network(NetworkConfig::new(mtu, 1));
    let ports: Vec<_> = streams.iter().map(|_| switch.add_port(network)).collect();
    plane.call(move |plane| {
        // The address matters only when an agent takes over another's connections.
        let named = ports.iter().map(|port| (*port, [0; 6])).collect();
        let segment = plane.attach(|id| Segment::new(id, switch, vec![network], named));
        ports
            .into_iter()
            .zip(streams)
            .try_for_each(|(port, stream)| plane.connect(segment, port, stream, false))
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn frames_pass_from_stream_to_stream() {
        let (mut first, first_port) = UnixStream::pair().unwrap();
        let (mut second, second_port) = UnixStream::pair().unwrap();
        switch_streams(vec![first_port, second_port], 1500).unwrap();
        let mut sent = 60_u32.to_be_bytes().to_vec();
        sent.extend([0xff; 6]);
        sent.extend([2, 0, 0, 0, 0, 1]);
        sent.resize(64, 7);
        first.write_all(&sent).unwrap();
        let mut received = [0; 64];
        second.read_exact(&mut received).unwrap();
        assert_eq!(received[..], sent[..]);
    }
}
