//! The frames in flight as a pcapng file: an interface for each network, and what is known of each frame beside it.

use std::borrow::Cow;
use std::io::Cursor;
use std::time::Duration;

use diorama_api::{ApiError, ErrorKind};
use diorama_store::{MachineRecord, StoredFrame};
use diorama_topology::Environment;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness};

use super::Work;
use crate::problem::store_error;

/// Timestamps are in units of 10 to the minus this many seconds.
const NANOSECONDS: u8 = 9;

impl Work<'_> {
    /// The file of the frames for some machines.
    pub(super) fn frames(&self, machines: &[&MachineRecord]) -> Result<Vec<u8>, ApiError> {
        let manifest = &self.stored.manifest;
        let mut frames = self.agent.store.read_frames(self.stored).map_err(store_error)?;
        frames.retain(|frame| machines.iter().any(|machine| machine.name == frame.machine));
        let created: jiff::Timestamp = manifest.created.parse().map_err(|error| {
            ApiError::new(ErrorKind::Corrupt, format!("the snapshot's time {:?}: {error}", manifest.created))
        })?;
        let cut = u64::try_from(created.as_nanosecond()).map(Duration::from_nanos).unwrap_or_default();
        let about = format!(
            "Frames in flight in snapshot {} ({}) of {}: sent before their senders' cuts, delivered after their \
             receivers'. Times are the cut's plus how long after it each was delivered.",
            self.stored.name, self.stored.id, manifest.environment
        );
        encode(&manifest.specification, cut, &about, &frames).map_err(|error| {
            ApiError::new(ErrorKind::Internal, format!("the frames cannot be a pcapng file: {error}"))
        })
    }
}

fn encode(
    environment: &Environment,
    cut: Duration,
    about: &str,
    frames: &[StoredFrame],
) -> Result<Vec<u8>, pcap_file::PcapError> {
    let section = SectionHeaderBlock {
        endianness: Endianness::Little,
        options: vec![
            SectionHeaderOption::UserApplication(Cow::Borrowed(concat!(
                "diorama ",
                env!("CARGO_PKG_VERSION")
            ))),
            SectionHeaderOption::Comment(Cow::Owned(about.to_owned())),
        ],
        ..SectionHeaderBlock::default()
    };
    let mut writer = PcapNgWriter::with_section_header(Cursor::new(Vec::new()), section)?;
    for network in &environment.networks {
        writer.write_pcapng_block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Owned(network.name.to_string())),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        })?;
    }
    for frame in frames {
        // A network that the environment does not have: `snapshot verify` says so.
        let network = environment.networks.iter().position(|network| network.name.as_str() == frame.network);
        let Some(network) = network else { continue };
        writer.write_pcapng_block(EnhancedPacketBlock {
            interface_id: network as u32,
            timestamp: cut.saturating_add(Duration::from_nanos(frame.after_cut_ns)),
            original_len: frame.bytes.len() as u32,
            data: Cow::Borrowed(&frame.bytes),
            options: vec![EnhancedPacketOption::Comment(Cow::Owned(comment(environment, frame)))],
        })?;
    }
    Ok(writer.into_inner().into_inner())
}

/// What the snapshot knows of a frame.
fn comment(environment: &Environment, frame: &StoredFrame) -> String {
    let sender = frame.bytes.get(6..12).and_then(|address| {
        environment.machines.iter().find_map(|machine| {
            let nic = machine.nics.iter().position(|nic| nic.mac.bytes() == address)?;
            Some(format!("{} NIC {nic} (by its address)", machine.name))
        })
    });
    format!(
        "to {} NIC {}, from {}, colour {}, {} ns after the receiver's cut",
        frame.machine,
        frame.nic,
        sender.unwrap_or_else(|| "an unknown address".to_owned()),
        frame.colour,
        frame.after_cut_ns,
    )
}

#[cfg(test)]
mod tests {
    use diorama_topology::SourceFile;
    use pcap_file::pcapng::{Block, PcapNgReader};

    use super::*;

    struct NoFiles;

    impl diorama_topology::Files for NoFiles {
        fn is_file(&self, _: &std::path::Path) -> bool {
            true
        }
    }

    #[test]
    fn frames_are_packets_with_what_is_known_of_them() {
        let text = "name: pair\nmachines:\n  a: {image: micro, nics: [{network: lan, mac: '52:54:00:00:00:01'}]}\n  \
                    b: {image: micro, nics: [lan, wan]}\nnetworks: {lan: {}, wan: {}}\n";
        let source = SourceFile { name: "x", text, folder: std::path::Path::new("/") };
        let environment = diorama_topology::parse(&source, &NoFiles, &["micro"]).unwrap();
        let mut bytes = vec![0xff; 6];
        bytes.extend_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
        bytes.extend_from_slice(b"\x08\x06 odd");
        let frame = |network: &str, nic, after_cut_ns| StoredFrame {
            network: network.into(),
            machine: "b".into(),
            nic,
            colour: 3,
            after_cut_ns,
            bytes: bytes.clone(),
        };
        let cut = Duration::new(1_700_000_000, 5);
        let file = encode(&environment, cut, "about", &[frame("wan", 1, 7), frame("lan", 0, 1_500)]).unwrap();
        let mut reader = PcapNgReader::new(&file[..]).unwrap();
        let (mut interfaces, mut packets) = (Vec::new(), Vec::new());
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::InterfaceDescription(block) => {
                    assert!(block.options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
                    for option in &block.options {
                        if let InterfaceDescriptionOption::IfName(name) = option {
                            interfaces.push(name.to_string());
                        }
                    }
                }
                Block::EnhancedPacket(block) => packets.push(block.into_owned()),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(interfaces, ["lan", "wan"]);
        assert_eq!([packets[0].interface_id, packets[1].interface_id], [1, 0]);
        assert_eq!(packets[0].timestamp, cut + Duration::from_nanos(7));
        assert_eq!(packets[1].data, bytes);
        let EnhancedPacketOption::Comment(comment) = &packets[1].options[0] else { panic!("{packets:?}") };
        assert_eq!(
            comment,
            "to b NIC 0, from a NIC 0 (by its address), colour 3, 1500 ns after the receiver's cut"
        );
    }
}
