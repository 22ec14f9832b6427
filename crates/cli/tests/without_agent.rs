//! The built program, in everything that needs no agent: each test runs it as a user or a script would.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const PAIR: &str = "\
name: pair
machines:
  server:
    image: micro
    nics: [{network: lan, address: 10.0.0.1/24}]
  client: {image: micro, nics: [lan]}
networks:
  lan: {}
";

const WRONG: &str = "\
name: pair
machines:
  server:
    image: micro
    nics: [lam]
    colour: red
networks:
  lan: {}
";

const COMMANDS: &[&[&str]] = &[
    &["up"],
    &["down"],
    &["status"],
    &["snapshot"],
    &["snapshot", "create"],
    &["snapshot", "list"],
    &["snapshot", "show"],
    &["snapshot", "verify"],
    &["snapshot", "diff"],
    &["snapshot", "rm"],
    &["snapshot", "extract"],
    &["store"],
    &["store", "push"],
    &["store", "pull"],
    &["export"],
    &["import"],
    &["restore"],
    &["fork"],
    &["exec"],
    &["console"],
    &["logs"],
    &["pause"],
    &["resume"],
    &["validate"],
    &["schema"],
    &["doctor"],
    &["agent"],
    &["agent", "stop"],
    &["completion"],
];

/// The program in an empty folder, with its state there too.
fn diorama(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_diorama"));
    command
        .current_dir(folder)
        .env("DIORAMA_HOME", folder.join("home"))
        .env("DIORAMA_RUNTIME_DIR", folder.join("run"))
        .env_remove("DIORAMA_ENVIRONMENT")
        .stdin(Stdio::null());
    command
}

struct Ran {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(folder: &Path, arguments: &[&str]) -> Ran {
    let Output { status, stdout, stderr } = diorama(folder).args(arguments).output().unwrap();
    Ran {
        status: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// Runs with `--json`: standard output is one document, whatever happens.
fn run_json(folder: &Path, arguments: &[&str]) -> (Option<i32>, Value) {
    let ran = run(folder, &[&["--json"], arguments].concat());
    let document = serde_json::from_str(&ran.stdout)
        .unwrap_or_else(|error| panic!("{arguments:?}: {error} in {:?}", ran.stdout));
    (ran.status, document)
}

fn with_file(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("diorama.yaml"), text).unwrap();
    folder
}

#[test]
fn every_command_teaches_with_examples() {
    let folder = tempfile::tempdir().unwrap();
    for command in COMMANDS {
        let ran = run(folder.path(), &[command, &["--help"][..]].concat());
        assert_eq!(ran.status, Some(0), "{command:?}");
        assert!(ran.stdout.contains("Examples:\n"), "{command:?} has no examples:\n{}", ran.stdout);
        assert!(ran.stdout.contains(&format!("diorama {}", command.join(" "))), "{}", ran.stdout);
        assert!(ran.stderr.is_empty(), "{}", ran.stderr);
    }
    assert!(!folder.path().join("home").exists(), "help must not write anything");
}

#[test]
fn version_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let ran = run(folder.path(), &["--version"]);
    assert_eq!(ran.stdout, format!("diorama {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_is_status_2_and_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let wrong: &[&[&str]] = &[
        &[],
        &["frob"],
        &["snapshot"],
        &["fork"],
        &["fork", "base", "--count", "0"],
        &["fork", "base", "--name", "Not A Name"],
        &["restore", ""],
        &["snapshot", "rm"],
        &["snapshot", "create", "--capture", "magic"],
        &["exec", "server"],
        &["status", "--frob"],
        &["-e", "UPPER", "status"],
        &["completion", "cmd"],
        &["console", "server"],
        &["logs", "-f", "server"],
        &["agent", "--ready-fd", "2"],
        &["agent", "--ready-fd", "1000000"],
    ];
    for arguments in wrong {
        let (status, document) = run_json(folder.path(), arguments);
        assert_eq!(status, Some(2), "{arguments:?}");
        assert_eq!(document["error"]["kind"], "invalid", "{arguments:?}");
        for field in ["message", "hint"] {
            let text = document["error"][field].as_str().unwrap_or_default();
            assert!(!text.is_empty() && !text.contains('\u{1b}'), "{arguments:?} {field}: {text:?}");
        }
    }
    let ran = run(folder.path(), &["frob"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("frob"), "{}", ran.stderr);
}

#[test]
fn json_behind_a_double_dash_is_the_commands_own() {
    let folder = tempfile::tempdir().unwrap();
    // `exec` is wrong here (the name), and `--json` belongs to the guest's command.
    let ran = run(folder.path(), &["-e", "UPPER", "exec", "server", "--", "ip", "--json", "addr"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""));
}

#[test]
fn validate_accepts_a_good_file() {
    let folder = with_file(PAIR);
    let ran = run(folder.path(), &["validate"]);
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stdout, "diorama.yaml: environment pair with 2 machines and 1 network\n");
    let (status, document) = run_json(folder.path(), &["validate"]);
    assert_eq!(status, Some(0));
    assert_eq!(document["environment"]["name"], "pair");
    assert_eq!(document["environment"]["machines"][0]["nics"][0]["address"], "10.0.0.1/24");
}

#[test]
fn validate_reads_standard_input() {
    let folder = with_file(PAIR);
    let file = std::fs::File::open(folder.path().join("diorama.yaml")).unwrap();
    let output = diorama(folder.path()).args(["validate", "-"]).stdin(file).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "-: environment pair with 2 machines and 1 network\n"
    );
}

#[test]
fn a_wrong_file_names_every_place() {
    let folder = with_file(WRONG);
    for command in ["validate", "up"] {
        let ran = run(folder.path(), &[command]);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""), "{command}");
        for expected in [
            "diorama.yaml:5:12: error: ",
            "  5 |     nics: [lam]\n    |            ^^^",
            "diorama.yaml:6:5: error: ",
            "hint: did you mean `lan`?",
        ] {
            assert!(ran.stderr.contains(expected), "{command}: no {expected:?} in\n{}", ran.stderr);
        }
        assert!(!ran.stderr.contains('\u{1b}'), "no colour without a terminal");

