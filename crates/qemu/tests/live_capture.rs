//! A real QEMU: control protocol, disk pivot, live capture, restore, second capture, death in the middle.
//!
//! The machines have no guest image: the firmware runs, finds nothing to boot and waits, which is enough to have
//! memory, devices and a running processor. Everything lives in a private folder on tmpfs; each machine is killed
//! when its test ends, whichever way.

mod machine;

use diorama_qemu::capability;
use diorama_qemu::command_line::{self, DiskFormat, DiskLayer, RAM_BLOCK};
use diorama_qemu::disk;
use diorama_qemu::migration::postcopy::{self, Pages, READY, Reply, ReplyReader};
use diorama_qemu::migration::{PAGE_SIZE_BYTES, RamFile, Splitter, StreamError};
use diorama_qemu::qmp::QmpError;
use diorama_qemu::userfault::{Waiting, WriteFaults};
use machine::{COUNTER_AT, Capture, MEMORY_BYTES, Machine, SECOND, Scratch, WALK_AT, WALK_PAGES, qemu, soon};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

#[test]
fn this_computer_can_capture_live() {
    let qemu = qemu();
    assert!(qemu.machine_types.iter().any(|name| name == command_line::DEFAULT_MACHINE_TYPE));
    assert!(qemu.accelerators.iter().any(|name| name == "tcg"));
    let usable = capability::background_snapshot_usable(qemu);
    assert!(matches!(usable, capability::BackgroundSnapshot::Usable { .. }), "{usable:?}");
}

#[test]
fn two_monitors_and_errors_by_class() {
    let scratch = Scratch::new();
    let mut machine = Machine::start(&scratch, "m", |_| {});
    let status = machine.qmp.execute("query-status", Value::Null, SECOND).expect("status");
    assert_eq!(status["status"], "running");
    machine.qmp_cut.execute("stop", Value::Null, SECOND).expect("stop on the second monitor");
    machine.qmp.wait_event(&["STOP"], soon()).expect("both monitors get events");
    let error = machine.qmp.execute("no-such-command", Value::Null, SECOND).expect_err("unknown");
    assert!(matches!(&error, QmpError::Command { class, .. } if class == "CommandNotFound"), "{error}");
    let processors = machine.qmp.execute("query-cpus-fast", Value::Null, SECOND).expect("processors");
    for processor in processors.as_array().expect("a list") {
        let thread = u32::try_from(processor["thread-id"].as_u64().expect("a thread")).expect("a thread");
        let policy = diorama_qemu::process::Policy::Normal { nice: 5 };
        diorama_qemu::process::set_thread_policy(thread, policy).expect("policy");
    }

    machine.process.kill(soon()).expect("kill");
    let error = machine.qmp.execute("query-status", Value::Null, SECOND).expect_err("dead");
    assert!(matches!(error, QmpError::Disconnected { .. }), "{error}");
}

#[test]
fn a_machine_that_cannot_start_says_why() {
    let scratch = Scratch::new();
    let error = Machine::try_start(&scratch, "m", |config| config.machine_type = "pc-q35-0.1".into())
        .expect_err("no such machine type");
    assert!(error.to_string().contains("unsupported machine type"), "{error}");
}

