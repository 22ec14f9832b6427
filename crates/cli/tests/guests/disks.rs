//! Disks across snapshots: what was there is there, and chains stay short.

use serde_json::Value;

use crate::lab::{Lab, until};

const FILE: &str = "\
name: disks
machines:
  box:
    image: micro
    memory: 96MiB
    nics: [lan]
    disks: [{name: data, size: 256MiB}]
networks: {lan: {}}
";

/// The longest chain that a disk may have: eight layers, and the one that a cut adds.
const LAYERS_MAX: u64 = 9;

fn check(lab: &Lab) -> Value {
    serde_json::from_str(&lab.shell("disks", "box", "traffic disk-check --file /dev/vda")).unwrap()
}

fn layers(lab: &Lab) -> u64 {
    lab.status("disks")["machines"][0]["disks"][0]["layers"].as_u64().unwrap()
}

/// Writes for a while, so that the newest block is a later one.
fn write(lab: &Lab) {
    lab.shell("disks", "box", "traffic disk --file /dev/vda --rate 4MiB --size 2MiB --seconds 1");
}

#[test]
fn a_disk_is_as_it_was_at_the_snapshot() {
    let lab = Lab::new();
    lab.up(FILE);
    write(&lab);
    lab.shell("disks", "box", "echo early | dd of=/dev/vda bs=4096 seek=2048 conv=fsync 2>/dev/null");
    let before = check(&lab);
    lab.snapshot("disks", &["early"]);
    let mark = "dd if=/dev/vda bs=4096 skip=2048 count=1 2>/dev/null | head -c 5";
    lab.shell("disks", "box", "echo later | dd of=/dev/vda bs=4096 seek=2048 conv=fsync 2>/dev/null");
    write(&lab);
    assert_eq!(lab.shell("disks", "box", mark), "later");
    lab.snapshot("disks", &["later"]);

    for (snapshot, expected) in [("early", "early"), ("later", "later"), ("early", "early")] {
        lab.ok(&["restore", snapshot]);
        // What lies on the disk, and not what the guest still remembers of it.
        lab.shell("disks", "box", "echo 3 > /proc/sys/vm/drop_caches");
        assert_eq!(lab.shell("disks", "box", mark), expected);
    }
    assert_eq!(check(&lab), before);
    // Two forks write to the same disk, each to its own.
    lab.ok(&["fork", "later", "--name", "fork"]);
    lab.shell("fork", "box", "echo forks | dd of=/dev/vda bs=4096 seek=2048 conv=fsync 2>/dev/null");
    lab.shell("disks", "box", "echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(lab.shell("disks", "box", mark), "early");
    assert_eq!(lab.shell("fork", "box", mark), "forks");
    // Kept disks are those of the timeline that ended.
    lab.ok(&["-e", "disks", "down"]);
    lab.up(FILE);
    assert_eq!(lab.shell("disks", "box", mark), "early");
    lab.finish();
}

#[test]
fn chains_stay_short_while_a_guest_writes() {
    let lab = Lab::new();
    lab.up(FILE);
    lab.shell(
        "disks",
        "box",
        "traffic disk --file /dev/vda --rate 1MiB --size 8MiB --status /tmp/disk </dev/null >/dev/null 2>&1 &",
    );
    let synced = || {
        let line = lab.shell("disks", "box", "cat /tmp/disk 2>/dev/null; true");
        serde_json::from_str::<Value>(&line).ok().and_then(|line| line["synced_blocks"].as_u64()).unwrap_or(0)
    };
    until("the first blocks", || (synced() > 100).then_some(()));
    for number in 1..=12 {
        lab.snapshot("disks", &[&format!("n{number}")]);
        let layers = layers(&lab);
        assert!(layers <= LAYERS_MAX, "{layers} layers after {number} snapshots");
    }
    let before = synced();
    until("more blocks", || (synced() > before).then_some(()));
    // The program is ended where it is: the newest blocks need not be whole, the synced ones must be there.
    for snapshot in ["n12", "n5", "n9"] {
        lab.ok(&["restore", snapshot]);
        until("more blocks", || (synced() > 0).then_some(()));
        lab.shell("disks", "box", "killall traffic; sync; echo 3 > /proc/sys/vm/drop_caches");
        let found = check(&lab);
        assert_eq!((&found["torn"], &found["missing"]), (&0.into(), &0.into()), "{found}");
        assert!(found["synced_blocks"].as_u64().unwrap() > 0, "{found}");
    }
    // A long chain that was brought back is shortened as well.
    for number in 13..=16 {
        lab.snapshot("disks", &[&format!("n{number}")]);
    }
    assert!(layers(&lab) <= LAYERS_MAX);
    lab.ok(&["snapshot", "rm", "n9", "n1", "n5"]);
    lab.verify("n12");
    lab.verify("n16");
    lab.ok(&["restore", "n16"]);
    lab.shell("disks", "box", "traffic disk-check --file /dev/vda");
    lab.finish();
}
