//! What QEMU, guests and users' images say, mangled: refused or understood, with bounded memory, and never a panic.
//! (Migration streams: beside their parser's tests.)

use std::io;

use proptest::prelude::*;

use crate::guest_agent;
use crate::mangle::{config, mangled, mangles};
use crate::qcow2::{Image, ImageError, ReadAt};
use crate::qmp::{Decoder, Message, SESSION};

/// Besides what [`SESSION`] has: every kind of value.
const VALUES: &str = "{\"timestamp\": {\"seconds\": 5}, \"event\": \"NEW_TWO\", \"data\": {\"a\": [1, 2.5e9, null, \"\\u00e9\"]}}\r\n";

/// However it comes in pieces, the same messages and errors come of it.
#[test]
fn mangled_qmp() {
    let whole = [SESSION, VALUES].concat().into_bytes();
    proptest!(config(1000), |(how in mangles(), piece in 1..300_usize)| {
        let bytes = mangled(&whole, &how);
        let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
            let mut decoder = Decoder::with_limits(200, 30);
            let mut all: Vec<Result<Message, String>> = Vec::new();
            for piece in pieces {
                decoder.feed(piece);
                all.extend(std::iter::from_fn(|| decoder.next_message()).map(|one| one.map_err(|e| e.to_string())));
            }
            all
        };
        let at_once = read(&mut [&bytes[..]].into_iter());
        prop_assert!(at_once.len() <= bytes.iter().filter(|byte| **byte == b'\n').count() + 1);
        prop_assert_eq!(at_once, read(&mut bytes.chunks(piece)));
    });
}

#[test]
fn mangled_answers_of_guests() {
    let answers = [
        r#"{"return": {"exited": true, "exitcode": 3, "out-data": "aGk=", "err-data": "", "err-truncated": true}}"#,
        r#"{"return": {"exited": true, "signal": 9}}"#,
        r#"{"return": {"exited": false}}"#,
        r#"{"error": {"class": "CommandNotFound", "desc": "no such command"}}"#,
    ];
    for answer in answers {
        let line = format!("{answer}\n");
        proptest!(config(500), |(how in mangles())| {
            let bytes = mangled(line.as_bytes(), &how);
            let mut decoder = guest_agent::decoder();
            decoder.feed(&bytes);
            while let Some(value) = decoder.next_value() {
                let status = value.map_err(Into::into).and_then(|value| guest_agent::answer("x", value));
                if let Ok(Some(status)) = status.and_then(|value| guest_agent::parse_status(&value)) {
                    prop_assert!(status.stdout.len() + status.stderr.len() <= bytes.len());
                }
            }
        });
    }
}

/// Bytes that notice when somebody reads beyond them.
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        let end = offset as usize + buffer.len();
        buffer.copy_from_slice(self.0.get(offset as usize..end).expect("within its length"));
        Ok(())
    }

    fn length(&self) -> u64 {
        self.0.len() as u64
    }
}

/// Everything that can be asked of an image, or why it cannot.
fn look(bytes: Vec<u8>) -> Result<(), ImageError> {
    let length = bytes.len() as u64;
    let mut image = Image::open(Bytes(bytes))?;
    let mut visited = 0;
    let walked = image.each_cluster(|_, _| {
        visited += 1;
        Ok::<_, ImageError>(())
    });
    // An entry of a table is 8 bytes of the file, and each table is looked at as often as it could be another.
    assert!(visited <= (length + (4 << 20)) / 8, "{visited} clusters in {length} bytes");
    let mut part = vec![0; 3000];
    for at in [0, 1000, 70_000, image.virtual_bytes().saturating_sub(3000), image.virtual_bytes()] {
        image.read(at, &mut part)?;
    }
    walked
}

#[test]
fn mangled_images() {
    let folder = tempfile::tempdir().expect("folder");
    let (raw, image) = (folder.path().join("raw"), folder.path().join("image"));
    let mut bytes: Vec<u8> = (0..90_000_u32).map(|n| (n / 700) as u8).collect();
    bytes[20_000..60_000].fill(0);
    bytes.resize(90_112, 7);
    std::fs::write(&raw, bytes).expect("write");
    for options in [
        &["-o", "cluster_size=512"][..],
        &["-o", "compat=0.10,cluster_size=4096"],
        &["-c", "-o", "cluster_size=4096"],
        &["-c", "-o", "cluster_size=4096,compression_type=zstd"],
    ] {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).arg(&raw).arg(&image);
        assert!(command.status().expect("qemu-img runs").success());
        let whole = std::fs::read(&image).expect("read");
        look(whole.clone()).expect("it is sound");
        // Most of an image is data: its tables are mangled as often.
        let tables: Vec<usize> = (0..whole.len() / 8).filter(|word| whole[word * 8] & 0xc0 != 0).collect();
        proptest!(config(400), |(how in mangles(), word in any::<prop::sample::Index>(), new in any::<u64>(), both in any::<bool>())| {
            let mut bytes = whole.clone();
            if both && !tables.is_empty() {
                let at = tables[word.index(tables.len())] * 8;
                bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
            }
            let _ = look(mangled(&bytes, &how));
        });
    }
}
