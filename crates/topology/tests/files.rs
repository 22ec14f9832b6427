//! Environment files as users write them, right and wrong: text in, environment or problems out.

use std::path::{Path, PathBuf};

use diorama_topology::{Accelerator, Boot, Environment, Files, Problem, SourceFile, limits, parse, schema};

/// The files that exist in these tests.
struct Present(&'static [&'static str]);

impl Files for Present {
    fn is_file(&self, path: &Path) -> bool {
        self.0.iter().any(|present| Path::new(present) == path)
    }
}

const PRESENT: Present = Present(&[
    "/lab/disk.qcow2",
    "/lab/sub/vmlinuz",
    "/lab/sub/../sub/initrd",
    "/lab/sub/initrd",
    "/images/base.raw",
]);

fn read_in(folder: &str, text: &str) -> Result<Environment, Vec<Problem>> {
    let source = SourceFile { name: "diorama.yaml", text, folder: Path::new(folder) };
    parse(&source, &PRESENT, &["micro"])
}

fn read(text: &str) -> Environment {
    read_in("/lab", text).unwrap_or_else(|problems| panic!("{text}\n{problems:#?}"))
}

/// Each problem as `line:column message (hint)`, after checking what holds for all problems.
fn problems(text: &str) -> Vec<String> {
    let problems = read_in("/lab", text).expect_err(text);
    assert!(!problems.is_empty() && problems.len() <= limits::MAX_PROBLEMS);
    for problem in &problems {
        assert!(problem.line >= 1 && problem.column >= 1);
        for shown in [&problem.message, &problem.label, problem.hint.as_ref().unwrap_or(&String::new())] {
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
        }
        let Some(span) = &problem.span else { continue };
        assert!(text.get(span.clone()).is_some(), "{span:?}");
        let before = &text[..span.start];
        let line_start = before.rfind('\n').map_or(0, |end| end + 1);
        assert_eq!(problem.line as usize, before.matches('\n').count() + 1, "{problem}");
        assert_eq!(problem.column as usize, text[line_start..span.start].chars().count() + 1, "{problem}");
    }
    problems.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn check(text: &str, expected: &[&str]) {
    assert_eq!(problems(text), expected, "\n{text}");
}

#[test]
fn the_contracts_example() {
    let environment = read(include_str!("../examples/pair.yaml"));
    assert_eq!(environment.name.as_str(), "pair");
    let names: Vec<&str> = environment.machines.iter().map(|machine| &*machine.name).collect();
    assert_eq!(names, ["server", "client"]);
    let server = environment.machine("server").unwrap();
    assert_eq!(server.boot, Boot::BuiltIn { image: "micro".into() });
    assert_eq!((server.cpus, server.memory_bytes), (1, 256 << 20));
    assert_eq!((&server.cpu_model, server.accelerator), (&None, Accelerator::Auto));
    assert_eq!(server.nics[0].network.as_str(), "lan");
    assert_eq!(server.nics[0].address.unwrap().to_string(), "10.0.0.1/24");
    let client = environment.machine("client").unwrap();
    assert_eq!(client.disks[0].name.as_str(), "data");
    assert_eq!((client.disks[0].size_bytes, &client.disks[0].image), (Some(1 << 30), &None));
    let lan = environment.network("lan").unwrap();
    assert_eq!((lan.mtu, lan.queue_bytes), (1500, 1 << 20));
    assert!(environment.machine("lan").is_none() && environment.network("server").is_none());
}

#[test]
fn a_file_with_everything() {
    let environment = read(
        "
networks: {lan: , wan: {mtu: 9000, queue: 4MiB}, 007: {}}
machines:
  router:
    kernel: sub/vmlinuz
    initrd: ./sub/../sub/initrd
    cmdline: >-
      console=ttyS0
      quiet
    cpus: 2
    memory: 536870912
    cpu: Skylake-Client-v1,-avx
    accelerator: tcg
    nics:
      - lan
      - {network: wan, mac: 52:54:00:00:00:AA, address: 'fd00::1/64'}
      - network: 007
  db: &db
    image: ./disk.qcow2
    disks:
      - {name: data, image: /images/base.raw, size: 1.5G}
      - {name: log, image: /images/base.raw}
  replica:
    <<: *db
    memory: 1GiB
",
    );
    assert_eq!(environment.name.as_str(), "lab", "the folder's name");
    let router = &environment.machines[0];
    // `..` stays: what it means depends on links.
    let initrd = Some(PathBuf::from("/lab/sub/../sub/initrd"));
    let cmdline = "console=ttyS0 quiet".to_owned();
    assert_eq!(router.boot, Boot::Kernel { kernel: "/lab/sub/vmlinuz".into(), initrd, cmdline });
    assert_eq!((router.cpus, router.memory_bytes, router.accelerator), (2, 512 << 20, Accelerator::Tcg));
    assert_eq!(router.cpu_model.as_deref(), Some("Skylake-Client-v1,-avx"));
    let networks: Vec<&str> = router.nics.iter().map(|nic| &*nic.network).collect();
    assert_eq!(networks, ["lan", "wan", "007"]);
    assert_eq!(router.nics[1].mac.to_string(), "52:54:00:00:00:aa");
    let [_, db, replica] = &environment.machines[..] else { panic!("three machines") };
    assert_eq!(db.boot, Boot::DiskImage { path: "/lab/disk.qcow2".into() });
    assert_eq!(db.boot.clone(), replica.boot);
    assert_eq!((db.memory_bytes, replica.memory_bytes), (256 << 20, 1 << 30));
    assert_eq!((db.disks[0].size_bytes, db.disks[1].size_bytes), (Some(3 << 29), None));
    let wan = environment.network("wan").unwrap();
    assert_eq!((wan.mtu, wan.queue_bytes), (9000, 4 << 20));
}

#[test]
fn mac_addresses_are_stable_and_differ() {
    let text = "machines: {a: {image: micro, nics: [x, x]}, b: {image: micro, nics: [x]}}\nnetworks: {x: {}}";
    let first = read(text);
    let forked = read(&format!("name: other\n{text}"));
    assert_eq!(first.machines, forked.machines);
    assert_eq!(first.renamed(forked.name.clone()), forked);
    let taken = first.machines[0].nics[1].mac;
    // b takes the address that a's second NIC would have had: a's moves, all others stay.
    let text = text.replace("nics: [x]}", &format!("nics: [{{network: x, mac: '{taken}'}}]}}"));
    let moved = read(&text);
    assert_eq!(moved.machines[0].nics[0], first.machines[0].nics[0]);
    assert_eq!(moved.machines[1].nics[0].mac, taken);
    assert_ne!(moved.machines[0].nics[1].mac, taken);
    assert_eq!(moved, read(&text));
    for machine in first.machines.iter().chain(&moved.machines) {
        for nic in &machine.nics {
            assert_eq!(nic.mac.bytes()[..3], [0x52, 0x54, 0]);
        }
    }
}

#[test]
fn the_largest_environment_has_no_mac_twice() {
    let nics = vec!["x"; limits::MAX_NICS].join(", ");
    let machines: String = (0..limits::MAX_MACHINES)
        .map(|index| format!("  m{index}: {{image: micro, nics: [{nics}]}}\n"))
        .collect();
    let environment = read(&format!("networks: {{x: {{}}}}\nmachines:\n{machines}"));
    let mut macs: Vec<_> = environment.machines.iter().flat_map(|m| &m.nics).map(|nic| nic.mac).collect();
    assert_eq!(macs.len(), limits::MAX_MACHINES * limits::MAX_NICS);
    macs.sort_unstable();
    macs.dedup();
    assert_eq!(macs.len(), limits::MAX_MACHINES * limits::MAX_NICS);
}

#[test]
fn the_file_as_a_whole() {
    check("", &["1:1: `diorama.yaml` is empty (the least is `machines: {one: {image: micro}}`)"]);
    check("# nothing\n", &["1:1: `diorama.yaml` is empty (the least is `machines: {one: {image: micro}}`)"]);
    check("---\n", &["1:1: `diorama.yaml` is empty (the least is `machines: {one: {image: micro}}`)"]);
    check("- a\n", &["1:1: expected a mapping with `name`, `machines` and `networks`, found a list"]);
    check("hello\n", &["1:1: expected a mapping with `name`, `machines` and `networks`, found `hello`"]);
    check(
        "name: x\n",
        &["1:1: the environment has no machines (the least is `machines: {one: {image: micro}}`)"],
    );
    check(
        "name: x\nmachines: {}\n",
        &["2:11: the environment has no machines (the least is `machines: {one: {image: micro}}`)"],
    );
    check(
        "name: x\nmachines:\n",
        &["2:9: the environment has no machines (the least is `machines: {one: {image: micro}}`)"],
    );
    check(
        "name: x\nmachines: [a]\n",
        &["2:11: expected a mapping from each machine's name to its settings, found a list"],
    );
    check(
        "machine: {a: {image: micro}}\n",
        &[
            "1:1: `machine` is not a field of an environment file (did you mean `machines`? The fields are `name`, `machines`, `networks`)",
            "1:1: the environment has no machines (the least is `machines: {one: {image: micro}}`)",
        ],
    );
    check(
        "name: x\nname: y\nmachines: {a: {image: micro}}\n",
        &["2:1: `name` is given twice (the first is on line 1: remove one)"],
    );
    check(
        "name: My Lab\nmachines: {a: {image: micro}}\n",
        &[
            "1:7: `My Lab` cannot be a name: `M` is not a lower-case letter, a digit or a hyphen (for example `my-lab`)",
        ],
    );
    check(
        "name: [x]\nmachines: {a: {image: micro}}\n",
        &["1:7: expected the environment's name, found a list"],
    );
    check(
        "name: true\nmachines: {a: {image: micro}}\n",
        &["1:7: expected the environment's name, found `true`"],
    );
    check(
        "machines: {a: {image: micro}}\n---\nmachines: {}\n",
        &["3:1: not a readable YAML document: only single YAML document expected but multiple found"],
    );
    let problems = read_in("/", "machines: {a: {image: micro}}\n").unwrap_err();
    let message =
        "1:1: the environment has no name, and its folder's cannot serve as one (add `name: my-environment`)";
    assert_eq!(problems[0].to_string(), message);
    let windows = "\u{feff}name: pair\r\nmachines:\r\n  a: {image: micro, cpus: 2}\r\n";
    assert_eq!(read(windows).machines[0].cpus, 2);
}

#[test]
fn not_yaml() {
    check(
        "machines:\n  a: {image: micro\n  b: x\n",
        &[
            "3:4: not a readable YAML document: while parsing a flow mapping, did not find expected ',' or '}'",
        ],
    );
    check(
        "machines:\n\ta: b\n",
        &["2:2: not a readable YAML document: tabs disallowed within this context (block indentation)"],
    );
    check("machines: *nowhere\n", &["1:11: not a readable YAML document: reference to unknown value"]);
    check(
        "machines: &a {x: *a}\n",
        &["1:18: not a readable YAML document: Recursive reference not allowed here"],
    );
    check(
        "a: \"\\x\"\n",
        &[
            "1:4: not a readable YAML document: while parsing a quoted scalar, did not find expected hexadecimal number",
        ],
    );
    check("? {a: b}\n: c\n", &["1:3: not a readable YAML document: expected string scalar"]);
    check(&"[".repeat(100_000), &["1:17: not a readable YAML document: recursion limit exceeded"]);
    check(
        &format!("a: {}", "- ".repeat(1000)),
        &["1:4: not a readable YAML document: block sequence entries are not allowed in this context"],
    );
    check(
        &format!("{}x", "a:\n ".repeat(3)),
        &["4:2: not a readable YAML document: simple key expected ':'"],
    );
    check(
        &format!("machines: [{}]", "a,".repeat(400_000)),
        &[
            "1:500006: not a readable YAML document: YAML document too large or too complex: limits breached: Nodes { nodes: 250001 }",
        ],
    );
    check(
        &"a".repeat(limits::MAX_FILE_BYTES + 1),
        &["1:1: the file has 1048577 bytes; an environment file has at most 1048576"],
    );
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let alias = vec![format!("*a{}", level - 1); 10].join(", ");
        laughs += &format!("a{level}: &a{level} [{alias}]\n");
    }
    check(
        &laughs,
        &[
            "6:10: not a readable YAML document: YAML document too large or too complex: limits breached: RecordedAnchorEvents { recorded_anchor_events: 250001 }",
        ],
    );
}

