//! Founding and joining over real sockets, with tokens good and bad.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Extension;
use axum::routing::get;
use diorama_cluster::Directory;
use diorama_cluster::admission::{Admission, AdmissionError, JoinRefusal, MAX_TOKEN_USES, found, join};
use diorama_cluster::channel::{Lane, Peer, PeerError, Peers, Server};
use diorama_cluster::identity::tls::Tls;
use diorama_cluster::identity::{Credentials, JoinToken};
use diorama_cluster::renewal::{self, Renewal};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::etcd::{Etcd, free_address};
use crate::{LIMIT, options, shows};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// A host with its server.
struct Host {
    folder: PathBuf,
    credentials: Credentials,
    directory: Directory,
    tls: Tls,
    peers: Peers,
    admission: Option<Arc<Admission>>,
    address: SocketAddr,
    _end: oneshot::Sender<()>,
}

async fn whoami(Extension(peer): Extension<Peer>) -> String {
    format!("{} {}", peer.name, peer.host)
}

impl Host {
    async fn serve(
        folder: PathBuf,
        credentials: Credentials,
        directory: Directory,
        admission: Option<Admission>,
        listener: TcpListener,
    ) -> Self {
        directory.fresh(LIMIT).await.unwrap();
        let tls = Tls::new(&credentials, directory.members()).unwrap();
        let admission = admission.map(Arc::new);
        let mut router = Router::new().route("/whoami", get(whoami));
        if let Some(admission) = &admission {
            router = router.merge(renewal::routes(Arc::clone(admission)));
        }
        let (end, ended) = oneshot::channel::<()>();
        let address = listener.local_addr().unwrap();
        let server = Server::new(tls.clone(), admission.clone(), router);
        tokio::spawn(server.serve(listener, async { drop(ended.await) }));
        let peers = Peers::new(tls.clone());
        Self { folder, credentials, directory, tls, peers, admission, address, _end: end }
    }

    async fn first(etcd: &Etcd) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = vec![listener.local_addr().unwrap()];
        let folder = etcd.folder("first");
        let founded = found(&folder, "first".parse().unwrap(), addresses, &etcd.config(), options()).await;
        let (credentials, admission) = founded.unwrap();
        let directory =
            Directory::etcd(&etcd.config(), credentials.cluster(), credentials.host_id(), options()).unwrap();
        Self::serve(folder, credentials, directory, Some(admission), listener).await
    }

    async fn joining(etcd: &Etcd, name: &str, token: &JoinToken) -> Result<Self, AdmissionError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let folder = etcd.folder(name);
        let addresses = vec![listener.local_addr().unwrap()];
        let (credentials, config) = join(&folder, token, name.parse().unwrap(), addresses).await?;
        assert_eq!(config, etcd.config());
        let directory =
            Directory::etcd(&config, credentials.cluster(), credentials.host_id(), options()).unwrap();
        Ok(Self::serve(folder, credentials, directory, None, listener).await)
    }

    async fn token(&self, valid_for: Duration, uses: u32) -> JoinToken {
        self.admission.as_ref().unwrap().create_token(valid_for, uses, vec![self.address]).await.unwrap()
    }

    async fn asks(&self, other: &Host) -> Result<String, PeerError> {
        let request = hyper::Request::builder().uri("/whoami").body(axum::body::Body::empty()).unwrap();
        let response = self.peers.send(other.credentials.host_id(), Lane::Control, request).await?;
        assert_eq!(response.status(), 200);
        Ok(String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().into()).unwrap())
    }
}

fn refusal(result: Result<Host, AdmissionError>) -> JoinRefusal {
    match result {
        Err(AdmissionError::Refused(refusal)) => refusal,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was admitted"),
    }
}