        let (status, document) = run_json(folder.path(), &[command]);
        assert_eq!(status, Some(2));
        assert_eq!(document["error"]["kind"], "environment-file");
        let problems = document["error"]["problems"].as_array().unwrap();
        let places: Vec<_> = problems.iter().map(|p| (p["line"].as_u64(), p["column"].as_u64())).collect();
        assert_eq!(places, [(Some(5), Some(12)), (Some(6), Some(5))]);
        assert!(problems.iter().all(|problem| problem["file"] == "diorama.yaml"));
    }
    assert!(!folder.path().join("home").exists(), "a wrong file must not start anything");
}

#[test]
fn a_file_that_is_no_text_is_said_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk.qcow2"), b"name: pair\nab\xffcd").unwrap();
    let ran = run(folder.path(), &["up", "disk.qcow2"]);
    assert_eq!(ran.status, Some(2));
    assert!(ran.stderr.starts_with("disk.qcow2:2:3: error: the byte 0xff is not UTF-8"), "{}", ran.stderr);
}

#[test]
fn hostile_files_cannot_steer_the_terminal() {
    let folder = with_file("name: \"\u{1b}[2J\"\nmachines: {\u{1b}]0;x\u{7}: 3}\n");
    let ran = run(folder.path(), &["validate"]);
    assert_eq!(ran.status, Some(2));
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!ran.stderr.contains(control), "{:?}", ran.stderr);
}

#[test]
fn a_missing_file_is_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let ran = run(folder.path(), &["up"]);
    assert_eq!(ran.status, Some(2));
    assert!(ran.stderr.contains("diorama.yaml") && ran.stderr.contains("hint: "), "{}", ran.stderr);
    let (status, document) = run_json(folder.path(), &["validate", "nowhere.yaml"]);
    assert_eq!(status, Some(2));
    assert_eq!(document["error"]["kind"], "environment-file");
}

#[test]
fn the_schema_is_a_json_schema_with_and_without_json() {
    let folder = tempfile::tempdir().unwrap();
    let plain: Value = serde_json::from_str(&run(folder.path(), &["schema"]).stdout).unwrap();
    assert!(plain["properties"]["machines"].is_object(), "{plain}");
    assert_eq!(run_json(folder.path(), &["schema"]), (Some(0), plain));
}

#[test]
fn completion_scripts_and_candidates() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = run(folder.path(), &["completion", shell]);
        assert_eq!(ran.status, Some(0), "{shell}");
        assert!(ran.stdout.contains("DIORAMA_COMPLETE"), "{shell}: {}", ran.stdout);
    }
    let (_, document) = run_json(folder.path(), &["completion", "bash"]);
    assert_eq!(document["shell"], "bash");

    let candidates = |index: &str, words: &[&str]| {
        let output = diorama(folder.path())
            .env("DIORAMA_COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", index)
            .env("_CLAP_IFS", "\n")
            .arg("--")
            .args(words)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(candidates("2", &["diorama", "snapshot", "cr"]), "create");
    // Names need an agent. None runs, none is started, and the shell is not told of it.
    assert_eq!(candidates("2", &["diorama", "restore", "b"]), "");
    assert!(!folder.path().join("home").exists());
}

#[test]
fn stopping_an_agent_that_does_not_run_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run(folder.path(), &["agent", "stop"]).stdout, "no agent runs\n");
    let (status, document) = run_json(folder.path(), &["agent", "stop"]);
    assert_eq!((status, &document["stopped"]), (Some(0), &Value::Bool(false)));
}

#[test]
fn an_agent_that_cannot_be_reached_or_started_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    // A socket's path has at most 107 bytes.
    let long = folder.path().join("x".repeat(120));
    let output =
        diorama(folder.path()).env("DIORAMA_RUNTIME_DIR", &long).args(["status", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["error"]["kind"], "agent");
    assert!(document["error"]["hint"].as_str().unwrap().contains("DIORAMA_RUNTIME_DIR"), "{document}");

    // A home that cannot be made.
    std::fs::write(folder.path().join("home"), "a file").unwrap();
    let (status, document) = run_json(folder.path(), &["status"]);
    assert_eq!((status, &document["error"]["kind"]), (Some(1), &Value::from("io")));
}

#[test]
fn doctor_is_one_document_whose_status_is_its_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let (status, document) = run_json(folder.path(), &["doctor"]);
    let ok = document["ok"].as_bool().unwrap();
    assert_eq!(status, Some(if ok { 0 } else { 1 }));
    assert_eq!(document["error"].is_null(), ok);
    assert!(!document["checks"].as_array().unwrap().is_empty());
    assert!(!run(folder.path(), &["doctor"]).stdout.is_empty());
}

#[test]
fn a_reader_that_stops_reading_ends_the_command_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = diorama(folder.path()).arg("schema").stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
