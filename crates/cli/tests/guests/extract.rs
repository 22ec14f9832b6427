//! Looking into snapshots without starting anything: what guests wrote is found by other programs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::lab::{Lab, entries, interrupt, ran, until};

const MIB: u64 = 1 << 20;

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The files below a folder.
fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in entries(folder) {
        let path = folder.join(name);
        if path.is_dir() { found.extend(tree(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn disks_are_what_the_guest_sees() {
    let lab = Lab::new();
    // A user's image: compressed, as distributions ship theirs.
    let plain = lab.folder().join("plain.raw");
    let noise: Vec<u8> =
        (0..32 * MIB as u32 / 4).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&plain, noise).unwrap();
    let image = lab.folder().join("image.qcow2");
    tool("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", text(&plain), text(&image)]);
    lab.up("\
name: disks
machines:
  box:
    image: micro
    memory: 96MiB
    nics: [lan]
    disks: [{name: data, size: 64MiB}, {name: based, image: ./image.qcow2, size: 48MiB}]
networks: {lan: {}}
");
    let shell = |line: &str| lab.shell("disks", "box", line);
    let write = |disk: &str, cluster: u32, count: u32| {
        let dd =
            format!("dd if=/dev/urandom of=/dev/{disk} bs=65536 seek={cluster} count={count} conv=fsync");
        shell(&format!("{dd} 2>/dev/null"));
    };
    for (cluster, count) in [(0, 3), (100, 20), (1000, 24)] {
        write("vda", cluster, count);
    }
    write("vdb", 7, 2);
    lab.snapshot("disks", &["one"]);
    write("vda", 110, 5);
    write("vdb", 600, 1);
    shell("dd if=/dev/zero of=/dev/vdb bs=65536 seek=20 count=3 conv=fsync 2>/dev/null");
    shell("echo 3 > /proc/sys/vm/drop_caches");
    let sums = shell("sha256sum /dev/vda /dev/vdb");
    let sums: Vec<&str> = sums.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    lab.snapshot("disks", &["two"]);
    // The machine goes on and writes over it all.
    write("vda", 0, 200);

    // What has changed between the two: five clusters here; one and three zeroed there.
    let diff = lab.ok(&["snapshot", "diff", "one", "two"]);
    let disks = &diff["machines"][0]["disks"];
    let changed = |disk: usize| (disks[disk]["name"].clone(), disks[disk]["clusters_changed"].clone());
    assert_eq!(changed(0), ("based".into(), 4.into()), "{diff}");
    assert_eq!(changed(1), ("data".into(), 5.into()), "{diff}");
    assert_eq!(disks[1]["clusters"], 1024, "{diff}");
    assert!(diff["machines"][0]["pages_changed"].as_u64().unwrap() > 0, "{diff}");

    let to = |name: &str| lab.folder().join(name);
    let disk = |folder: &str, file: &str| to(folder).join("box/disks").join(file);
    let report = lab.ok(&["snapshot", "extract", "two", "--disks", "--to", "layered"]);
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.len(), 2, "{report}");
    assert_eq!(files[0]["backing"], serde_json::Value::Null);
    assert_eq!(files[1]["backing"], text(&image));
    lab.ok(&["snapshot", "extract", "two", "--disks", "--flatten", "--to", "flat"]);
    lab.ok(&["snapshot", "extract", "two", "--disks", "--raw-disks", "--to", "raw"]);
    for (name, sum) in ["data", "based"].iter().zip(&sums) {
        let raw = disk("raw", &format!("{name}.raw"));
        assert!(tool("sha256sum", &[text(&raw)]).starts_with(sum), "{name}");
        assert!(raw.metadata().unwrap().blocks() * 512 < 45 * MIB, "{name} is not sparse");
        for folder in ["layered", "flat"] {
            let qcow2 = disk(folder, &format!("{name}.qcow2"));
            tool("qemu-img", &["check", "-f", "qcow2", text(&qcow2)]);
            tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), text(&raw)]);
        }
    }
    assert!(tool("qemu-img", &["info", text(&disk("layered", "based.qcow2"))]).contains(text(&image)));
    assert!(!tool("qemu-img", &["info", text(&disk("flat", "based.qcow2"))]).contains("backing"));
    // What the store has lost is not made up.
    let packs = lab.home().join("store/packs");
    let flip = || {
        for pack in entries(&packs) {
            let file = File::options().read(true).write(true).open(packs.join(pack)).unwrap();
            let (at, mut byte) = (file.metadata().unwrap().len() / 3, [0]);
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    };
    flip();
    assert_eq!(lab.refused(&["snapshot", "extract", "two", "--to", "broken"]).kind, "corrupt");
    assert!(!to("broken").exists());
    flip();
    // An image that has changed cannot be flattened; what names it is written with a warning.
    std::fs::write(&image, b"something else").unwrap();
    assert_eq!(
        lab.refused(&["snapshot", "extract", "two", "--disks", "--flatten", "--to", "no"]).kind,
        "corrupt"
    );
    assert!(!to("no").exists());
    let ran = lab.run(&["snapshot", "extract", "two", "--disks", "--to", "layered", "--force"]);
    assert!(ran.status == Some(0) && ran.stderr.contains("is not what it was"), "{ran:?}");
    lab.finish();
}

