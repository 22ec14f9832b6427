//! An encrypted store: made, opened by files and by a person, and used as any other. And who signs what is in a store.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use crate::lab::{Lab, ran, refusal};
use crate::traffic::PAIR;

const PASSPHRASE: &str = "correct horse battery";
const ALONE: &str = "name: pair\nmachines: {one: {image: micro, memory: 96MiB}}\nnetworks: {}\n";

/// Everything that processes of this lab show of themselves to others: arguments and variables.
fn shown_by_processes() -> String {
    let mut shown = String::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
            shown.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    shown
}

/// Another program that runs commands of this lab.
fn within(lab: &Lab, program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, value) in lab.command(&[]).get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.current_dir(lab.folder()).stdin(Stdio::null());
    command
}

#[test]
fn keys_open_it_and_nothing_else_does() {
    let mut lab = Lab::new();
    let file = lab.folder().join("store.key").display().to_string();
    let other = lab.folder().join("other.key").display().to_string();
    for path in [&file, &other] {
        lab.ok(&["store", "key", "new", path]);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }
    lab.write("passphrase", &format!("{PASSPHRASE}\n"));
    // A key without a store makes none.
    lab.set("DIORAMA_STORE_KEY_FILE", &file);
    let refused = lab.refused(&["snapshot", "list"]);
    assert!(refused.message.contains("no store in"), "{refused:?}");
    assert!(refused.hint.contains("store init") || refused.hint.contains("log"), "{refused:?}");
    let made = lab.ok(&["store", "init", "--encrypt", "--key-file", &file, "--label", "first"]);
    assert_eq!((&made["encrypted"], &made["key"]["label"]), (&true.into(), &"first".into()));
    let refused = lab.refused(&["store", "init", "--encrypt", "--key-file", &file]);
    assert_eq!(refused.kind, "wrong-state", "{refused:?}");
    assert_eq!(lab.snapshots(), [""; 0]);
    lab.ok(&["store", "key", "add", "--passphrase-file", "passphrase", "--label", "mine"]);
    lab.ok(&["agent", "stop"]);

    // The wrong one, and none: said at once, with what to do.
    lab.set("DIORAMA_STORE_KEY_FILE", &other);
    let refused = lab.refused(&["snapshot", "list"]);
    assert_eq!(refused.kind, "locked", "{refused:?}");
    lab.unset("DIORAMA_STORE_KEY_FILE");
    // Without a terminal, wherever the test runs.
    let mut alone = within(&lab, "setsid");
    alone.args(["--wait", env!("CARGO_BIN_EXE_diorama"), "snapshot", "list", "--json"]);
    let refused = refusal(&ran(alone.output().unwrap()));
    assert!(
        refused.kind == "locked" && refused.hint.contains("DIORAMA_STORE_PASSPHRASE_FILE"),
        "{refused:?}"
    );

    // A person types it, at the second attempt.
    let line = format!("{} snapshot list --json", env!("CARGO_BIN_EXE_diorama"));
    let mut terminal = within(&lab, "script");
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    let mut child = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut keyboard, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut seen = String::new();
    for typed in ["not the passphrase", PASSPHRASE] {
        seen.clear();
        while !seen.contains("Passphrase of the store") || !seen.ends_with(": ") {
            let mut byte = [0];
            assert_eq!(screen.read(&mut byte).unwrap(), 1, "{seen}");
            seen.push(byte[0] as char);
        }
        keyboard.write_all(format!("{typed}\r").as_bytes()).unwrap();
    }
    screen.read_to_string(&mut seen).unwrap();
    assert!(child.wait().unwrap().success(), "{seen}");
    assert!(seen.contains("\"snapshots\"") && !seen.contains(PASSPHRASE), "{seen}");
    // While its agent runs, nobody sees what was typed.
    assert!(!shown_by_processes().contains(PASSPHRASE));
    assert!(!lab.agent_log().contains(PASSPHRASE));
    assert_eq!(lab.snapshots(), [""; 0]);

    lab.set("DIORAMA_STORE_PASSPHRASE_FILE", "passphrase");
    let keys = lab.ok(&["store", "key", "list"]);
    // Made within one second, they are listed in either order.
    let mut listed: Vec<(&str, &str)> = keys["keys"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| (key["label"].as_str().unwrap(), key["id"].as_str().unwrap()))
        .collect();
    listed.sort_unstable();
    let (labels, ids): (Vec<&str>, Vec<&str>) = listed.into_iter().unzip();
    assert_eq!(labels, ["first", "mine"]);
    lab.ok(&["store", "key", "rm", ids[0]]);
    let refused = lab.refused(&["store", "key", "rm", ids[1]]);
    assert_eq!(refused.kind, "wrong-state", "{refused:?}");
    lab.finish();
}

