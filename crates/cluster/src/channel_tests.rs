//! The channel over real sockets on loopback, without a directory: the tests say who is a member.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request};
use axum::routing::{get, post};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot, watch};
use tokio_stream::StreamExt;

use super::*;
use crate::identity::tls::{ALPN_HTTP2, Tls};
use crate::identity::{Authority, Credentials, HostKey, Member, Members};

const LIMIT: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

struct World {
    folder: tempfile::TempDir,
    authority: Authority,
    members: watch::Sender<Arc<Members>>,
}

struct Host {
    credentials: Credentials,
    tls: Tls,
    peers: Peers,
}

impl Host {
    fn id(&self) -> HostId {
        self.credentials.host_id()
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path()).unwrap();
        Self { folder, authority, members: watch::channel(Arc::default()).0 }
    }

    fn credentials(&self, authority: &Authority, name: &str, until: SystemTime) -> Credentials {
        let folder = self.folder.path().join(name);
        let key = HostKey::open_or_create(&folder).unwrap();
        let name: diorama_topology::HostName = name.parse().unwrap();
        let certificate =
            authority.issue_for(&name, key.public(), false, SystemTime::now() - DAY, until).unwrap();
        Credentials::store(&folder, name, authority.fingerprint(), certificate).unwrap()
    }

    fn host_with(&self, credentials: Credentials) -> Host {
        let tls = Tls::new(&credentials, self.members.subscribe()).unwrap();
        Host { credentials, peers: Peers::new(tls.clone()), tls }
    }

    /// A host that the authority has given a certificate, member or not.
    fn host(&self, name: &str) -> Host {
        self.host_with(self.credentials(&self.authority, name, SystemTime::now() + DAY))
    }

    fn admit(&self, host: &Host, address: SocketAddr) {
        self.members.send_modify(|members| {
            Arc::make_mut(members).insert(Member {
                id: host.id(),
                name: host.credentials.name().clone(),
                addresses: vec![address],
                issuer: false,
                draining: false,
                joined: jiff::Timestamp::now(),
            });
        });
    }

    fn remove(&self, host: HostId) {
        self.members.send_modify(|members| {
            Arc::make_mut(members).remove(host);
        });
    }

    /// A member that serves this router, until the returned end is dropped.
    async fn serve(&self, host: &Host, router: Router) -> (SocketAddr, oneshot::Sender<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.serve_on(host, router, listener)
    }

    fn serve_on(
        &self,
        host: &Host,
        router: Router,
        listener: TcpListener,
    ) -> (SocketAddr, oneshot::Sender<()>) {
        let address = listener.local_addr().unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let server = Server::new(host.tls.clone(), None, router);
        tokio::spawn(server.serve(listener, async { drop(ended.await) }));
        self.admit(host, address);
        (address, end)
    }
}

/// Answers with who asked and what.
struct Echo;

impl MessageHandler for Echo {
    fn handle<'a>(
        &'a self,
        peer: &'a Peer,
        kind: &'a str,
        body: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Refusal>> + Send + 'a>> {
        Box::pin(async move {
            match kind {
                "echo" => Ok(Bytes::from([peer.name.as_bytes(), b":", &body].concat())),
                "hang" => std::future::pending().await,
                _ => Err(Refusal { kind: "unknown".into(), message: format!("no `{kind}` here") }),
            }
        })
    }
}

fn echo() -> Router {
    messages(Arc::new(Echo))
}

async fn call(from: &Host, to: &Host, body: &'static [u8]) -> Result<Bytes, PeerError> {
    from.peers.call(to.id(), "echo", body, LIMIT).await
}

