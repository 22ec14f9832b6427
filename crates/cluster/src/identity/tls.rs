//! TLS between hosts: version 1.3, certificates on both sides, and both sides members.
//!
//! A connection is let through when the certificate is the authority's, is good now, and the host of its key is among the
//! [`Members`] at that moment. There is no resumption: every connection asks anew, so that a host which was removed gets
//! none. (Connections that it had are ended by [`crate::channel`].)
//!
//! One thing may be asked without a certificate: to join. It goes by a protocol of its own (ALPN), with a configuration
//! of its own, and so can never reach what is for members.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::sync::watch;

use super::{Credentials, Fingerprint, HostId, Members, PublicKey};

/// HTTP/2 among members: requests and streams.
pub const ALPN_HTTP2: &[u8] = b"h2";
/// HTTP/1.1 among members: one request that takes the connection over, such as a console.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// To join, without a certificate.
pub const ALPN_JOIN: &[u8] = b"diorama-join/1";

/// In the certificates of hosts that hold the authority's key.
pub(crate) const ISSUER_DNS_NAME: &str = "issuer.diorama.internal";

/// What a host's certificate calls it.
pub(crate) fn host_dns_name(id: HostId) -> String {
    format!("{id}.host.diorama.internal")
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("TLS cannot be set up: {0}")]
pub struct TlsError(String);

impl TlsError {
    fn new(error: impl fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// One host's TLS. Cheap to clone; all clones follow the members and the renewed certificate.
#[derive(Clone)]
pub struct Tls {
    host: HostId,
    members: watch::Receiver<Arc<Members>>,
    certificate: Arc<CurrentCertificate>,
    server: Arc<ServerConfig>,
    join: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    client_http1: Arc<ClientConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Tls {
    /// With these credentials, among these members.
    ///
    /// # Errors
    /// When the credentials' certificates cannot be used.
    pub fn new(credentials: &Credentials, members: watch::Receiver<Arc<Members>>) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from(credentials.certificate().authority.clone()))
            .map_err(TlsError::new)?;
        let roots = Arc::new(roots);
        let certificate = Arc::new(CurrentCertificate(RwLock::new(in_use(credentials)?)));
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(TlsError::new)?;
        let servers =
            WebPkiServerVerifier::builder_with_provider(roots, provider()).build().map_err(TlsError::new)?;

        let mut server = server_builder()?
            .with_client_cert_verifier(Arc::new(OnlyMembers { chain: clients, members: members.clone() }))
            .with_cert_resolver(Arc::clone(&certificate) as _);
        without_resumption(&mut server);
        server.alpn_protocols = vec![ALPN_HTTP2.to_vec(), ALPN_HTTP1.to_vec()];
        let mut join =
            server_builder()?.with_no_client_auth().with_cert_resolver(Arc::clone(&certificate) as _);
        without_resumption(&mut join);
        join.alpn_protocols = vec![ALPN_JOIN.to_vec()];

        let verifier = Arc::new(OnlyMembers { chain: servers, members: members.clone() });
        let mut client = client_builder()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::clone(&certificate) as _);
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
        let mut client_http1 = client.clone();
        client_http1.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        Ok(Self {
            host: credentials.host_id(),
            members,
            certificate,
            server: Arc::new(server),
            join: Arc::new(join),
            client: Arc::new(client),
            client_http1: Arc::new(client_http1),
        })
    }

    /// Uses a renewed certificate for the connections to come.
    ///
    /// # Errors
    /// When it cannot be used, or is another host's; the one before stays then.
    pub fn renew(&self, credentials: &Credentials) -> Result<(), TlsError> {
        if credentials.host_id() != self.host {
            return Err(TlsError::new("the renewed certificate is another host's"));
        }
        let renewed = in_use(credentials)?;
        *self.certificate.0.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        Ok(())
    }

    /// This host.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// Until when the certificate that it uses is good.
    pub fn certificate_until(&self) -> jiff::Timestamp {
        self.certificate.0.read().unwrap_or_else(PoisonError::into_inner).until
    }

    /// Who belongs to the cluster.
    pub fn members(&self) -> &watch::Receiver<Arc<Members>> {
        &self.members
    }

    /// For connections from members.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For connections from hosts that want to join.
    pub fn join_server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.join)
    }

    /// For HTTP/2 connections to members.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// For HTTP/1.1 connections to members.
    pub fn client_http1(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client_http1)
    }

    /// The name by which TLS asks for a host.
    pub fn server_name(id: HostId) -> ServerName<'static> {
        ServerName::try_from(host_dns_name(id)).expect("digits and constants make a DNS name")
    }
}