#[test]
fn names() {
    check(
        "machines: {Web: {image: micro}, a_b: {image: micro}, '': {image: micro}, -x: {image: micro}}\n",
        &[
            "1:12: `Web` cannot be a name: `W` is not a lower-case letter, a digit or a hyphen (for example `web`)",
            "1:33: `a_b` cannot be a name: `_` is not a lower-case letter, a digit or a hyphen (for example `a-b`)",
            "1:54: a name cannot be empty (a name is 1 to 32 of `a-z`, `0-9` and `-`)",
            "1:74: `-x` cannot be a name: it starts or ends with a hyphen (for example `x`)",
        ],
    );
    check(
        "machines:\n  a: {image: micro}\n  b: {image: micro}\n  a: {image: micro}\n",
        &["4:3: the machine `a` is declared twice (the first is on line 2: rename or remove one)"],
    );
    check(
        "networks:\n  lan: {}\n  lan: {}\nmachines: {a: {image: micro, nics: [lan]}}\n",
        &["3:3: the network `lan` is declared twice (the first is on line 2: rename or remove one)"],
    );
    check(
        "networks: {LAN: {}}\nmachines: {a: {image: micro, nics: [LAN]}}\n",
        &[
            "1:12: `LAN` cannot be a name: `L` is not a lower-case letter, a digit or a hyphen (for example `lan`)",
        ],
    );
    check(
        "machines: {a: {image: micro, disks: [{name: d, size: 1G}, {name: d, size: 1G}]}}\n",
        &["1:66: the machine has two disks `d` (the first is on line 1: rename or remove one)"],
    );
    check(
        "machines: {a: {image: ./disk.qcow2, disks: [{name: root, size: 1G}]}}\n",
        &["1:52: the disk `root` is the one that this machine boots from (give this one another name)"],
    );
    // Without a boot disk the name is free.
    read("machines: {a: {image: micro, disks: [{name: root, size: 1G}]}}\n");
    check(
        "machines: {a: {image: micro, disks: [{size: 1G}]}}\n",
        &["1:38: the disk has no name (add `name: data`)"],
    );
}