#[tokio::test]
async fn a_host_joins_and_both_talk() {
    let etcd = Etcd::start();
    let first = Host::first(&etcd).await;
    let token = first.token(HOUR, 1).await;
    // As an operator carries it.
    let token: JoinToken = token.to_string().parse().unwrap();
    let second = Host::joining(&etcd, "second", &token).await.unwrap();
    let id = second.credentials.host_id();
    shows(&first.directory, "the new member", |view| view.members.get(id).is_some()).await;
    assert_eq!(second.asks(&first).await.unwrap(), format!("second {id}"));
    assert_eq!(first.asks(&second).await.unwrap(), format!("first {}", first.credentials.host_id()));
    let members = first.directory.view().members.clone();
    assert!(members.named("first").unwrap().issuer && !members.named("second").unwrap().issuer);
    assert_eq!(members.get(id).unwrap().addresses, [second.address]);

    // Its certificate is renewed over the channel, that of the issuer by itself.
    for host in [&second, &first] {
        let renewal = Renewal {
            folder: host.folder.clone(),
            tls: host.tls.clone(),
            peers: host.peers.clone(),
            admission: host.admission.clone(),
        };
        let renewed = renewal.renew(&host.credentials).await.unwrap();
        assert!(renewed.certificate().not_after > host.credentials.certificate().not_after);
        assert_eq!(renewed.host_id(), host.credentials.host_id());
    }
    assert!(Peers::new(second.tls.clone()).warm(first.credentials.host_id(), Lane::Bulk).await.is_ok());
    // The renewed issuer still speaks for the authority.
    Host::joining(&etcd, "third", &first.token(HOUR, 1).await).await.unwrap();

    // Removed, it is out at once, though its certificate is good.
    first.directory.remove_member(id).await.unwrap();
    assert!(second.asks(&first).await.is_err());
    assert_eq!(first.asks(&second).await, Err(PeerError::NotMember { host: id }));
    // Nor can it come back with what it has.
    let token = first.token(HOUR, 1).await;
    let again = Host::joining(&etcd, "second", &token).await;
    assert!(matches!(again, Err(AdmissionError::MemberAlready { .. })), "it first has to leave");
    Credentials::forget(&second.folder).unwrap();
    let again = Host::joining(&etcd, "second", &token).await.unwrap();
    assert_ne!(again.credentials.host_id(), id, "as another host");
}

#[tokio::test]
async fn tokens_that_are_not_good() {
    let etcd = Etcd::start();
    let first = Host::first(&etcd).await;
    let admission = first.admission.as_ref().unwrap();

    let expired = first.token(Duration::ZERO, 1).await;
    assert_eq!(refusal(Host::joining(&etcd, "a", &expired).await), JoinRefusal::TokenExpired);

    let once = first.token(HOUR, 1).await;
    Host::joining(&etcd, "b", &once).await.unwrap();
    assert_eq!(refusal(Host::joining(&etcd, "c", &once).await), JoinRefusal::TokenUsedUp);
    // The host that has used it and lost the answer is let in again.
    std::fs::remove_file(etcd.folder("b").join("host.json")).unwrap();
    Host::joining(&etcd, "b", &once).await.unwrap();

    let removed = first.token(HOUR, 1).await;
    // The token was made through another session with etcd: this one may see it a moment later.
    shows(&first.directory, "the token", |view| view.tokens.contains_key(&removed.id)).await;
    first.directory.remove_token(&removed.id).await.unwrap();
    assert_eq!(refusal(Host::joining(&etcd, "c", &removed).await), JoinRefusal::TokenUnknown);

    let (good, other) = (first.token(HOUR, 1).await, first.token(HOUR, 1).await);
    let mixed = good.to_string().replace(&good.id, &other.id).parse().unwrap();
    assert_eq!(refusal(Host::joining(&etcd, "c", &mixed).await), JoinRefusal::TokenUnknown, "a wrong secret");
    let taken = Host::joining(&etcd, "first", &good).await;
    // The folder `first` is the founder's: it is a member.
    assert!(matches!(taken, Err(AdmissionError::MemberAlready { .. })));
    let folder = etcd.folder("elsewhere");
    let taken = join(&folder, &good, "b".parse().unwrap(), vec![free_address()]).await.unwrap_err();
    assert!(matches!(taken, AdmissionError::Refused(JoinRefusal::NameTaken(_))), "{taken}");
    for addresses in [vec![], vec!["0.0.0.0:7440".parse().unwrap()], vec!["127.0.0.1:0".parse().unwrap()]] {
        let invalid = join(&folder, &good, "c".parse().unwrap(), addresses).await.unwrap_err();
        assert!(matches!(invalid, AdmissionError::Invalid(_)), "{invalid}");
    }
    // After all that it is still good for one.
    Host::joining(&etcd, "c", &good).await.unwrap();

    for (time, uses) in [(HOUR, 0), (HOUR, MAX_TOKEN_USES + 1), (31 * 24 * HOUR, 1)] {
        let made = admission.create_token(time, uses, vec![first.address]).await;
        assert!(matches!(made, Err(AdmissionError::Invalid(_))));
    }
    // None of the secrets is in etcd: what is there does not let anyone in.
    let view = first.directory.view();
    let shown = format!("{:?}", view.tokens);
    let text = other.to_string();
    assert!(!shown.contains(text.split('.').nth(2).unwrap()), "{shown}");
}