#[test]
fn a_disk_pivots_onto_an_overlay_that_was_prepared() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    fs::write(&base, vec![0x55; 4 << 20]).expect("base");
    let layer = |index: usize| DiskLayer {
        path: scratch.path(&format!("overlay{index}")),
        format: DiskFormat::Qcow2,
    };
    disk::create_overlay(&layer(1).path, 4 << 20, disk::DEFAULT_CLUSTER_BITS).expect("overlay");
    disk::create_overlay(&layer(2).path, 4 << 20, disk::DEFAULT_CLUSTER_BITS).expect("overlay");
    let chain = vec![DiskLayer { path: base, format: DiskFormat::Raw }, layer(1)];
    let mut machine = Machine::start(&scratch, "m", |config| {
        config.disks = vec![command_line::DiskConfig { name: "root".into(), chain }];
    });

    let overlay = command_line::blockdev("root", 2, &layer(2), false, None).expect("valid");
    machine.qmp.execute("blockdev-add", overlay, SECOND).expect("add");
    let pivot =
        json!({"actions": [{"type": "blockdev-snapshot", "data": {"node": "root-1", "overlay": "root-2"}}]});
    machine.qmp_cut.execute("transaction", pivot, SECOND).expect("pivot");
    let nodes = machine.qmp.execute("query-named-block-nodes", Value::Null, SECOND).expect("nodes");
    let node =
        |name: &str| nodes.as_array().expect("a list").iter().find(|node| node["node-name"] == name).cloned();
    assert_eq!(node("root-2").expect("the overlay")["ro"], false);
    assert_eq!(node("root-2").expect("the overlay")["backing_file_depth"], 2);

    // What is written now goes to the overlay, and the base shines through.
    let write = json!({"command-line": "qemu-io -d /machine/peripheral/disk-root/virtio-backend \"write -P 0x66 1M 64k\""});
    let answer = machine.qmp.execute("human-monitor-command", write, SECOND).expect("write");
    assert_eq!(answer, "", "qemu-io answers on standard output");
    let read = json!({"command-line": "qemu-io -d /machine/peripheral/disk-root/virtio-backend \"read -P 0x55 2M 64k\""});
    let answer = machine.qmp.execute("human-monitor-command", read, SECOND).expect("read");
    assert_eq!(answer, "");
    let log = fs::read_to_string(scratch.path("m.log")).expect("the log");
    assert!(log.contains("wrote 65536/65536") && log.contains("read 65536/65536"), "{log}");
    assert!(!log.contains("failed"), "{log}");
    let written = |index: usize| fs::metadata(layer(index).path).expect("metadata").blocks() * 512;
    assert!(written(2) >= 64 << 10 && written(1) < 64 << 10, "{} {}", written(1), written(2));
}

#[test]
fn capture_restore_and_capture_again() {
    for sandbox in [true, false] {
        let scratch = Scratch::new();
        let mut original = Machine::start(&scratch, "original", |config| config.sandbox = sandbox);
        original.wait_for_firmware();
        let first = original.capture(&scratch.path("ram1"));
        assert!(first.summary.pages > 0 && first.summary.zero_pages > 0, "{:?}", first.summary);
        assert_eq!(
            first.summary.pages + first.summary.zero_pages,
            MEMORY_BYTES / 4096,
            "each page of a live capture comes once"
        );
        original.process.kill(soon()).expect("kill");

        let mut restored = Machine::restore(&scratch, "restored", &first, |config| config.sandbox = sandbox);
        let second = restored.capture(&scratch.path("ram2"));
        assert_eq!(second.summary.pages + second.summary.zero_pages, MEMORY_BYTES / 4096);
        restored.process.kill(soon()).expect("kill");
        let mut again = Machine::restore(&scratch, "again", &second, |config| config.sandbox = sandbox);
        again.process.kill(soon()).expect("kill");
    }
}