#[test]
fn fields_and_types() {
    check(
        "machines:\n  a:\n    image: micro\n    memroy: 1GiB\n    colour: red\n",
        &[
            "4:5: `memroy` is not a field of a machine (did you mean `memory`? The fields are `image`, `kernel`, `initrd`, `cmdline`, `cpus`, `memory`, `cpu`, `accelerator`, `nics`, `disks` and 2 more)",
            "5:5: `colour` is not a field of a machine (the fields are `image`, `kernel`, `initrd`, `cmdline`, `cpus`, `memory`, `cpu`, `accelerator`, `nics`, `disks` and 2 more)",
        ],
    );
    check(
        "machines:\n  a:\n    image: micro\n    memory: 1GiB\n    memory: 2GiB\n",
        &["5:5: `memory` is given twice (the first is on line 4: remove one)"],
    );
    check(
        "machines: {a: 5, b: [x], c: }\n",
        &[
            "1:15: expected a machine's settings, such as `{image: micro}`, found `5`",
            "1:21: expected a machine's settings, such as `{image: micro}`, found a list",
            "1:26: `c` has nothing to boot (add `image: micro`, `image: ./disk.qcow2` or `kernel: ./vmlinuz`)",
        ],
    );
    check(
        "machines: {a: {image: micro, cpus: two}}\n",
        &["1:36: expected a whole number of CPUs from 1 to 64, found `two`"],
    );
    check(
        "machines: {a: {image: micro, cpus: 0}, b: {image: micro, cpus: 65}, c: {image: micro, cpus: 1.5}}\n",
        &[
            "1:36: expected a whole number of CPUs from 1 to 64, found `0`",
            "1:64: expected a whole number of CPUs from 1 to 64, found `65`",
            "1:93: expected a whole number of CPUs from 1 to 64, found `1.5`",
        ],
    );
    check(
        "machines: {a: {image: micro, cpus: }}\n",
        &["1:34: expected a whole number of CPUs from 1 to 64, found nothing"],
    );
    check(
        "machines: {a: {image: micro, nics: lan}}\n",
        &["1:36: expected a list of NICs, such as `[lan]` or `[{network: lan}]`, found `lan`"],
    );
    check(
        "machines: {a: {image: micro, disks: data}, b: {image: micro, disks: [data]}}\n",
        &[
            "1:37: expected a list of disks, such as `[{name: data, size: 1GiB}]`, found `data`",
            "1:70: expected a disk, such as `{name: data, size: 1GiB}`, found `data`",
        ],
    );
    check(
        "machines: {a: {image: micro, accelerator: hvf}}\n",
        &["1:43: expected one of `auto`, `kvm`, `tcg`, found `hvf`"],
    );
    check(
        "machines: {a: {image: micro, cpu: 'qemu64 -drive x'}}\n",
        &[
            "1:35: expected a CPU model in QEMU's words, such as `qemu64` or `Skylake-Client-v1,-avx`, found `qemu64 -drive x`",
        ],
    );
    check(
        "networks: [lan]\nmachines: {a: {image: micro}}\n",
        &["1:11: expected a mapping from each network's name to its settings, found a list"],
    );
    check(
        "networks: {lan: 1500}\nmachines: {a: {image: micro}}\n",
        &["1:17: expected a network's settings, such as `{}` or `{mtu: 9000}`, found `1500`"],
    );
    check(
        "networks: {a: {mtu: 67}, b: {mtu: 65001}, c: {mtu: 1500B}}\nmachines: {a: {image: micro}}\n",
        &[
            "1:21: expected an MTU in bytes from 68 to 65000, found `67`",
            "1:35: expected an MTU in bytes from 68 to 65000, found `65001`",
            "1:52: expected an MTU in bytes from 68 to 65000, found `1500B`",
        ],
    );
    check(
        "networks: {a: {queue: 1KiB}, b: {queue: 2GiB}, c: {mut: 9000}}\nmachines: {a: {image: micro}}\n",
        &[
            "1:23: `1KiB` is out of range for a network's queue: 128KiB to 1GiB",
            "1:41: `2GiB` is out of range for a network's queue: 128KiB to 1GiB",
            "1:52: `mut` is not a field of a network (did you mean `mtu`? The fields are `mtu`, `queue`)",
        ],
    );
}

