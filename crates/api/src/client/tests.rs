//! The client against a server that answers with bytes written here, so that every way in which an agent
//! of another version, or a dying one, can answer is met.

use std::future::Future;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;
use crate::ProgressUnit;

/// Runs `ask` against a server that reads one request head and then writes these pieces, one write each, and
/// closes. Gives the request's first line too.
fn served<T, F: Future<Output = T>>(pieces: &[&[u8]], ask: impl FnOnce(Client) -> F) -> (String, T) {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::new(folder.path(), folder.path());
    block_on(async {
        let listener = UnixListener::bind(folders.socket()).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = read_head(&mut stream).await;
            for piece in pieces {
                // A client that has heard enough goes; what it made of that is the test's matter.
                if stream.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            head.lines().next().unwrap_or_default().to_owned()
        };
        tokio::join!(server, ask(Client::new(&folders)))
    })
}

async fn read_head(stream: &mut UnixStream) -> String {
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0, "the request ends in its head");
    }
    String::from_utf8(head).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n";
const PROGRESS: &[u8] = br#"{"event":"progress","step":"cutting","done":1,"total":2}"#;
const WARNING: &[u8] = br#"{"event":"warning","message":"no userfaultfd"}"#;
const DONE: &[u8] =
    br#"{"event":"done","result":{"environment":"pair","machines_stopped":2,"disks_kept":[],"disks_removed":[]}}"#;

fn down(pieces: &[&[u8]]) -> (Vec<Notice>, Result<DownReport, ClientError>) {
    let mut notices = Vec::new();
    let (_, result) = served(pieces, |client| {
        let notices = &mut notices;
        async move { client.down("pair", &DownRequest::default(), |notice| notices.push(notice)).await }
    });
    (notices, result)
}

#[test]
fn events_arrive_however_the_stream_is_cut() {
    let stream = [PROGRESS, b"\n\n", WARNING, b"\n", DONE, b"\n"].concat();
    let expected = [
        Notice::Progress(Progress {
            step: "cutting".to_owned(),
            done: Some(1),
            total: Some(2),
            unit: ProgressUnit::Items,
        }),
        Notice::Warning("no userfaultfd".to_owned()),
    ];
    for cut in [1, 7, PROGRESS.len(), PROGRESS.len() + 1, stream.len() - 1] {
        let (left, right) = stream.split_at(cut);
        let (notices, result) = down(&[STREAM_HEAD, left, right]);
        assert_eq!(notices, expected, "cut at {cut}");
        assert_eq!(result.unwrap().machines_stopped, 2);
    }
}

#[test]
fn a_stream_that_ends_early_is_never_a_success() {
    for end in [&b""[..], PROGRESS, &DONE[..DONE.len() - 1]] {
        let (_, result) = down(&[STREAM_HEAD, end]);
        assert!(matches!(result, Err(ClientError::Unfinished { .. })), "{result:?}");
    }
}

#[test]
fn a_last_line_without_its_line_feed_counts() {
    assert_eq!(down(&[STREAM_HEAD, DONE]).1.unwrap().environment.to_string(), "pair");
}

#[test]
fn a_failed_operation_is_the_agents_error() {
    let failed = br#"{"event":"failed","error":{"kind":"busy","message":"held by fork","hint":"wait"}}"#;
    let error = ApiError::from(down(&[STREAM_HEAD, failed, b"\n"]).1.unwrap_err());
    assert_eq!(error, ApiError::new(ErrorKind::Busy, "held by fork").hint("wait"));
}

#[test]
fn a_line_that_is_no_event_is_not_understood() {
    let (_, result) = down(&[STREAM_HEAD, b"{\"event\":\"party\"}\n", DONE, b"\n"]);
    assert!(matches!(result, Err(ClientError::NotUnderstood { status: 200, .. })), "{result:?}");
}