#[test]
fn a_restored_machine_has_the_memory_that_was_captured() {
    let scratch = Scratch::new();
    let mut original = Machine::start(&scratch, "original", |_| {});
    original.wait_for_firmware();
    original.qmp.execute("stop", Value::Null, SECOND).expect("stop");
    let dumped = original.dump_memory(&scratch.path("dump1"));
    original.qmp.execute("cont", Value::Null, SECOND).expect("cont");
    // In between, the program goes on counting, and changes nothing else. On a busy computer that takes a moment.
    let counter = json!({"command-line": format!("xp /1xw {COUNTER_AT:#x}")});
    let mut look = || original.qmp.execute("human-monitor-command", counter.clone(), SECOND).expect("a look");
    let (before, deadline) = (look(), soon());
    while look() == before {
        assert!(Instant::now() < deadline, "the machine does not run: {before}");
    }
    let capture = original.capture(&scratch.path("ram"));
    let ram = fs::read(scratch.path("ram")).expect("the RAM file");
    let (before, after) = (COUNTER_AT, COUNTER_AT + 4);
    assert!(ram[1 << 20..before] == dumped[1 << 20..before], "memory below the counter differs");
    assert!(ram[after..] == dumped[after..], "memory above the counter differs");
    let count = |memory: &[u8]| u32::from_le_bytes(memory[before..after].try_into().expect("four bytes"));
    assert!(count(&ram) > count(&dumped), "the machine did not run between");
    assert_eq!(ram[(16 << 20) + 4..][..4], 2u32.to_le_bytes(), "the program's pattern");

    let mut restored = Machine::restore_paused(&scratch, "restored", &capture, |_| {});
    let restored_memory = restored.dump_memory(&scratch.path("dump2"));
    // The gap below 1 MiB holds ROM shadows, which are not main memory's pages as the processor sees them.
    assert!(restored_memory[..0xa0000] == ram[..0xa0000], "low memory differs");
    assert!(restored_memory[1 << 20..] == ram[1 << 20..], "high memory differs");
}

#[test]
fn a_pre_copy_stream_splits_too() {
    let scratch = Scratch::new();
    let mut original = Machine::start(&scratch, "original", |_| {});
    original.wait_for_firmware();
    let capture = original.capture_with(&scratch.path("ram"), false);
    assert!(capture.summary.pages + capture.summary.zero_pages >= MEMORY_BYTES / 4096);
    original.process.kill(soon()).expect("kill");
    let mut restored = Machine::restore(&scratch, "restored", &capture, |_| {});
    restored.capture(&scratch.path("ram2"));
}

#[test]
fn a_machine_killed_during_its_capture_is_a_truncated_stream() {
    let scratch = Scratch::new();
    let mut machine = Machine::start(&scratch, "m", |_| {});
    machine.wait_for_firmware();
    let mut stream = machine.begin_capture(true);
    let mut chunk = vec![0; 100_000];
    let length = stream.read(&mut chunk).expect("the stream begins");
    let mut splitter = Splitter::new(RAM_BLOCK, MEMORY_BYTES);
    let file = fs::File::create_new(scratch.path("ram")).expect("create");
    let mut sink = RamFile::new(file, MEMORY_BYTES, Vec::new()).expect("sink");
    splitter.feed(&chunk[..length], &mut sink).expect("a valid beginning");
    machine.process.kill(soon()).expect("kill");
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => splitter.feed(&chunk[..length], &mut sink).expect("valid as far as it goes"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    let error = splitter.finish().expect_err("truncated");
    assert!(matches!(error, StreamError::Truncated { .. }), "{error}");
}

/// Begins a capture whose socket takes a page or two; returns it when the machine runs again.
fn begin_slow_capture(machine: &mut Machine) -> UnixStream {
    let (mut ours, theirs) = UnixStream::pair().expect("pair");
    setsockopt(&theirs, sockopt::SndBuf, &1).expect("a page or two");
    machine.begin_capture_to(&theirs, true);
    drop(theirs);
    // Nobody reads more than that: the capture thread waits, and the program for it.
    ours.read_exact(&mut [0]).expect("the stream begins");
    machine.qmp_cut.wait_event(&["RESUME"], soon()).expect("the machine resumes by itself");
    ours
}

#[test]
fn it_is_seen_when_a_guest_waits_for_a_page() {
    let scratch = Scratch::new();
    let mut machine = Machine::start(&scratch, "m", |config| config.boot = machine::walker(&scratch));
    machine.wait_for_firmware();
    let process = machine.process.id();
    let none = WriteFaults::of(process, MEMORY_BYTES).expect("its descriptors");
    assert!(none.is_empty());
    // Not known which memory it is; and taken for another mapping, which is found out by the first fault.
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid)).expect("readable");
    let sizes = maps.lines().filter(|line| line.contains(" rw-p ")).map(|line| {
        let (start, end) =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        number(end) - number(start)
    });
    let sizes: Vec<u64> = sizes.collect();
    let unique = |size: &&u64| sizes.iter().filter(|other| other == size).count() == 1;
    let other =
        *sizes.iter().filter(unique).filter(|size| **size != MEMORY_BYTES).max().expect("some mapping");
    for size in [4096 * 4097, other] {
        let mut ours = begin_slow_capture(&mut machine);
        let mut faults = WriteFaults::of(process, size).expect("its descriptors");
        assert!(!faults.is_empty());
        let mut nothing = |_, _: &[u8]| panic!("a page of what?");
        // Whoever reads first that somebody waits knows it alone. When that was QEMU, it must go on before it happens again.
        let pause = Duration::from_millis(20);
        while faults.serve(pause, &mut nothing).expect("nothing fails") == Waiting::Nobody {
            let length = ours.read(&mut [0; PAGE_SIZE_BYTES]).expect("the stream");
            assert!(length > 0, "nobody was seen to wait: {size}");
        }
        ours.read_to_end(&mut Vec::new()).expect("the whole stream");
        let waiting = faults.serve(Duration::ZERO, &mut nothing).expect("nothing fails");
        assert_eq!((waiting, faults.served()), (Waiting::Nobody, 0), "nobody waits any more");
        drop(faults);
        machine.wait_captured();
    }
    let after = WriteFaults::of(process, MEMORY_BYTES).expect("its descriptors");
    assert!(after.is_empty(), "QEMU has closed it");
}