#[test]
fn sizes() {
    check(
        "machines: {a: {image: micro, memory: lots}}\n",
        &["1:38: `lots` is not a size (a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`)"],
    );
    check(
        "machines: {a: {image: micro, memory: 16MiB}, b: {image: micro, memory: 2TiB}}\n",
        &[
            "1:38: `16MiB` is out of range for a machine's memory: 32MiB to 1TiB",
            "1:72: `2TiB` is out of range for a machine's memory: 32MiB to 1TiB",
        ],
    );
    check(
        "machines: {a: {image: micro, memory: 512MB}}\n",
        &[
            "1:38: a machine's memory must be a multiple of 1MiB; `512MB` is 512000000 bytes (the next larger one is `489MiB`)",
        ],
    );
    check(
        "machines: {a: {image: micro, memory: 0x10000000}}\n",
        &[
            "1:38: `0x10000000` is not a size: `x10000000` is not a unit (a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`)",
        ],
    );
    check(
        "machines: {a: {image: micro, memory: .inf}, b: {image: micro, memory: -1}}\n",
        &[
            "1:38: `.inf` is not a size (a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`)",
            "1:71: `-1` is not a size (a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`)",
        ],
    );
    check(
        "machines: {a: {image: micro, disks: [{name: d, size: 1000001}]}}\n",
        &["1:54: `1000001` is out of range for a disk's size: 1MiB to 64TiB"],
    );
    check(
        "machines: {a: {image: micro, disks: [{name: d}, {name: e, size: 1B}]}}\n",
        &[
            "1:38: the disk has neither a size nor an image (add `size: 1GiB` for an empty disk, or `image: ./data.qcow2`)",
            "1:65: `1B` is out of range for a disk's size: 1MiB to 64TiB",
        ],
    );
}