#[tokio::test]
async fn many_join_with_one_token_at_once() {
    let etcd = Etcd::start();
    let first = Host::first(&etcd).await;
    let token = first.token(HOUR, 5).await;
    let mut joins = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (folder, token) = (etcd.folder(&format!("n{number}")), token.clone());
        joins.spawn(async move {
            join(&folder, &token, format!("n{number}").parse().unwrap(), vec!["127.0.0.1:1".parse().unwrap()])
                .await
        });
    }
    let results = joins.join_all().await;
    let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(results.len() - refused.len(), 5, "{refused:?}");
    for error in refused {
        assert!(matches!(error, AdmissionError::Refused(JoinRefusal::TokenUsedUp)), "{error}");
    }
    assert_eq!(first.directory.view().members.len(), 6);
}

#[tokio::test]
async fn a_joining_host_shows_its_token_to_the_cluster_alone() {
    let etcd = Etcd::start();
    let first = Host::first(&etcd).await;
    let second = Host::joining(&etcd, "second", &first.token(HOUR, 1).await).await.unwrap();

    // Another cluster at the address.
    let other_etcd = Etcd::start();
    let other = Host::first(&other_etcd).await;
    let mut token = first.token(HOUR, 1).await;
    token.addresses = vec![other.address];
    let error = Host::joining(&etcd, "third", &token).await.err().expect("not admitted").to_string();
    assert!(error.contains("not an issuer of the token's cluster"), "{error}");
    // A member that is no issuer does not get to see it either.
    token.addresses = vec![second.address];
    let error = Host::joining(&etcd, "third", &token).await.err().expect("not admitted").to_string();
    assert!(error.contains("not an issuer of the token's cluster"), "{error}");
    // Nobody there, then the right one.
    token.addresses = vec![free_address(), second.address, first.address];
    Host::joining(&etcd, "third", &token).await.unwrap();
}

#[tokio::test]
async fn hostile_requests_to_join() {
    let etcd = Etcd::start();
    let first = Host::first(&etcd).await;
    for (request, status) in [
        ("POST /v1/cluster/join HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}".to_owned(), "403"),
        ("GET /whoami HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "403"),
        ("POST /v1/cluster/renew HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".to_owned(), "403"),
        (
            format!(
                "POST /v1/cluster/join HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{}",
                "x".repeat(9000)
            ),
            "403",
        ),
        ("\0\0\0\0\r\n\r\n".to_owned(), "400"),
    ] {
        let mut stream = joining_stream(first.address).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 2000];
        let length =
            tokio::time::timeout(LIMIT, stream.read(&mut answer)).await.expect("it answers").unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:.40}: {answer}");
        assert!(!answer.contains("first "), "{answer}");
    }
    Host::joining(&etcd, "second", &first.token(HOUR, 1).await).await.unwrap();
}

/// A stranger that trusts whoever answers, and speaks the protocol to join.
async fn joining_stream(address: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
    #[derive(Debug)]
    struct Blind(rustls::crypto::WebPkiSupportedAlgorithms);
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    impl ServerCertVerifier for Blind {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.supported_schemes()
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Blind(algorithms)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"diorama-join/1".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect("issuer.diorama.internal".try_into().unwrap(), stream).await.unwrap()
}

#[tokio::test]
async fn a_cluster_is_founded_once_and_goes_on_from_half_way() {
    let mut etcd = Etcd::absent();
    let folder = etcd.folder("first");
    let name = || "first".parse().unwrap();
    let address = || vec![free_address()];
    let failed = found(&folder, name(), address(), &etcd.config(), options()).await;
    assert!(failed.is_err(), "etcd is not there");
    assert!(Credentials::open(&folder).unwrap().is_none());
    etcd.start_again();
    let (credentials, _admission) =
        found(&folder, name(), address(), &etcd.config(), options()).await.unwrap();
    let again = found(&folder, name(), address(), &etcd.config(), options()).await;
    assert!(matches!(again, Err(AdmissionError::MemberAlready { .. })));
    // It was killed before it wrote its certificate.
    std::fs::remove_file(folder.join("host.json")).unwrap();
    let (again, _admission) = found(&folder, name(), address(), &etcd.config(), options()).await.unwrap();
    assert_eq!((again.host_id(), again.cluster()), (credentials.host_id(), credentials.cluster()));
}