#[tokio::test]
async fn messages_go_both_ways_and_say_who_sent_them() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (_, _end_a) = world.serve(&a, echo()).await;
    let (_, _end_b) = world.serve(&b, echo()).await;
    assert_eq!(call(&a, &b, b"hello").await.unwrap(), "a:hello");
    assert_eq!(call(&b, &a, b"").await.unwrap(), "b:");
    let refused = a.peers.call(b.id(), "other", "", LIMIT).await.unwrap_err();
    let refusal = Refusal { kind: "unknown".into(), message: "no `other` here".into() };
    assert_eq!(refused, PeerError::Refused { name: "b".into(), refusal });
    let short = Duration::from_millis(50);
    assert_eq!(
        a.peers.call(b.id(), "hang", "", short).await.unwrap_err(),
        PeerError::TimedOut { name: "b".into(), limit: short }
    );
    assert_eq!(call(&a, &b, b"again").await.unwrap(), "a:again");
    let long = vec![7; MESSAGE_BYTES_MAX - 2];
    assert_eq!(a.peers.call(b.id(), "echo", long, LIMIT).await.unwrap().len(), MESSAGE_BYTES_MAX);
    let too_long = vec![7; MESSAGE_BYTES_MAX + 1];
    let error = a.peers.call(b.id(), "echo", too_long, LIMIT).await.unwrap_err();
    assert_eq!(error, PeerError::TooLong { bytes: MESSAGE_BYTES_MAX + 1 });
}

#[tokio::test]
async fn many_messages_share_a_connection() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (_, _end) = world.serve(&b, echo()).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..400 {
        let (peers, host) = (a.peers.clone(), b.id());
        calls.spawn(async move { peers.call(host, "echo", format!("{number}"), LIMIT).await.unwrap() });
    }
    let mut answers: Vec<Bytes> = calls.join_all().await;
    answers.sort();
    answers.dedup();
    assert_eq!(answers.len(), 400);
}

#[tokio::test]
async fn who_is_not_a_member_is_refused_by_both_sides() {
    let world = World::new();
    let (a, b, stranger) = (world.host("a"), world.host("b"), world.host("stranger"));
    let (address, _end) = world.serve(&b, echo()).await;
    // The authority's certificate alone does not do.
    let error = call(&stranger, &b, b"x").await.unwrap_err();
    assert!(matches!(error, PeerError::Lost { .. } | PeerError::Unreachable { .. }), "{error}");
    assert_eq!(call(&b, &stranger, b"x").await.unwrap_err(), PeerError::NotMember { host: stranger.id() });
    // A host that answers in the place of another is not taken for it, though both are members.
    world.admit(&a, address);
    let error = call(&b, &a, b"x").await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    // Nor one that a client takes for a member and that has been removed.
    let (_, _end_stranger) = world.serve(&stranger, echo()).await;
    assert_eq!(call(&a, &stranger, b"x").await.unwrap(), "a:x");
    world.remove(stranger.id());
    assert!(call(&a, &stranger, b"x").await.is_err());
}

#[tokio::test]
async fn certificates_of_another_authority_or_time_are_refused() {
    let world = World::new();
    let other = World::new();
    let b = world.host("b");
    let (address, _end) = world.serve(&b, echo()).await;
    // The same key would even be a member: its certificate is another authority's.
    let forged = world.credentials(&other.authority, "forged", SystemTime::now() + DAY);
    let members = other.members.subscribe();
    other.members.send_replace(Arc::new(world.members.borrow().iter().cloned().collect()));
    let tls = Tls::new(&forged, members).unwrap();
    let forger = Host { peers: Peers::new(tls.clone()), tls, credentials: forged };
    world.admit(&forger, address);
    let error = call(&forger, &b, b"x").await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "the client refuses the server: {error}");
    // And the server refuses a client that looks away.
    assert_refused(address, Some(&forger.credentials)).await;
    assert_refused(address, None).await;

    let expired = world.host("expired");
    world.admit(&expired, address);
    assert_eq!(call(&expired, &b, b"x").await.unwrap(), "expired:x");
    let key = HostKey::open_or_create(&world.folder.path().join("expired")).unwrap().public();
    let name = expired.credentials.name().clone();
    let past = SystemTime::now() - Duration::from_secs(60);
    let ended = world.authority.issue_for(&name, key, false, past - DAY, past).unwrap();
    let folder = world.folder.path().join("expired");
    let fingerprint = world.authority.fingerprint();
    assert!(Credentials::store(&folder, name.clone(), fingerprint, ended.clone()).is_err(), "not kept");
    let ended = Credentials::unchecked(&folder, name.clone(), ended);
    expired.tls.renew(&ended).unwrap();
    let late = Peers::new(expired.tls.clone());
    assert!(late.call(b.id(), "echo", "x", LIMIT).await.is_err(), "its time is over");
    // A renewed certificate does for the connections to come.
    let renewed = world.authority.issue(&name, key, false, SystemTime::now()).unwrap();
    expired.tls.renew(&Credentials::store(&folder, name, fingerprint, renewed).unwrap()).unwrap();
    let again = Peers::new(expired.tls.clone());
    assert_eq!(again.call(b.id(), "echo", "x", LIMIT).await.unwrap(), "expired:x");
    assert!(expired.tls.renew(&b.credentials).is_err(), "another host's certificate");
}

