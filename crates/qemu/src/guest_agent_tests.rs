//! The client against a small agent of our own on a socket pair. Guests with the real one are the agent crate's tests.

use super::*;
use std::io::BufRead;
use std::thread::JoinHandle;

/// An agent that first writes `stale`, then answers synchronisations, and other commands by `answer`.
fn agent(
    stale: &'static [u8],
    answer: impl Fn(&Value) -> Option<String> + Send + 'static,
) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let thread = std::thread::spawn(move || {
        let mut writer = theirs.try_clone().expect("clone");
        writer.write_all(stale).expect("stale");
        let mut reader = io::BufReader::new(theirs);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).expect("read") > 0 {
            let start = line.iter().rposition(|&byte| byte == SENTINEL).map_or(0, |at| at + 1);
            let request: Value = serde_json::from_slice(&line[start..]).expect("a request");
            if request["execute"] == "guest-sync-delimited" {
                writer.write_all(&[SENTINEL]).expect("mark");
                writeln!(writer, "{}", json!({"return": request["arguments"]["id"]})).expect("sync");
            } else if let Some(answer) = answer(&request) {
                writeln!(writer, "{answer}").expect("answer");
            }
            line.clear();
        }
    });
    (ours, thread)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn stale_bytes_are_skipped() {
    let stale = b"{\"return\": {\"pid\": 1}}\nhalf a li\xff{\"return\": 5}\n\xffgarbage\n";
    let (stream, thread) = agent(stale, |_| Some("{\"return\": {}}".into()));
    let mut client = GuestAgent::over(stream, soon()).expect("synchronise");
    client.ping().expect("ping");
    drop(client);
    thread.join().expect("agent");
}

#[test]
fn a_command_runs() {
    let (stream, thread) = agent(b"", |request| {
        if request["execute"] == "guest-shutdown" {
            return None;
        }
        Some(match request["execute"].as_str().expect("command") {
            "guest-exec" => {
                let expected = json!({"path": "/bin/cat", "arg": ["-"], "env": ["A=b"], "input-data": "aGk=",
                    "capture-output": true});
                assert_eq!(request["arguments"], expected);
                json!({"return": {"pid": 42}}).to_string()
            }
            "guest-exec-status" => {
                assert_eq!(request["arguments"], json!({"pid": 42}));
                json!({"return": {"exited": true, "exitcode": 3, "out-data": "aGk=", "err-truncated": true}})
                    .to_string()
            }
            other => json!({"error": {"class": "CommandNotFound", "desc": other}}).to_string(),
        })
    });
    let mut client = GuestAgent::over(stream, soon()).expect("synchronise");
    let exec = client.exec("/bin/cat", &["-".into()], &["A=b".into()], b"hi").expect("exec");
    let status = client.exec_status(exec).expect("status").expect("ended");
    let expected =
        Status { exit: Exit::Code(3), stdout: b"hi".to_vec(), stderr: Vec::new(), truncated: true };
    assert_eq!(status, expected);
    let error = client.ping().expect_err("refused");
    assert!(
        matches!(&error, GuestAgentError::Refused { class, .. } if class == "CommandNotFound"),
        "{error}"
    );
    client.shutdown().expect("shutdown");
    drop(client);
    thread.join().expect("agent");
}

#[test]
fn a_silent_agent_is_not_responding_and_may_come_back() {
    let (stream, peer) = UnixStream::pair().expect("pair");
    let error = GuestAgent::over(stream, Instant::now() + Duration::from_millis(20)).expect_err("silent");
    assert!(matches!(error, GuestAgentError::NotResponding { .. }), "{error}");
    drop(peer);

    // It swallows the first ping; the next request must not get a stale answer.
    let (stream, thread) = agent(b"", {
        let first = std::sync::atomic::AtomicBool::new(true);
        move |_| (!first.swap(false, std::sync::atomic::Ordering::Relaxed)).then(|| "{\"return\": {}}".into())
    });
    let mut client = GuestAgent::over(stream, soon()).expect("synchronise");
    client.set_timeout(Duration::from_millis(50));
    assert!(matches!(client.ping(), Err(GuestAgentError::NotResponding { .. })));
    client.set_timeout(Duration::from_secs(10));
    client.ping().expect("back");
    drop(client);
    thread.join().expect("agent");
}

#[test]
fn a_closed_channel_is_a_disconnection() {
    let (stream, peer) = UnixStream::pair().expect("pair");
    drop(peer);
    let error = GuestAgent::over(stream, soon()).expect_err("closed");
    assert!(matches!(error, GuestAgentError::Disconnected), "{error}");
}

#[test]
fn hostile_statuses_are_refused_by_field() {
    let cases = [
        (json!({}), "exited"),
        (json!({"exited": 1}), "exited"),
        (json!({"exited": true}), "exitcode"),
        (json!({"exited": true, "exitcode": 1e99}), "exitcode"),
        (json!({"exited": true, "signal": "9"}), "signal"),
        (json!({"exited": true, "exitcode": 0, "out-data": "*"}), "out-data"),
        (json!({"exited": true, "exitcode": 0, "err-data": []}), "err-data"),
    ];
    for (status, expected) in cases {
        let error = parse_status(&status).expect_err("refused");
        assert!(
            matches!(error, GuestAgentError::BadAnswer { field, .. } if field == expected),
            "{status}: {error}"
        );
    }
    assert_eq!(parse_status(&json!({"exited": false})).expect("valid"), None);
    let killed = parse_status(&json!({"exited": true, "signal": 9})).expect("valid").expect("ended");
    assert_eq!(killed.exit, Exit::Signal(9));
}