#[test]
fn an_environment_in_an_encrypted_store() {
    let mut lab = Lab::new();
    let file = lab.folder().join("store.key").display().to_string();
    lab.ok(&["store", "key", "new", &file]);
    lab.set("DIORAMA_STORE_KEY_FILE", &file);
    lab.ok(&["store", "init", "--encrypt"]);
    lab.up(PAIR);
    // It is pinged after the restore, and may not have booted yet.
    lab.shell("pair", "server", "true");
    lab.shell("pair", "client", "echo before-the-flood > /tmp/mark");
    lab.snapshot("pair", &["kept"]);
    lab.verify("kept");
    lab.shell("pair", "client", "echo after > /tmp/mark");
    // Another home, which has nothing but the store and its key: everything comes out of it, decrypted.
    let mut other = Lab::new();
    other.set("DIORAMA_STORE", &lab.home().join("store").display().to_string());
    other.set("DIORAMA_STORE_KEY_FILE", &file);
    other.verify("kept");
    other.ok(&["restore", "pair/kept"]);
    assert_eq!(other.shell("pair", "client", "cat /tmp/mark"), "before-the-flood\n");
    other.shell("pair", "client", "ping -c 2 -W 5 10.0.0.1");
    other.ok(&["down", "--all", "--volumes"]);
    other.ok(&["agent", "stop"]);
    assert!(other.ok(&["doctor"]).is_object());

    lab.kill_agent();
    lab.ok(&["restore", "-e", "pair", "kept"]);
    assert_eq!(lab.shell("pair", "client", "cat /tmp/mark"), "before-the-flood\n");
    assert_eq!(lab.ok(&["store", "check", "--read-data"])["ok"], true);
    lab.finish();
}

#[test]
fn snapshots_are_signed_and_others_refused() {
    let mut lab = Lab::new();
    let path = |name: &str| lab.folder().join(name).display().to_string();
    let (alice, bob) = (path("alice.pem"), path("bob.pem"));
    let (exported, third) = (path("signed.diorama"), path("third"));
    let key = lab.ok(&["store", "signer", &alice])["key"].clone();
    lab.ok(&["store", "signer", &bob]);
    assert_eq!(lab.refused(&["store", "signer", &alice]).kind, "io");
    lab.set("DIORAMA_SIGNING_KEY", &alice);
    lab.up(ALONE);
    let signed = lab.snapshot("pair", &["signed"]);
    assert_eq!((&signed["signature"]["state"], &signed["signature"]["key"]), (&"valid".into(), &key));
    lab.ok(&["snapshot", "verify", "signed", "--signed-by", "alice.pem.pub"]);
    let refused = lab.refused(&["snapshot", "verify", "signed", "--signed-by", "bob.pem.pub"]);
    assert_eq!(refused.kind, "corrupt", "{refused:?}");
    assert_eq!(lab.run(&["snapshot", "verify", "signed", "--signed-by", "alice.pem"]).status, Some(2));

    // An agent that signs nothing, and trusts Alice alone.
    lab.ok(&["agent", "stop", "--force"]);
    lab.unset("DIORAMA_SIGNING_KEY");
    lab.set("DIORAMA_TRUSTED_KEYS", "alice.pem.pub");
    let unsigned = lab.snapshot("pair", &["unsigned"]);
    assert_eq!(unsigned["signature"]["state"], "none", "{unsigned}");
    lab.verify("signed");
    assert_eq!(lab.ok(&["snapshot", "show", "signed"])["signature"]["trusted"], true);
    let report = lab.run(&["snapshot", "verify", "unsigned", "--json"]);
    assert!(report.status == Some(1) && report.stdout.contains("nobody has signed it"), "{report:?}");
    for command in [&["restore", "-e", "pair", "unsigned"][..], &["fork", "unsigned"]] {
        let refused = lab.refused(command);
        assert!(refused.kind == "untrusted" && refused.message.contains("nobody has signed"), "{refused:?}");
    }
    lab.ok(&["restore", "-e", "pair", "signed"]);

    // The whole store somewhere else, with nothing of this home: it proves itself.
    let mut elsewhere = Lab::new();
    let copy = elsewhere.folder().join("copy");
    let copied = Command::new("cp").arg("-r").arg(lab.home().join("store")).arg(&copy).status().unwrap();
    assert!(copied.success());
    elsewhere.set("DIORAMA_STORE", copy.to_str().unwrap());
    let public = format!("{alice}.pub");
    elsewhere.ok(&["snapshot", "verify", "signed", "--signed-by", &public]);
    // Another's signature in its place.
    let id = |report: &serde_json::Value| report["id"].as_str().unwrap().to_owned();
    let file = |id: String| copy.join("signatures").join(id);
    std::fs::copy(file(id(&signed)), file(id(&unsigned))).unwrap();
    for arguments in
        [&["snapshot", "verify", "unsigned"][..], &["snapshot", "verify", "unsigned", "--signed-by", &public]]
    {
        let refused = elsewhere.refused(arguments);
        assert_eq!(refused.kind, "corrupt", "{refused:?}");
    }
    assert_eq!(elsewhere.ok(&["snapshot", "show", "unsigned"])["signature"]["state"], "wrong");
    elsewhere.ok(&["agent", "stop"]);

    // A file and another store bring the signature, too.
    lab.ok(&["export", "signed", "-o", &exported]);
    lab.ok(&["store", "push", "signed", "--to", &third]);
    let importer = Lab::new();
    for bring in [&["import", &exported][..], &["store", "pull", "signed", "--from", &third]] {
        importer.ok(bring);
        importer.ok(&["snapshot", "verify", "signed", "--signed-by", &public]);
        importer.ok(&["snapshot", "rm", "signed"]);
    }
    importer.finish();
    lab.finish();
}