#[test]
fn what_boots() {
    check(
        "machines: {a: {cpus: 1}}\n",
        &["1:12: `a` has nothing to boot (add `image: micro`, `image: ./disk.qcow2` or `kernel: ./vmlinuz`)"],
    );
    check(
        "machines: {a: {image: mirco}, b: {image: ubuntu}, c: {image: ''}}\n",
        &[
            "1:23: `mirco` is not a built-in image (did you mean `micro`? Built in: `micro`. A path has a `/` or a `.` in it, such as `./disk.qcow2`)",
            "1:42: `ubuntu` is not a built-in image (Built in: `micro`. A path has a `/` or a `.` in it, such as `./disk.qcow2`)",
            "1:62: `` is not a built-in image (Built in: `micro`. A path has a `/` or a `.` in it, such as `./disk.qcow2`)",
        ],
    );
    check(
        "machines: {a: {image: ./none.qcow2}, b: {image: ~/x.raw}, c: {image: /x.raw}}\n",
        &[
            "1:23: there is no file `/lab/none.qcow2` (relative paths start at the environment file's folder)",
            "1:49: there is no file `/lab/~/x.raw` (`~` is not expanded here: write the home folder out)",
            "1:70: there is no file `/x.raw` (check the path)",
        ],
    );
    check(
        "machines: {a: {image: micro, kernel: sub/vmlinuz}}\n",
        &[
            "1:30: `a` has both an `image` and a `kernel` (it boots one of them: `image` is on line 1; remove one)",
        ],
    );
    check(
        "machines: {a: {image: micro, cmdline: quiet, initrd: sub/initrd}}\n",
        &[
            "1:30: `cmdline` belongs to a `kernel`, and this machine boots an `image` (remove it, or name a `kernel` instead of the `image`)",
            "1:46: `initrd` belongs to a `kernel`, and this machine boots an `image` (remove it, or name a `kernel` instead of the `image`)",
        ],
    );
    check(
        "machines: {a: {cmdline: quiet}}\n",
        &["1:12: `a` has nothing to boot (add `image: micro`, `image: ./disk.qcow2` or `kernel: ./vmlinuz`)"],
    );
    check(
        "machines: {a: {kernel: sub/none, initrd: sub/none2, cmdline: [x]}}\n",
        &[
            "1:24: there is no file `/lab/sub/none` (relative paths start at the environment file's folder)",
            "1:42: there is no file `/lab/sub/none2` (relative paths start at the environment file's folder)",
            "1:62: expected a kernel's command line, found a list",
        ],
    );
    check(
        "machines:\n  a:\n    kernel: sub/vmlinuz\n    cmdline: |\n      a\n      b\n",
        &[
            "5:7: the command line has a line end or another control character (write long ones as a folded block: `cmdline: >-`)",
        ],
    );
    check(
        &format!("machines: {{a: {{kernel: sub/vmlinuz, cmdline: {}}}}}\n", "x".repeat(2048)),
        &["1:46: the command line has 2048 bytes; a kernel takes 2047"],
    );
    check(
        "machines: {a: {image: \"./a\\0b\"}}\n",
        &["1:23: expected a disk image's path of 1 to 4096 bytes, found `./a\\0b`"],
    );
    check(
        "machines: {a: {image: micro, disks: [{name: d, image: base.raw}]}}\n",
        &["1:55: there is no file `/lab/base.raw` (relative paths start at the environment file's folder)"],
    );
}