/// Captures a machine and takes the pages that its guest waits for: nothing else for as long as `first`, and then beside the
/// stream; or beside taking, and throwing away, nearly all that the stream brings.
fn capture_serving(machine: &mut Machine, path: &Path, first: Duration, take: bool) -> Capture {
    let mut ours = begin_slow_capture(machine);
    let mut faults = WriteFaults::of(machine.process.id(), MEMORY_BYTES).expect("its descriptors");
    let file = fs::File::create_new(path).expect("create");
    let mut ram = RamFile::new(file, MEMORY_BYTES, Vec::new()).expect("sink");
    let mut splitter = Splitter::new(RAM_BLOCK, MEMORY_BYTES);
    // The byte that was read already is the first of the stream's "QEVM".
    splitter.feed(b"Q", &mut ram).expect("a valid stream");
    faults.serve(first, &mut |offset, page| ram.keep(offset, page)).expect("nothing fails");
    let mut chunk = vec![0; 16 << 10];
    let mut pages = 0;
    while take
        && let Some(further) =
            faults.take(&mut |offset, pages| ram.keep(offset, pages)).expect("nothing fails")
    {
        pages += further;
        let waiting = faults.serve(Duration::from_micros(300), &mut |offset, page| ram.keep(offset, page));
        assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
    }
    if take {
        let all = MEMORY_BYTES / PAGE_SIZE_BYTES as u64;
        assert_eq!(pages, all);
        // QEMU has sent what fitted into the socket, and not been read since.
        assert!(faults.served() + faults.taken() > all - 100, "{} and {}", faults.served(), faults.taken());
    }
    while !splitter.ram_complete() {
        let pause = Duration::from_micros(100);
        let waiting = faults.serve(pause, &mut |offset, page| ram.keep(offset, page));
        assert_eq!(waiting.expect("nothing fails"), Waiting::Nobody);
        let length = ours.read(&mut chunk).expect("the stream");
        assert!(length > 0, "it ended early");
        splitter.feed(&chunk[..length], &mut ram).expect("a valid stream");
    }
    let served = faults.served();
    assert!(take || first.is_zero() || served > 100, "{served} pages kept");
    drop(faults);
    let mut rest = Vec::new();
    ours.read_to_end(&mut rest).expect("the rest");
    splitter.feed(&rest, &mut ram).expect("a valid stream");
    machine.wait_captured();
    let (_, residual) = ram.into_inner();
    Capture { ram: path.to_owned(), residual, summary: splitter.finish().expect("a whole stream") }
}