/// The TLS of a host that wants to join the cluster of this authority, and knows no more of it.
pub(crate) fn joining_client(authority: Fingerprint) -> Result<ClientConfig, TlsError> {
    let mut client = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(OnlyIssuers { authority, algorithms: algorithms() }))
        .with_no_client_auth();
    client.resumption = Resumption::disabled();
    client.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    Ok(client)
}

/// What a joining host asks for: it knows no id yet.
pub(crate) fn issuer_name() -> ServerName<'static> {
    ServerName::try_from(ISSUER_DNS_NAME).expect("a constant")
}

/// The public key in a certificate; `None` when it is no certificate, or of another kind of key.
pub(crate) fn public_key(certificate: &CertificateDer<'_>) -> Option<PublicKey> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    PublicKey::from_spki(&certificate.subject_public_key_info())
}

/// Whether a certificate is for an issuer.
pub(crate) fn names_issuer(certificate: &CertificateDer<'_>) -> bool {
    webpki::EndEntityCert::try_from(certificate)
        .is_ok_and(|certificate| certificate.verify_is_valid_for_subject_name(&issuer_name()).is_ok())
}

/// Whether the authority gave this certificate, it is good now, and is for this name.
pub(crate) fn check_issued(
    leaf: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
    dns_name: &str,
) -> Result<(), rustls::Error> {
    let wrong = |_| rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    let anchor = webpki::anchor_from_trusted_cert(authority).map_err(wrong)?;
    let leaf = webpki::EndEntityCert::try_from(leaf)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
    leaf.verify_for_usage(
        &[webpki::ring::ED25519],
        &[anchor],
        &[],
        UnixTime::now(),
        webpki::KeyUsage::server_auth(),
        None,
        None,
    )
    .map_err(wrong)?;
    let name = ServerName::try_from(dns_name)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::NotValidForName))?;
    leaf.verify_is_valid_for_subject_name(&name)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::NotValidForName))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

fn server_builder() -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, TlsError> {
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::new)
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TlsError> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::new)
}

fn without_resumption(config: &mut ServerConfig) {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
}

fn in_use(credentials: &Credentials) -> Result<InUse, TlsError> {
    let certificate = credentials.certificate();
    let chain = vec![
        CertificateDer::from(certificate.der.clone()),
        // The authority's as well: a host that joins knows but its fingerprint.
        CertificateDer::from(certificate.authority.clone()),
    ];
    let key =
        provider().key_provider.load_private_key(credentials.key().private_der()).map_err(TlsError::new)?;
    Ok(InUse { key: Arc::new(CertifiedKey::new(chain, key)), until: certificate.not_after })
}

struct InUse {
    key: Arc<CertifiedKey>,
    until: jiff::Timestamp,
}

/// This host's certificate, which a renewal replaces.
struct CurrentCertificate(RwLock<InUse>);

impl CurrentCertificate {
    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner).key)
    }
}

impl fmt::Debug for CurrentCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CurrentCertificate")
    }
}

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

impl ResolvesClientCert for CurrentCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// First the chain, by webpki; then membership.
struct OnlyMembers<V: ?Sized> {
    members: watch::Receiver<Arc<Members>>,
    chain: Arc<V>,
}

impl<V: ?Sized> OnlyMembers<V> {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let id = public_key(certificate)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?
            .host_id();
        match self.members.borrow().get(id) {
            Some(_) => Ok(()),
            None => {
                tracing::warn!(host = %id, "a host that is not a member of the cluster was refused");
                Err(rustls::Error::InvalidCertificate(CertificateError::Revoked))
            }
        }
    }
}

impl<V: ?Sized> fmt::Debug for OnlyMembers<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnlyMembers")
    }
}

impl ClientCertVerifier for OnlyMembers<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl ServerCertVerifier for OnlyMembers<WebPkiServerVerifier> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        self.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// For a host that joins: the other side shows the authority's certificate of the known fingerprint, and one by it that
/// names an issuer.
#[derive(Debug)]
struct OnlyIssuers {
    authority: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for OnlyIssuers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.authority)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        check_issued(end_entity, authority, ISSUER_DNS_NAME)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A client that trusts any server, for hostile tests.
#[cfg(test)]
pub(crate) fn blind_client(credentials: Option<&Credentials>, alpn: &[&[u8]]) -> ClientConfig {
    #[derive(Debug)]
    struct Blind;

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
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    }

    let builder = client_builder().unwrap().dangerous().with_custom_certificate_verifier(Arc::new(Blind));
    let mut client = match credentials {
        Some(credentials) => {
            let certificate = CurrentCertificate(RwLock::new(in_use(credentials).unwrap()));
            builder.with_client_cert_resolver(Arc::new(certificate))
        }
        None => builder.with_no_client_auth(),
    };
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    client
}