#[test]
fn errors_outside_a_stream_carry_the_agents_words() {
    let body = r#"{"error":{"kind":"not-found","message":"no environment is called pair"}}"#;
    let answer = format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let (_, result) = served(&[answer.as_bytes()], async |client| client.environment("pair").await);
    let error = ApiError::from(result.unwrap_err());
    assert_eq!(error, ApiError::new(ErrorKind::NotFound, "no environment is called pair"));

    let answer = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops";
    let (_, result) = served(&[answer], async |client| client.environment("pair").await);
    assert!(matches!(result, Err(ClientError::NotUnderstood { status: 500, .. })), "{result:?}");
}

#[test]
fn what_a_user_types_stays_one_part_of_the_path() {
    let answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
    let (line, _) =
        served(&[answer], async |client| client.diff_snapshots("../a b", "x?y=\u{e9}", Some("p&q")).await);
    assert_eq!(line, "GET /v1/snapshots/%2E%2E%2Fa%20b/diff/x%3Fy%3D%C3%A9?environment=p%26q HTTP/1.1");
}

#[test]
fn no_agent_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::new(folder.path(), folder.path());
    let ask = || block_on(Client::new(&folders).environments());
    assert!(matches!(ask(), Err(ClientError::NotRunning { .. })));
    // A socket whose agent has died.
    drop(std::os::unix::net::UnixListener::bind(folders.socket()).unwrap());
    assert!(matches!(ask(), Err(ClientError::NotRunning { .. })));
    std::fs::remove_file(folders.socket()).unwrap();
    std::fs::write(folders.runtime().join("file"), "").unwrap();
    let under_file = Client { via: Via::Socket(folders.runtime().join("file/agent.sock")) };
    assert!(matches!(block_on(under_file.environments()), Err(ClientError::Connect { .. })));
}

#[test]
fn a_dropped_request_closes_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::new(folder.path(), folder.path());
    block_on(async {
        let listener = UnixListener::bind(folders.socket()).unwrap();
        let client = Client::new(&folders);
        let request = CreateSnapshotRequest::default();
        let mut stream = {
            let asking = client.create_snapshot("pair", &request, |_| {});
            tokio::pin!(asking);
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                read_head(&mut stream).await;
                stream.write_all(STREAM_HEAD).await.unwrap();
                stream
            };
            tokio::select! {
                result = &mut asking => panic!("ended by itself: {result:?}"),
                stream = server => stream,
            }
        };
        let mut rest = Vec::new();
        // Ends only when the client has closed: a request that lived on would hang the test.
        let _ = stream.read_to_end(&mut rest).await;
    });
}

#[test]
fn a_console_carries_bytes_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let folders = Folders::new(folder.path(), folder.path());
    block_on(async {
        let listener = UnixListener::bind(folders.socket()).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = read_head(&mut stream).await.to_ascii_lowercase();
            assert!(head.contains("upgrade: diorama-console"), "{head}");
            stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: diorama-console\r\n\r\nlogin: ")
                .await
                .unwrap();
            let mut typed = [0; 5];
            stream.read_exact(&mut typed).await.unwrap();
            typed
        };
        let client = Client::new(&folders);
        let user = async {
            let mut console = client.console("pair", "server").await.unwrap();
            let mut prompt = [0; 7];
            console.read_exact(&mut prompt).await.unwrap();
            assert_eq!(&prompt, b"login: ");
            console.write_all(b"root\r").await.unwrap();
            console.flush().await.unwrap();
            console
        };
        let (typed, _console) = tokio::join!(server, user);
        assert_eq!(&typed, b"root\r");
    });
}

proptest! {
    #[test]
    fn lines_do_not_depend_on_chunks(chunks in proptest::collection::vec("[ab\n]{0,6}", 0..12)) {
        let whole = chunks.concat();
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for chunk in &chunks {
            lines.push(chunk.as_bytes());
            while let Some(line) = lines.next() {
                found.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        let mut expected: Vec<&str> = whole.split('\n').collect();
        let rest = expected.pop().unwrap();
        expected.retain(|line| !line.is_empty());
        prop_assert_eq!(found, expected);
        prop_assert_eq!(lines.waiting_bytes(), rest.len());
    }
}