/// The [walker](machine::walker) writes to its pages one after the other. In memory as it was at one moment, the numbers that it has
/// written are the last so many, whatever it wrote while that memory was captured.
fn assert_of_one_moment(capture: &Capture) {
    let memory = fs::read(&capture.ram).expect("the RAM file");
    let number = |at: usize| u32::from_le_bytes(memory[at..at + 4].try_into().expect("four bytes"));
    let pages = (0..WALK_PAGES).map(|page| WALK_AT + page * PAGE_SIZE_BYTES);
    let numbers: Vec<_> = pages.map(|at| (number(at), number(at + PAGE_SIZE_BYTES - 4))).collect();
    let least = *numbers.iter().map(|(_, end)| end).min().expect("pages");
    let most = *numbers.iter().map(|(start, _)| start).max().expect("pages");
    assert!(most - least <= WALK_PAGES as u32, "{least} to {most}");
    let halfway = numbers.iter().filter(|(start, end)| start != end).count();
    assert!(halfway <= 1, "{halfway} pages were written to in part");
    let gaps = numbers.windows(2).filter(|pair| pair[1].0 != pair[0].0 + 1).count();
    assert!(gaps <= 1, "{gaps} gaps");
}

#[test]
fn pages_that_a_guest_waits_for_are_kept_as_they_were() {
    let scratch = Scratch::new();
    let mut machine = Machine::start(&scratch, "m", |config| config.boot = machine::walker(&scratch));
    machine.wait_for_firmware();
    for round in 0..6 {
        // Long enough for a round of the program or only for a part of it, before QEMU's own pages come, which are the same ones.
        let first = Duration::from_millis(500) * (round % 2);
        // Most times all of it is taken, of a fresh machine and of a restored one, at once and later.
        let take = round % 3 != 0;
        let capture = capture_serving(&mut machine, &scratch.path(&format!("ram{round}")), first, take);
        assert_of_one_moment(&capture);
        if round == 3 {
            // From now on its memory is a file's, until it is written to.
            machine.process.kill(soon()).expect("kill");
            machine = Machine::restore(&scratch, "again", &capture, |config| {
                config.boot = machine::walker(&scratch);
            });
        }
    }
}

#[test]
fn every_beginning_of_a_real_stream_is_handled() {
    let scratch = Scratch::new();
    let mut machine = Machine::start(&scratch, "m", |_| {});
    machine.wait_for_firmware();
    let mut stream = Vec::new();
    machine.begin_capture(true).read_to_end(&mut stream).expect("the whole stream");
    let step = stream.len() / 97;
    for length in (0..stream.len()).step_by(step).chain(stream.len() - 20..stream.len()) {
        let mut splitter = Splitter::new(RAM_BLOCK, MEMORY_BYTES);
        let file = tempfile::tempfile_in(scratch.folder()).expect("file");
        let mut sink = RamFile::new(file, MEMORY_BYTES, std::io::sink()).expect("sink");
        splitter.feed(&stream[..length], &mut sink).expect("valid as far as it goes");
        assert!(
            matches!(splitter.finish(), Err(StreamError::Truncated { .. })),
            "{length} of {}",
            stream.len()
        );
    }
}

#[test]
fn a_residual_that_was_cut_is_refused_by_qemu() {
    let scratch = Scratch::new();
    let mut original = Machine::start(&scratch, "original", |_| {});
    original.wait_for_firmware();
    let mut capture = original.capture(&scratch.path("ram"));
    capture.residual.truncate(capture.residual.len() / 2);
    let error = Machine::try_restore(&scratch, "restored", &capture, |_| {}).expect_err("cut");
    let text = error.to_string();
    assert!(text.contains("QEMU ended") || text.contains("closed"), "{text}");
}

