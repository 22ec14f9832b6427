//! Machines that run before their memory is there.

use std::time::Duration;

use serde_json::Value;

use crate::bucket::lab;
use crate::lab::{Lab, refusal, until};
use crate::s3_server::Server;
use crate::traffic::{self, PAIR};

/// A pair with room for a file in memory.
fn roomy() -> String {
    PAIR.replace("96MiB", "192MiB")
}

/// Something in memory that nobody touches before it is asked for, and its sum.
fn fill(lab: &Lab, machine: &str) -> String {
    let line =
        "mkdir -p /m && mount -t tmpfs m /m && dd if=/dev/urandom of=/m/file bs=1M count=24 2>/dev/null && ";
    lab.shell("pair", machine, &format!("{line} md5sum /m/file"))
}

fn sum(lab: &Lab, environment: &str, machine: &str) -> String {
    lab.shell(environment, machine, "md5sum /m/file")
}

/// Afterwards a snapshot's memory is in the store alone.
fn empty_cache(lab: &Lab) {
    let folder = lab.runtime().join("ram");
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::create_dir(folder).unwrap();
}

/// What is said of the machines' loads, in the file's order; null for one that is complete.
fn loads(lab: &Lab, environment: &str) -> Vec<Value> {
    let status = lab.status(environment);
    status["machines"].as_array().unwrap().iter().map(|machine| machine["loading"].clone()).collect()
}

#[track_caller]
fn wait_loaded(lab: &Lab, environment: &str) {
    until("all memory", || loads(lab, environment).iter().all(Value::is_null).then_some(()));
}

/// When the agent begins to load what nobody asks for.
const BACKGROUND: &str = "load background";
/// When it has a machine that it will send the opening of its stream.
const OPENING: &str = "load opening";

/// The agent of a lab that is to stop, or to wait, at such a step.
struct Held(std::path::PathBuf);

impl Held {
    fn new(lab: &mut Lab) -> Self {
        let file = lab.folder().join("failpoint");
        lab.set("DIORAMA_FAILPOINT", file.to_str().unwrap());
        Self(file)
    }

    fn arm(&self, what: &str, step: &str) {
        std::fs::write(&self.0, format!("{what} {step}")).unwrap();
    }

    fn wait(&self) {
        until("a load that waits", || self.0.with_extension("reached").exists().then_some(()));
    }

    fn release(&self) {
        self.wait();
        std::fs::remove_file(self.0.with_extension("reached")).unwrap();
    }
}

#[test]
fn guests_run_before_their_memory_is_there_and_miss_nothing() {
    let mut lab = Lab::new();
    let held = Held::new(&mut lab);
    lab.up(&roomy());
    let sums = [fill(&lab, "server"), fill(&lab, "client")];
    let arrived = traffic::start(&lab, "pair");
    lab.snapshot("pair", &["base"]);
    let arrived = traffic::goes_on(&lab, "pair", &arrived);

    // Nothing is loaded but what guests touch.
    empty_cache(&lab);
    held.arm("wait", BACKGROUND);
    let report = lab.ok(&["restore", "base", "--lazy"]);
    assert_eq!(report["lazy"], true, "{report}");
    let counted = |machine: &str| lab.shell("pair", machine, "cat /proc/uptime");
    assert_ne!(counted("client"), counted("client"));
    for load in loads(&lab, "pair") {
        let bytes = |field: &str| load[field].as_u64().unwrap();
        assert!(bytes("loaded_bytes") > 0, "{load}");
        // The file is not among it.
        assert!(bytes("total_bytes") - bytes("loaded_bytes") > 20 << 20, "{load}");
    }
    assert_eq!(lab.states("pair"), ["running"; 2]);
    let text = lab.run(&["-e", "pair", "status"]).stdout;
    assert!(text.contains("running, loading "), "{text}");
    for arguments in [&["agent", "stop"][..], &["agent", "stop", "--force"]] {
        let refused = lab.refused(arguments);
        assert!(!refused.hint.is_empty(), "{refused:?}");
    }
    assert!(lab.refused(&["agent", "stop", "--force"]).message.contains("still being loaded"));

    // A snapshot waits for all of it.
    let mut second = lab.begin(&["-e", "pair", "snapshot", "create", "second"]);
    assert_eq!(sum(&lab, "pair", "server"), sums[0]);
    held.release();
    assert!(second.wait().unwrap().success(), "{}", lab.agent_log());
    assert_eq!(loads(&lab, "pair"), [Value::Null, Value::Null]);
    lab.verify("second");
    assert_eq!([sum(&lab, "pair", "server"), sum(&lab, "pair", "client")], sums);
    traffic::goes_on_from_here(&lab, "pair", &arrived);

    // They need the agent no more.
    lab.kill_agent();
    assert_eq!(lab.states("pair"), ["running"; 2]);
    assert_eq!([sum(&lab, "pair", "server"), sum(&lab, "pair", "client")], sums);
    lab.snapshot("pair", &["third"]);
    for name in ["second", "third"] {
        let report = lab.ok(&["restore", name, "--eager"]);
        assert_eq!(report["lazy"], false, "{report}");
        assert_eq!([sum(&lab, "pair", "server"), sum(&lab, "pair", "client")], sums);
    }
    // What is in the cache is mapped.
    assert_eq!(lab.ok(&["restore", "third", "--lazy"])["lazy"], false);
    lab.finish();
}