#[test]
fn nics_and_addresses() {
    let with = |nics: &str| {
        format!("networks: {{lan: {{}}, wan: {{}}}}\nmachines: {{a: {{image: micro, nics: [{nics}]}}}}\n")
    };
    check(
        "machines: {a: {image: micro, nics: [lan]}}\n",
        &["1:37: there is no network `lan` (the file declares none: add `networks: {lan: {}}`)"],
    );
    check(
        &with("lam, internet, {network: van}"),
        &[
            "2:37: there is no network `lam` (did you mean `lan`? The networks are `lan`, `wan`)",
            "2:42: there is no network `internet` (the networks are `lan`, `wan`)",
            "2:62: there is no network `van` (did you mean `lan`? The networks are `lan`, `wan`)",
        ],
    );
    check(
        &with("{address: 10.0.0.1/24}, {network: }, [lan], {network: lan, ip: 10.0.0.1/24}"),
        &[
            "2:37: the NIC names no network (add `network: lan`)",
            "2:69: expected a network's name, found nothing",
            "2:74: expected a network's name or a NIC such as `{network: lan}`, found a list",
            "2:96: `ip` is not a field of a NIC (the fields are `network`, `address`, `mac`)",
        ],
    );
    check(
        &with("{network: lan, address: 10.0.0.1}, {network: lan, address: 'fd00::1'}"),
        &[
            "2:61: 10.0.0.1 lacks its prefix length (for example `10.0.0.1/24`)",
            "2:96: fd00::1 lacks its prefix length (for example `fd00::1/64`)",
        ],
    );
    check(
        &with("{network: lan, address: 10.0.0.0/24}, {network: lan, address: 10.0.0.255/24}"),
        &[
            "2:61: 10.0.0.0/24 is the network's own address, which no machine can have (take one between the network's first and last)",
            "2:99: 10.0.0.255/24 is the network's broadcast address, which no machine can have (take one between the network's first and last)",
        ],
    );
    check(
        &with("{network: lan, address: here}, {network: lan, address: 10.0.0.1/99}"),
        &[
            "2:61: `here` is not an IP address with a prefix length (for example `10.0.0.1/24` or `fd00::1/64`)",
            "2:92: /99 is too long a prefix for 10.0.0.1: at most /32 (for example `10.0.0.1/24` or `fd00::1/64`)",
        ],
    );
    check(
        &with(
            "{network: lan, mac: 52:54:00}, {network: lan, mac: 'ff:ff:ff:ff:ff:ff'}, {network: lan, mac: 12}",
        ),
        &[
            "2:57: `52:54:00` is not a MAC address (six pairs of hexadecimal digits: `52:54:00:12:34:56`)",
            "2:88: ff:ff:ff:ff:ff:ff is not the address of one NIC: it is zero, multicast or broadcast (six pairs of hexadecimal digits: `52:54:00:12:34:56`)",
            "2:130: `12` is not a MAC address (six pairs of hexadecimal digits: `52:54:00:12:34:56`)",
        ],
    );
    check(
        "networks: {lan: {}, wan: {}}
machines:
  a: {image: micro, nics: [{network: lan, address: 10.0.0.1/24, mac: 52:54:00:00:00:01}]}
  b: {image: micro, nics: [{network: lan, address: 10.0.0.1/16}, {network: wan, address: 10.0.0.1/24}]}
  c: {image: micro, nics: [{network: lan, mac: 52:54:00:00:00:01}]}
",
        &[
            "4:52: the address 10.0.0.1 is given twice on the network `lan` (the first is on line 3, of `a`)",
            "5:48: the MAC address 52:54:00:00:00:01 is given twice (the first is on line 3, of `a`)",
        ],
    );
}