/// A client that trusts anyone, with this certificate or none, gets no answer.
async fn assert_refused(address: SocketAddr, credentials: Option<&Credentials>) {
    let config = crate::identity::tls::blind_client(credentials, &[ALPN_HTTP2]);
    let stream = TcpStream::connect(address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    // In TLS 1.3 the client has finished before the server has looked at its certificate.
    if let Ok(mut stream) = connector.connect("x.example".try_into().unwrap(), stream).await {
        let mut first = [0; 1];
        let read = tokio::time::timeout(LIMIT, stream.read(&mut first)).await.expect("the server closes");
        assert!(matches!(read, Err(_) | Ok(0)), "the server answers");
    }
}

#[tokio::test]
async fn strangers_bytes_do_no_harm() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (address, _end) = world.serve(&b, echo()).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01, 0xff, 0xff, 0xff],
        &[0xff; 70_000],
        &[],
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // It may hang up before it has read all.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("it hangs up");
        assert!(answer.len() < 100, "an alert at most");
    }
    // One that says nothing holds nobody up.
    let _silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(call(&a, &b, b"x").await.unwrap(), "a:x");
}

#[tokio::test]
async fn a_removed_host_is_cut_off_at_once() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (_, _end) = world.serve(&b, echo()).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    assert_eq!(call(&a, &b, b"x").await.unwrap(), "a:x");
    // A call that is under way ends when the host is removed, though nobody answers it.
    let (peers, host) = (a.peers.clone(), b.id());
    let hanging = tokio::spawn(async move { peers.call(host, "hang", "", 10 * LIMIT).await });
    assert_eq!(call(&a, &b, b"y").await.unwrap(), "a:y");
    world.remove(a.id());
    let ended = tokio::time::timeout(LIMIT, hanging).await.expect("it ends").unwrap();
    assert!(matches!(ended, Err(PeerError::Lost { .. })), "{ended:?}");
    assert!(call(&a, &b, b"x").await.is_err());
}

#[tokio::test]
async fn a_host_that_comes_back_is_reached_again() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (address, end) = world.serve(&b, echo()).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    assert_eq!(call(&a, &b, b"x").await.unwrap(), "a:x");
    drop(end);
    // Until nobody listens there.
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let error = call(&a, &b, b"x").await.unwrap_err();
    assert!(matches!(error, PeerError::Unreachable { .. } | PeerError::Lost { .. }), "{error}");
    let (_, _end) = world.serve_on(&b, echo(), TcpListener::bind(address).await.unwrap());
    let reached = tokio::time::timeout(LIMIT, async {
        while call(&a, &b, b"x").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    reached.await.expect("it is reached again");
}

#[tokio::test]
async fn a_silent_peer_is_found_dead() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (address, _end) = world.serve(&b, echo()).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    // A wire that can be cut without either end hearing of it.
    let wire = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.admit(&b, wire.local_addr().unwrap());
    let cut = Arc::new(Notify::new());
    let cutting = Arc::clone(&cut);
    tokio::spawn(async move {
        let (mut near, _) = wire.accept().await.unwrap();
        let mut far = TcpStream::connect(address).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = cutting.notified() => {}
        }
        std::future::pending::<()>().await;
    });
    assert_eq!(call(&a, &b, b"x").await.unwrap(), "a:x");
    cut.notify_one();
    let error = a.peers.call(b.id(), "echo", "y", LIMIT).await.unwrap_err();
    assert!(
        matches!(error, PeerError::Lost { .. }),
        "found by keep-alives, not by the caller's limit: {error}"
    );
}

