//! The cluster's certificate authority: a key, and a certificate that it signed for itself.
//!
//! The first host makes it; only hosts that have its files (issuers) admit others. It never leaves them by itself.

use std::path::Path;
use std::time::{Duration, SystemTime};

use diorama_topology::HostName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SignatureAlgorithm,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{Fingerprint, HostId, PublicKey, tls};
use crate::private_file::{self, FileError};

/// How long a host's certificate is good for.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How much earlier than now certificates begin: hosts' clocks may be wrong by hours.
const BACKDATED: Duration = Duration::from_secs(24 * 60 * 60);
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);

const FILE: &str = "authority.json";
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why there is no authority, or no certificate of it.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// There is one already.
    #[error("{folder} has an authority already")]
    Exists {
        /// The folder.
        folder: String,
    },
    /// There is none.
    #[error("{folder} has no authority: only the hosts that have one admit others and renew certificates")]
    Missing {
        /// The folder.
        folder: String,
    },
    /// Its file is not what was written.
    #[error("the authority's file in {folder} is damaged: {problem}")]
    Damaged {
        /// The folder.
        folder: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Its file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Keys or certificates cannot be made.
    #[error("cannot make a key or a certificate: {0}")]
    Crypto(String),
}

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}

/// A certificate that the authority gave a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The certificate, DER in base64.
    #[serde(with = "crate::base64_bytes")]
    pub der: Vec<u8>,
    /// The authority's own, DER in base64.
    #[serde(with = "crate::base64_bytes")]
    pub authority: Vec<u8>,
    /// From when on it is good.
    pub not_before: jiff::Timestamp,
    /// Until when it is good.
    pub not_after: jiff::Timestamp,
}

/// The authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    /// What its certificate calls it: unique, so that no chain can be taken for another cluster's.
    name: String,
    key: String,
    #[serde(with = "crate::base64_bytes")]
    certificate: Vec<u8>,
}

impl Authority {
    /// Makes a new authority and writes it into the folder.
    ///
    /// # Errors
    /// When the folder has one already, cannot be written, or there is no randomness.
    pub fn create(folder: &Path) -> Result<Self, AuthorityError> {
        let path = folder.join(FILE);
        if path.exists() {
            return Err(AuthorityError::Exists { folder: folder.display().to_string() });
        }
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let name = format!("Diorama cluster {}", super::to_hex(&random::<8>()?));
        let now = SystemTime::now();
        let mut params = authority_params(&name);
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + AUTHORITY_LIFETIME).into();
        let certificate = params.self_signed(&key)?.der().clone();
        let file = File { name, key: key.serialize_pem(), certificate: certificate.to_vec() };
        private_file::write(&path, &serde_json::to_vec_pretty(&file).expect("strings serialise"))?;
        Ok(Self { issuer: Issuer::new(authority_params(&file.name), key), certificate })
    }

    /// Reads the folder's authority.
    ///
    /// # Errors
    /// When there is none, or it cannot be read or understood.
    pub fn open(folder: &Path) -> Result<Self, AuthorityError> {
        let shown = || folder.display().to_string();
        let damaged = |problem: String| AuthorityError::Damaged { folder: shown(), problem };
        let bytes = private_file::read(&folder.join(FILE), FILE_BYTES_MAX)?
            .ok_or_else(|| AuthorityError::Missing { folder: shown() })?;
        let file: File = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let key = KeyPair::from_pem(&file.key).map_err(|error| damaged(error.to_string()))?;
        let certificate = CertificateDer::from(file.certificate);
        let of_certificate = tls::public_key(&certificate).map(|key| key.0.to_vec());
        if of_certificate.as_deref() != Some(key.public_key_raw()) {
            return Err(damaged("the key is not the certificate's".to_owned()));
        }
        Ok(Self { issuer: Issuer::new(authority_params(&file.name), key), certificate })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What names the cluster.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// A certificate for a host, from now on for [`CERTIFICATE_LIFETIME`]. With `issuer`, it also says that the host speaks
    /// for the authority: hosts that join trust no other with their token.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn issue(
        &self,
        name: &HostName,
        key: PublicKey,
        issuer: bool,
        now: SystemTime,
    ) -> Result<Certificate, AuthorityError> {
        self.issue_for(name, key, issuer, now - BACKDATED, now + CERTIFICATE_LIFETIME)
    }

    /// A certificate with any validity.
    pub(crate) fn issue_for(
        &self,
        name: &HostName,
        key: PublicKey,
        issuer: bool,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Certificate, AuthorityError> {
        let id: HostId = key.host_id();
        let mut names = vec![tls::host_dns_name(id)];
        if issuer {
            names.push(tls::ISSUER_DNS_NAME.to_owned());
        }
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("{name} {id}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let certificate = params.signed_by(&Ed25519(key), &self.issuer)?;
        let timestamp = |time: SystemTime| {
            jiff::Timestamp::try_from(time).map_err(|error| AuthorityError::Crypto(error.to_string()))
        };
        Ok(Certificate {
            der: certificate.der().to_vec(),
            authority: self.certificate.to_vec(),
            not_before: timestamp(not_before)?,
            not_after: timestamp(not_after)?,
        })
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    let no_randomness = |_| AuthorityError::Crypto("the system gave no random bytes".to_owned());
    SystemRandom::new().fill(&mut bytes).map_err(no_randomness)?;
    Ok(bytes)
}

struct Ed25519(PublicKey);

impl PublicKeyData for Ed25519 {
    fn der_bytes(&self) -> &[u8] {
        &self.0.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_made_once_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Authority::open(folder.path()), Err(AuthorityError::Missing { .. })));
        let made = Authority::create(folder.path()).unwrap();
        assert!(matches!(Authority::create(folder.path()), Err(AuthorityError::Exists { .. })));
        let read = Authority::open(folder.path()).unwrap();
        assert_eq!(made.fingerprint(), read.fingerprint());
        let other = tempfile::tempdir().unwrap();
        assert_ne!(Authority::create(other.path()).unwrap().fingerprint(), read.fingerprint());
        // The key of another authority is no key to this certificate.
        let content = |folder: &Path| -> File {
            serde_json::from_slice(&std::fs::read(folder.join(FILE)).unwrap()).unwrap()
        };
        let mixed = File { key: content(other.path()).key, ..content(folder.path()) };
        private_file::write(&folder.path().join(FILE), &serde_json::to_vec(&mixed).unwrap()).unwrap();
        assert!(matches!(Authority::open(folder.path()), Err(AuthorityError::Damaged { .. })));
        private_file::write(&folder.path().join(FILE), b"{").unwrap();
        assert!(matches!(Authority::open(folder.path()), Err(AuthorityError::Damaged { .. })));
    }
}
