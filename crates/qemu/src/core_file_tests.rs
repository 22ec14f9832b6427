//! The layout against QEMU's own word, the head against `readelf`.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

const GIB: u64 = 1 << 30;

#[test]
fn memory_is_where_qemu_has_it() {
    for memory_mib in [64, 2047, 2048, 2815, 2816, 3072, 5120] {
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "pc-q35-7.2", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"])
            .args(["-m", &format!("{memory_mib}M"), "-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU runs");
        qemu.stdin.take().expect("piped").write_all(b"info mtree -f\nquit\n").expect("the monitor reads");
        let output = qemu.wait_with_output().expect("it ends");
        let tree = String::from_utf8_lossy(&output.stdout);
        let view =
            tree.split("FlatView").find(|view| view.contains("AS \"memory\"")).expect("a view of memory");
        // `  0000000000000000-00000000000bffff (prio 0, ram): pc.ram`, or `pc.ram @OFFSET`
        let mut found: Vec<Segment> = Vec::new();
        for line in view.lines().filter(|line| line.contains(": pc.ram")) {
            let (range, rest) = line.trim().split_once(' ').expect("a range");
            let number = |text: &str| u64::from_str_radix(text, 16).expect("a number");
            let (first, last) = range.split_once('-').expect("a range");
            let words: Vec<&str> = rest.split_whitespace().collect();
            let offset = words.iter().find_map(|word| word.strip_prefix('@')).map_or(0, number);
            let (physical, bytes) = (number(first), number(last) - number(first) + 1);
            found.push(Segment { physical, offset, bytes });
        }
        assert!(!found.is_empty(), "{tree}");
        let segments = segments("pc-q35-7.2", memory_mib << 20).expect("known");
        // Each piece that QEMU shows is in one of ours, at the same distance from its beginning.
        for piece in &found {
            assert!(
                segments.iter().any(|segment| piece.physical >= segment.physical
                    && piece.physical + piece.bytes <= segment.physical + segment.bytes
                    && piece.physical - segment.physical == piece.offset - segment.offset),
                "{memory_mib} MiB: {piece:x?} is not in {segments:x?}"
            );
        }
        // And each of ours ends where QEMU's last piece of it ends.
        for segment in &segments {
            let end = segment.physical + segment.bytes;
            assert!(
                found.iter().any(|piece| piece.physical + piece.bytes == end),
                "{memory_mib} MiB: {found:x?}"
            );
        }
    }
}

#[test]
fn readelf_reads_the_head() {
    let segments = segments("pc-q35-7.2", 3 * GIB).expect("known");
    let head = head(&segments, r#"{"snapshot":"abc"}"#);
    assert_eq!(head.offsets.len(), 2);
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("core");
    let mut file = std::fs::File::create_new(&path).expect("create");
    file.write_all(&head.bytes).expect("write");
    file.set_len(head.file_bytes).expect("length");
    let run = |option: &str| {
        let output =
            Command::new("readelf").args([option, "--wide"]).arg(&path).output().expect("readelf runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let headers = run("-h");
    assert!(headers.contains("CORE (Core file)") && headers.contains("X86-64"), "{headers}");
    let loads: Vec<Vec<String>> = run("-l")
        .lines()
        .filter(|line| line.trim().starts_with("LOAD"))
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect();
    assert_eq!(loads.len(), 2);
    assert_eq!(
        loads[0][1..6],
        ["0x001000", "0x0000000000000000", "0x0000000000000000", "0x80000000", "0x80000000"]
    );
    assert_eq!(
        loads[1][1..6],
        ["0x80001000", "0x0000000100000000", "0x0000000100000000", "0x40000000", "0x40000000"]
    );
    let notes = run("-n");
    assert!(notes.contains("Diorama"), "{notes}");
}

#[test]
fn boards_that_are_not_known_are_refused() {
    for (machine, bytes) in
        [("pc-i440fx-7.2", GIB), ("microvm", GIB), ("pc-q35-7.2", 0), ("pc-q35-7.2", 2 << 40)]
    {
        assert!(segments(machine, bytes).is_err(), "{machine} {bytes}");
    }
}