#[tokio::test]
async fn a_slow_reader_holds_the_sender_back() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    const PART: usize = 64 << 10;
    const PARTS: usize = 1024;
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let router = echo().route(
        "/bulk",
        get(move || async move {
            let parts = tokio_stream::iter(0..PARTS).map(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok::<_, Infallible>(Bytes::from(vec![1; PART]))
            });
            Body::from_stream(parts)
        }),
    );
    let (_, _end) = world.serve(&b, router).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    let request = Request::builder().uri("/bulk?x=1").body(Body::empty()).unwrap();
    let mut response = a.peers.send(b.id(), Lane::Bulk, request).await.unwrap().into_body();
    // Nothing is read: meanwhile messages go through, and what is made does not grow without end.
    for _ in 0..200 {
        assert_eq!(call(&a, &b, b"x").await.unwrap(), "a:x");
    }
    let waiting = made.load(Ordering::Relaxed) * PART;
    assert!(waiting <= 4 * STREAM_WINDOW_BYTES as usize, "{waiting} bytes wait");
    let mut read = 0;
    while let Some(frame) = response.frame().await {
        read += frame.unwrap().into_data().map_or(0, |data| data.len());
    }
    assert_eq!((read, made.load(Ordering::Relaxed)), (PART * PARTS, PARTS));
}

#[tokio::test]
async fn a_dropped_request_is_cancelled() {
    struct Dropped(Option<oneshot::Sender<()>>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            let _ = self.0.take().unwrap().send(());
        }
    }
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    let (dropped, cancelled) = oneshot::channel();
    let slot = Arc::new(std::sync::Mutex::new(Some(dropped)));
    let has_begun = Arc::new(Notify::new());
    let noted = Arc::clone(&has_begun);
    let router = Router::new().route(
        "/long",
        post(move || {
            let guard = Dropped(slot.lock().unwrap().take());
            let noted = Arc::clone(&noted);
            async move {
                let _guard = guard;
                noted.notify_one();
                std::future::pending::<()>().await;
            }
        }),
    );
    let (_, _end) = world.serve(&b, router).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    let request = Request::builder().method("POST").uri("/long").body(Body::empty()).unwrap();
    tokio::select! {
        answer = a.peers.send(b.id(), Lane::Control, request) => panic!("an answer: {answer:?}"),
        () = has_begun.notified() => {}
    }
    tokio::time::timeout(LIMIT, cancelled).await.expect("the handler is dropped").unwrap();
}

#[tokio::test]
async fn a_connection_is_taken_over() {
    let world = World::new();
    let (a, b) = (world.host("a"), world.host("b"));
    async fn upgrade(Extension(peer): Extension<Peer>, request: Request) -> axum::response::Response {
        tokio::spawn(async move {
            let upgraded = hyper::upgrade::on(request).await.unwrap();
            let mut stream = hyper_util::rt::TokioIo::new(upgraded);
            stream.write_all(format!("hello {}\n", peer.name).as_bytes()).await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
        axum::response::Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "test")
            .body(Body::empty())
            .unwrap()
    }
    let (_, _end) = world.serve(&b, Router::new().route("/console", get(upgrade))).await;
    world.admit(&a, "127.0.0.1:1".parse().unwrap());
    let request = |path: &str| {
        Request::builder()
            .uri(path)
            .header("connection", "upgrade")
            .header("upgrade", "test")
            .body(Body::empty())
            .unwrap()
    };
    let (response, stream) = a.peers.send_upgradable(b.id(), request("/other")).await.unwrap();
    assert!(stream.is_none() && response.status() == 404);
    let (_, stream) = a.peers.send_upgradable(b.id(), request("/console")).await.unwrap();
    let mut stream = stream.expect("taken over");
    stream.write_all(b"echo").await.unwrap();
    let mut read = [0; 12];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut read)).await.unwrap().unwrap();
    assert_eq!(&read, b"hello a\necho");
    // A console of a host that is removed ends as well.
    world.remove(a.id());
    let ended = tokio::time::timeout(LIMIT, stream.read(&mut read)).await.expect("it ends");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}