#[test]
fn too_many() {
    let list = |item: &str, count: usize| vec![item; count].join(", ");
    check(
        &format!("networks: {{x: }}\nmachines: {{a: {{image: micro, nics: [{}]}}}}\n", list("x", 17)),
        &["2:85: 17 NICs; a machine has at most 16"],
    );
    let disks: Vec<String> = (0..17).map(|index| format!("{{name: d{index}, size: 1G}}")).collect();
    check(
        &format!("machines: {{a: {{image: micro, disks: [{}]}}}}\n", disks.join(", ")),
        &["1:214: 17 disks; a machine has at most 8"],
    );
    check(
        "machines: {a: {image: micro, disks: [{name: 0, size: 1G}, {name: a-very-long-disk-name, size: 1G}]}}\n",
        &[
            "1:45: `0` cannot be a disk's name (a disk's name starts with a letter and has at most 20 characters: QEMU and the guest know the disk by it)",
            "1:66: `a-very-long-disk-name` cannot be a disk's name (a disk's name starts with a letter and has at most 20 characters: QEMU and the guest know the disk by it)",
        ],
    );
    let machines: String = (0..1001).map(|index| format!("  m{index}: {{image: micro}}\n")).collect();
    check(&format!("machines:\n{machines}"), &["1002:3: 1001 machines; an environment has at most 1000"]);
    let networks: String = (0..1001).map(|index| format!("  n{index}:\n")).collect();
    check(
        &format!("machines: {{a: {{image: micro}}}}\nnetworks:\n{networks}"),
        &["1003:3: 1001 networks; an environment has at most 1000"],
    );
    let fields: String = (0..1000).map(|index| format!("field{index}: x\n")).collect();
    assert_eq!(problems(&fields).len(), limits::MAX_PROBLEMS);
}