#[test]
fn forks_run_before_their_memory_is_there() {
    let mut lab = Lab::new();
    let held = Held::new(&mut lab);
    lab.up(&roomy());
    let expected = fill(&lab, "client");
    lab.snapshot("pair", &["base"]);
    lab.ok(&["down", "-e", "pair", "--volumes"]);
    empty_cache(&lab);
    // What the others are sent while one machine is not told of its devices yet is that machine's, too, and comes later.
    held.arm("wait", OPENING);
    let forks = lab.begin(&["fork", "base", "--lazy", "--count", "2", "--name", "copy"]);
    held.wait();
    std::thread::sleep(Duration::from_secs(2));
    held.release();
    let forked = forks.wait_with_output().unwrap();
    assert!(forked.status.success(), "{}\n{}", String::from_utf8_lossy(&forked.stdout), lab.agent_log());
    let report: Value = serde_json::from_slice(&forked.stdout).unwrap();
    for fork in report["environments"].as_array().unwrap() {
        assert_eq!(fork["lazy"], true, "{report}");
    }
    lab.shell("copy-1", "client", "echo one > /m/mark");
    assert_eq!(sum(&lab, "copy-1", "client"), expected);
    // One goes while it loads, or just after: the other does not mind.
    lab.ok(&["down", "-e", "copy-1", "--volumes"]);
    assert_eq!(sum(&lab, "copy-2", "client"), expected);
    lab.shell("copy-2", "client", "! test -e /m/mark && ping -c 2 -W 5 10.0.0.1");
    wait_loaded(&lab, "copy-2");
    lab.finish();
}

#[test]
fn a_bucket_that_goes_away_is_waited_for() {
    let mut server = Server::start();
    let one = lab(&server);
    one.up(&roomy());
    let sums = [fill(&one, "server"), fill(&one, "client")];
    one.snapshot("pair", &["base"]);
    one.ok(&["down", "--all", "--volumes"]);
    one.ok(&["agent", "stop"]);

    let mut two = lab(&server);
    let held = Held::new(&mut two);
    held.arm("wait", BACKGROUND);
    assert_eq!(two.ok(&["restore", "pair/base", "--lazy"])["lazy"], true);
    two.shell("pair", "client", "true");
    server.kill();
    let mut reading = two.begin_without_json(&["-e", "pair", "exec", "client", "--", "md5sum", "/m/file"]);
    until("what the machine waits for", || {
        let loads = loads(&two, "pair");
        loads.iter().find_map(|load| load["waits_for"].as_str().map(str::to_owned))
    });
    let status = two.run(&["-e", "pair", "status"]).stdout;
    assert!(status.contains("it waits for memory"), "{status}");
    assert_eq!(two.states("pair"), ["running"; 2]);
    server.start_again();
    held.release();
    wait_loaded(&two, "pair");
    // Whether it has given up meanwhile or not, the guest does not mind.
    reading.wait().unwrap();
    assert_eq!([sum(&two, "pair", "server"), sum(&two, "pair", "client")], sums);
    two.finish();
}

#[test]
fn an_agent_that_dies_while_it_loads_loses_machines_and_nothing_else() {
    let mut lab = Lab::new();
    let held = Held::new(&mut lab);
    lab.up(&roomy());
    let expected = fill(&lab, "client");
    lab.snapshot("pair", &["base"]);
    empty_cache(&lab);
    let agent = lab.agent_pid();
    held.arm("kill", BACKGROUND);
    let mut restore = lab.begin(&["restore", "base", "--lazy"]);
    restore.wait().unwrap();
    crate::lab::wait_for_end(agent);
    assert_eq!(lab.states("pair"), ["dead"; 2], "{}", lab.agent_log());
    let status = lab.run(&["-e", "pair", "status"]).stdout;
    // A QEMU whose own main loop waits for a page cannot even say that.
    let said = ["still being loaded", "does not answer any more"];
    assert!(said.iter().any(|said| status.contains(said)), "{status}");
    lab.ok(&["restore", "base", "--lazy"]);
    assert_eq!(sum(&lab, "pair", "client"), expected);
    wait_loaded(&lab, "pair");
    lab.finish();
}

/// Changes a stored byte that is memory's, and restores all the same. The packs have the devices' state, kernels and disks as well,
/// and what says which pages there are: whoever needs that is refused.
fn restore_with_damaged_memory(lab: &Lab, snapshot: &str) {
    for pack in std::fs::read_dir(lab.home().join("store/packs")).unwrap().flatten() {
        let whole = std::fs::read(pack.path()).unwrap();
        for sixteenth in 1..16 {
            let mut bytes = whole.clone();
            bytes[whole.len() * sixteenth / 16] ^= 1;
            std::fs::write(pack.path(), bytes).unwrap();
            let said = lab.run(&["snapshot", "verify", snapshot, "--json"]).stdout;
            // What stands elsewhere as well is not lost.
            if said.contains("ram/") && !said.contains("state/") {
                let restored = lab.run(&["restore", snapshot, "--lazy", "--json"]);
                if restored.status == Some(0) {
                    return;
                }
                assert_eq!(refusal(&restored).kind, "corrupt", "{restored:?}");
            }
        }
        std::fs::write(pack.path(), whole).unwrap();
    }
    panic!("nothing that was changed is memory's");
}

#[test]
fn damage_that_is_met_while_machines_run_is_said() {
    let lab = Lab::new();
    lab.up(&roomy());
    fill(&lab, "client");
    lab.snapshot("pair", &["base"]);
    empty_cache(&lab);
    restore_with_damaged_memory(&lab, "base");
    until("a machine that says what is wrong", || {
        lab.states("pair").contains(&"crashed".to_owned()).then_some(())
    });
    let status = lab.run(&["-e", "pair", "status"]).stdout;
    assert!(status.contains("its memory cannot be loaded") && status.contains("damaged"), "{status}");
    let refused = lab.refused(&["-e", "pair", "snapshot", "create", "broken"]);
    assert!(refused.message.contains("its memory cannot be loaded"), "{refused:?}");
    lab.ok(&["down", "-e", "pair", "--volumes"]);
    lab.finish();
}