/// Sends the pages that QEMU asks for, each once, and nothing else, until it has ended the load.
fn send_what_is_asked_for(mut stream: UnixStream, ram: &fs::File, section: u32, ready: &Sender<()>) -> usize {
    let mut reader = ReplyReader::default();
    let mut chunk = [0; 4096];
    // QEMU asks once for each thread that waits for a page, and cannot place it a second time.
    let mut sent = HashSet::new();
    loop {
        let length = stream.read(&mut chunk).expect("the return path");
        if length == 0 {
            return sent.len();
        }
        reader.feed(&chunk[..length]);
        while let Some(reply) = reader.next_reply().expect("a reply") {
            match reply {
                Reply::Pong { value } => assert_eq!((value, ready.send(())), (READY, Ok(()))),
                Reply::Shut { status } => assert_eq!(status, 0),
                Reply::Request { block, offset, bytes } => {
                    assert_eq!((block.as_str(), bytes), (RAM_BLOCK, 4096));
                    if !sent.insert(offset) {
                        continue;
                    }
                    let mut page = [0; PAGE_SIZE_BYTES];
                    ram.read_exact_at(&mut page, offset).expect("a page");
                    let mut pages = Pages::new(section);
                    match page.iter().all(|byte| *byte == 0) {
                        true => pages.zero(RAM_BLOCK, offset),
                        false => pages.page(RAM_BLOCK, offset, &page),
                    }
                    stream.write_all(&pages.finish()).expect("sent");
                }
            }
        }
    }
}

#[test]
fn a_machine_runs_before_its_memory_is_there_and_is_captured_afterwards() {
    let scratch = Scratch::new();
    let mut original = Machine::start(&scratch, "original", |_| {});
    original.wait_for_firmware();
    let first = original.capture(&scratch.path("ram1"));
    original.process.kill(soon()).expect("kill");
    let captured = fs::read(&first.ram).expect("memory");

    let opening = postcopy::opening(&first.residual, RAM_BLOCK, MEMORY_BYTES).expect("the device state");
    let (mut machine, mut stream) = Machine::begin_postcopy(&scratch, "lazy");
    let file = fs::File::open(&first.ram).expect("memory");
    let (ready, is_ready) = channel();
    // Not a scoped thread: when something fails here, the machine ends first, and then this.
    let source = std::thread::spawn({
        let stream = stream.try_clone().expect("a duplicate");
        move || send_what_is_asked_for(stream, &file, opening.ram_section, &ready)
    });
    stream.write_all(&opening.bytes).expect("the opening");
    is_ready.recv_timeout(SECOND).expect("the devices are loaded");
    let deadline = soon();
    while machine.qmp.execute("query-status", Value::Null, SECOND).expect("status")["status"] == "inmigrate" {
        assert!(Instant::now() < deadline, "the load goes on for ever");
    }
    machine.qmp.execute("cont", Value::Null, SECOND).expect("cont");
    machine.qmp.wait_event(&["RESUME"], soon()).expect("it runs");
    let counter = |memory: &[u8]| {
        u32::from_le_bytes(memory[COUNTER_AT..COUNTER_AT + 4].try_into().expect("four bytes"))
    };
    // Reading all of memory has all of it sent.
    let dumped = machine.dump_memory(&scratch.path("dump"));
    let page = COUNTER_AT..COUNTER_AT + 4096;
    assert!(dumped[..page.start] == captured[..page.start], "memory below the counter is another");
    assert!(dumped[page.end..] == captured[page.end..], "memory above the counter is another");
    let deadline = soon();
    while counter(&machine.dump_memory(&scratch.path("dump"))) == counter(&dumped) {
        assert!(Instant::now() < deadline, "it does not run");
    }
    stream.write_all(&postcopy::closing(opening.ram_section)).expect("the closing");
    loop {
        let event = machine.qmp.wait_event(&["MIGRATION"], soon()).expect("the end of the load");
        if event.data["status"] == "completed" {
            break;
        }
    }
    assert_eq!(source.join().expect("the source"), captured.len() / 4096);
    let second = machine.capture(&scratch.path("ram2"));
    assert_eq!(second.summary.pages + second.summary.zero_pages, MEMORY_BYTES / 4096);
    let mut again = Machine::restore(&scratch, "again", &second, |_| {});
    again.process.kill(soon()).expect("kill");
}