#[test]
fn hostile_text_reaches_messages_escaped() {
    check(
        "machines: {\"a\\e[2J\\n\": {image: \"\\e]0;x\\a\"}}\n",
        &[
            "1:12: `a\\u{1b}[2J\\n` cannot be a name: `\\u{1b}` is not a lower-case letter, a digit or a hyphen (for example `a-2j`)",
            "1:32: `\\u{1b}]0;x\\u{7}` is not a built-in image (Built in: `micro`. A path has a `/` or a `.` in it, such as `./disk.qcow2`)",
        ],
    );
    check(
        &format!("{}: x\n", "k".repeat(900)),
        &[
            "1:1: `kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk…` is not a field of an environment file (the fields are `name`, `machines`, `networks`)",
            "1:1: the environment has no machines (the least is `machines: {one: {image: micro}}`)",
        ],
    );
}

#[test]
fn an_anchors_problem_is_told_once() {
    check(
        "machines:\n  a: &m {image: micro, memory: lots}\n  b: *m\n  c: {<<: *m}\n",
        &["2:32: `lots` is not a size (a size is a number and a unit: `256MiB`, `1GiB`, `512M`, `1048576`)"],
    );
}

#[test]
fn the_schemas_example_is_read() {
    let schema = schema();
    let example = serde_json::to_string_pretty(&schema["examples"][0]).unwrap();
    assert_eq!(read(&example).machines.len(), 2);
}

#[test]
fn hosts_and_labels() {
    let environment = read(
        "machines: {a: {image: micro, host: node-1, labels: {rack: b.7, gpu: 1}}, b: {image: micro, labels: {}}}\n",
    );
    let [a, b] = &environment.machines[..] else { panic!("two machines") };
    assert_eq!(a.host.as_deref(), Some("node-1"));
    let labels: Vec<(&str, &str)> =
        a.labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(labels, [("gpu", "1"), ("rack", "b.7")]);
    assert!(b.host.is_none() && b.labels.is_empty());
    check(
        "machines:\n  a:\n    image: micro\n    host: Node_1\n    labels: {Rack: x, gpu: true, os: 'a b', os: y, z: }\n",
        &[
            "4:11: `Node_1` cannot be a name: `N` is not a lower-case letter, a digit or a hyphen (for example `node-1`)",
            "5:14: `Rack` cannot be a name: `R` is not a lower-case letter, a digit or a hyphen (for example `rack`)",
            "5:28: expected a label's value as text, such as `a` or `'true'`, found `true`",
            "5:38: `a b` cannot be a label's value: it is not 1 to 63 of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`",
            "5:45: the label `os` is declared twice (the first is on line 5: rename or remove one)",
            "5:53: expected a label's value as text, such as `a` or `'true'`, found nothing",
        ],
    );
    check(
        "machines: {a: {image: micro, host: [x], labels: rack}}\n",
        &[
            "1:36: expected a host's name, found a list",
            "1:49: expected labels of hosts, such as `{rack: a}`, found `rack`",
        ],
    );
    let many: Vec<String> = (0..=limits::MAX_LABELS).map(|index| format!("l{index}: x")).collect();
    let text = format!("machines: {{a: {{image: micro, labels: {{{}}}}}}}\n", many.join(", "));
    let column = text.find("l32").unwrap() + 1;
    check(&text, &[&format!("1:{column}: 33 labels; a machine asks for at most 32")]);
}

#[test]
fn what_was_written_before_there_were_labels_still_reads() {
    let environment = read("machines: {a: {image: micro}}\n");
    let json = serde_json::to_value(&environment.machines[0]).unwrap();
    let fields = json.as_object().unwrap();
    assert!(!fields.contains_key("host") && !fields.contains_key("labels"), "{json}");
    let again: diorama_topology::Machine = serde_json::from_value(json).unwrap();
    assert_eq!(again, environment.machines[0]);
}