/// The segments of an ELF core file: physical address, offset, length.
fn loads(core: &Path) -> Vec<[u64; 3]> {
    let listed = tool("readelf", &["-l", "--wide", text(core)]);
    let loads = listed.lines().filter(|line| line.trim().starts_with("LOAD"));
    loads
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| u64::from_str_radix(words[at].trim_start_matches("0x"), 16).unwrap();
            assert_eq!(words[4], words[5], "{line}");
            [number(3), number(1), number(4)]
        })
        .collect()
}

/// Says one thing to a QEMU monitor, and waits for its answer.
fn monitor(socket: &Path, command: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut answer = || -> String {
        lines.by_ref().map(Result::unwrap).find(|line| !line.contains("\"event\"")).expect("an answer")
    };
    answer();
    for command in ["{\"execute\":\"qmp_capabilities\"}", command] {
        stream.write_all(command.as_bytes()).unwrap();
        let answer = answer();
        assert!(answer.contains("\"return\""), "{command}: {answer}");
    }
}

#[test]
fn memory_is_where_the_guest_has_it() {
    let lab = Lab::new();
    lab.up(
        "name: memory\nmachines:\n  box: {image: micro, memory: 128MiB, nics: [lan]}\nnetworks: {lan: {}}\n",
    );
    let shell = |line: &str| lab.shell("memory", "box", line);
    // A process fills 2 MiB with words that follow from their numbers (images/traffic/src/memory.rs).
    shell("traffic memory --bytes 2MiB --rate 1 --status /tmp/memory </dev/null >/dev/null 2>&1 &");
    shell("until [ -s /tmp/memory ]; do sleep 0.1; done");
    let maps = shell("cat /proc/$(pidof traffic)/maps");
    let (start, end) = maps
        .lines()
        .filter(|line| line.contains("rw-p") && line.contains(" 00:00 0"))
        .map(|line| {
            let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
            (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap())
        })
        .find(|(start, end)| (2 * MIB..3 * MIB).contains(&(end - start)))
        .unwrap_or_else(|| panic!("{maps}"));
    // Where its pages are, as the guest's kernel says. It stands still before it is asked, so that none moves.
    let line = format!(
        "killall -STOP traffic; dd if=/proc/$(pidof traffic)/pagemap bs=8 skip={} count={} 2>/dev/null | od -An -v -tx1",
        start / 4096,
        (end - start) / 4096
    );
    let bytes: Vec<u8> =
        shell(&line).split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let frames: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
        .filter(|entry| entry >> 63 == 1)
        .map(|entry| entry & ((1 << 55) - 1))
        .collect();
    assert!(frames.len() >= 512, "{} pages", frames.len());

    // What QEMU itself dumps of it, while it stands still.
    lab.ok(&["-e", "memory", "pause"]);
    let dumped = lab.folder().join("dumped.elf");
    let socket = lab.runtime().join("e/memory/g1/m0.cut");
    monitor(
        &socket,
        &format!(
            r#"{{"execute":"dump-guest-memory","arguments":{{"paging":false,"protocol":"file:{}"}}}}"#,
            text(&dumped)
        ),
    );
    lab.snapshot("memory", &["still"]);
    let report = lab.ok(&["snapshot", "extract", "still", "--to", "all"]);
    let folder = lab.folder().join("all");
    let core = folder.join("box/memory.elf");
    assert_eq!(
        tree(&folder).iter().map(|path| text(path.strip_prefix(&folder).unwrap())).collect::<Vec<_>>(),
        ["box/initrd", "box/kernel", "box/memory.elf", "environment.yaml", "frames.pcapng", "manifest.json"]
    );
    assert!(tool("readelf", &["-h", text(&core)]).contains("CORE (Core file)"));
    assert!(tool("readelf", &["-n", text(&core)]).contains("Diorama"));
    let ours = loads(&core);
    assert_eq!(ours, [[0, 4096, 128 * MIB]]);
    let found = core.metadata().unwrap();
    assert!(found.blocks() * 512 < 124 * MIB, "{} blocks", found.blocks());
    assert_eq!(found.mode() & 0o777, 0o600);

    let file = File::open(&core).unwrap();
    let numbers: HashMap<u64, u64> =
        (0..2 * MIB / 8).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n)).collect();
    let mut pages = 0;
    for frame in &frames {
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, ours[0][1] + frame * 4096).unwrap();
        let words = page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let known: Vec<u64> = words.filter_map(|word| numbers.get(&word).copied()).collect();
        // All but what has been dirtied, each after the one before.
        pages += usize::from(
            known.len() >= 510 && known.windows(2).all(|two| (1..=2).contains(&(two[1] - two[0]))),
        );
    }
    assert!(pages >= 510, "{pages} of {} pages", frames.len());

    // Above the first MiB, where firmware covers some, both dumps are the same.
    let dump = File::open(&dumped).unwrap();
    let mut compared = 0;
    for [physical, offset, bytes] in loads(&dumped) {
        let end = (physical + bytes).min(128 * MIB);
        let mut at = physical.max(MIB);
        while at < end {
            let length = MIB.min(end - at) as usize;
            let (mut theirs, mut mine) = (vec![0; length], vec![0; length]);
            dump.read_exact_at(&mut theirs, offset + (at - physical)).unwrap();
            file.read_exact_at(&mut mine, ours[0][1] + at).unwrap();
            assert!(theirs == mine, "memory at {at:#x} differs");
            at += length as u64;
            compared += length as u64;
        }
    }
    assert_eq!(compared, 127 * MIB);

    // The same without a head.
    lab.ok(&["snapshot", "extract", "still", "--to", "all", "--memory", "--raw", "--machine", "box"]);
    let raw = std::fs::read(folder.join("box/memory.raw")).unwrap();
    assert!(raw[..] == std::fs::read(&core).unwrap()[4096..]);
    // The rest is what other programs read.
    assert_eq!(lab.run(&["validate", text(&folder.join("environment.yaml"))]).status, Some(0));
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["name"], &manifest["environment"]), (&"still".into(), &"memory".into()));
    assert_eq!(report["files"].as_array().unwrap().len(), 6);

    // Ctrl-C leaves nothing, wherever it comes.
    let stopped = lab.folder().join("stopped");
    until("an extraction that is stopped half-way", || {
        let command = lab.begin(&["snapshot", "extract", "still", "--to", text(&stopped)]);
        let begun = Instant::now();
        while tree(&stopped).is_empty() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        interrupt(&command);
        let left = ran(command.wait_with_output().unwrap());
        if left.status == Some(0) {
            std::fs::remove_dir_all(&stopped).unwrap();
            return None;
        }
        assert_eq!(left.status, Some(130), "{left:?}");
        until("the end of its traces", || (!stopped.exists()).then_some(()));
        Some(())
    });

    // Nothing is written over, and a refusal leaves nothing.
    let before = tree(lab.folder());
    assert_eq!(lab.refused(&["snapshot", "extract", "still", "--to", "all"]).kind, "name-in-use");
    let refused = lab.refused(&["snapshot", "extract", "still", "--to", "no/such", "--machine", "bux"]);
    assert!(refused.kind == "not-found" && refused.hint.contains("box"), "{refused:?}");
    assert_eq!(tree(lab.folder()).len(), before.len());
    lab.finish();
}
