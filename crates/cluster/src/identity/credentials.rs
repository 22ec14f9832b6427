//! A host's own key and certificate, and the folder that they are in.
//!
//! `host.key` is made before a host joins and stays for as long as it is a member: its id hangs on it. `host.json` holds
//! the certificate, and is replaced when that is renewed.

use std::path::Path;
use std::time::{Duration, SystemTime};

use diorama_topology::HostName;
use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::authority::{AuthorityError, Certificate};
use super::{Fingerprint, HostId, PublicKey, tls};
use crate::private_file::{self, FileError};

const KEY_FILE: &str = "host.key";
const CERTIFICATE_FILE: &str = "host.json";
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why a host has no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what was written.
    #[error("{file} in {folder} is damaged: {problem}")]
    Damaged {
        /// Which file.
        file: &'static str,
        /// The folder.
        folder: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The certificate is another key's, another authority's or not good now.
    #[error("the certificate cannot be used: {0}")]
    Certificate(String),
    /// No key can be made.
    #[error(transparent)]
    Crypto(#[from] AuthorityError),
}

/// A host's private key.
#[derive(Debug)]
pub struct HostKey(KeyPair);

impl HostKey {
    /// The folder's key; made if there is none.
    ///
    /// # Errors
    /// When it cannot be read, understood, made or written.
    pub fn open_or_create(folder: &Path) -> Result<Self, CredentialsError> {
        let path = folder.join(KEY_FILE);
        if let Some(bytes) = private_file::read(&path, FILE_BYTES_MAX)? {
            let damaged = |problem: String| CredentialsError::Damaged {
                file: KEY_FILE,
                folder: folder.display().to_string(),
                problem,
            };
            let text = String::from_utf8(bytes).map_err(|error| damaged(error.to_string()))?;
            let key = KeyPair::from_pem(&text).map_err(|error| damaged(error.to_string()))?;
            if key.algorithm() != &PKCS_ED25519 {
                return Err(damaged("not an Ed25519 key".to_owned()));
            }
            return Ok(Self(key));
        }
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(AuthorityError::from)?;
        private_file::write(&path, key.serialize_pem().as_bytes())?;
        Ok(Self(key))
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.der_bytes().try_into().expect("an Ed25519 public key has 32 bytes"))
    }

    /// The id of the host that has it.
    pub fn host_id(&self) -> HostId {
        self.public().host_id()
    }

    /// A signature over a message.
    ///
    /// # Errors
    /// Never with a key that was read or made here.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CredentialsError> {
        use rcgen::SigningKey;
        Ok(self.0.sign(message).map_err(AuthorityError::from)?)
    }

    pub(crate) fn private_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }
}

/// A member's key and certificate.
#[derive(Debug)]
pub struct Credentials {
    key: HostKey,
    stored: Stored,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    name: HostName,
    certificate: Certificate,
}

impl Credentials {
    /// Checks a certificate that the authority of this fingerprint should have given, and writes it beside the folder's key.
    ///
    /// # Errors
    /// When it is not for this key, not by that authority, not good now, or cannot be written.
    pub fn store(
        folder: &Path,
        name: HostName,
        authority: Fingerprint,
        certificate: Certificate,
    ) -> Result<Self, CredentialsError> {
        let wrong = |problem: &str| CredentialsError::Certificate(problem.to_owned());
        let key = HostKey::open_or_create(folder)?;
        if Fingerprint::of(&certificate.authority) != authority {
            return Err(wrong("it is another authority's"));
        }
        let leaf = CertificateDer::from(certificate.der.as_slice());
        if tls::public_key(&leaf) != Some(key.public()) {
            return Err(wrong("it is for another key"));
        }
        let root = CertificateDer::from(certificate.authority.as_slice());
        tls::check_issued(&leaf, &root, &tls::host_dns_name(key.host_id()))
            .map_err(|error| wrong(&error.to_string()))?;
        let stored = Stored { name, certificate };
        let bytes = serde_json::to_vec_pretty(&stored).expect("strings serialise");
        private_file::write(&folder.join(CERTIFICATE_FILE), &bytes)?;
        Ok(Self { key, stored })
    }

    /// Any certificate beside the folder's key, for hostile tests.
    #[cfg(test)]
    pub(crate) fn unchecked(folder: &Path, name: HostName, certificate: Certificate) -> Self {
        Self { key: HostKey::open_or_create(folder).unwrap(), stored: Stored { name, certificate } }
    }

    /// The folder's credentials; `None` when this host is in no cluster.
    ///
    /// # Errors
    /// When they cannot be read or do not fit together. A certificate that has ended is no error here.
    pub fn open(folder: &Path) -> Result<Option<Self>, CredentialsError> {
        let Some(bytes) = private_file::read(&folder.join(CERTIFICATE_FILE), FILE_BYTES_MAX)? else {
            return Ok(None);
        };
        let damaged = |problem: String| CredentialsError::Damaged {
            file: CERTIFICATE_FILE,
            folder: folder.display().to_string(),
            problem,
        };
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let key = HostKey::open_or_create(folder)?;
        if tls::public_key(&CertificateDer::from(stored.certificate.der.as_slice())) != Some(key.public()) {
            return Err(damaged("the certificate is for another key than `host.key`".to_owned()));
        }
        Ok(Some(Self { key, stored }))
    }

    /// Takes the host out of its cluster: its certificate and its key are deleted, so that it joins again as a new one.
    ///
    /// # Errors
    /// When a file cannot be deleted.
    pub fn forget(folder: &Path) -> Result<(), CredentialsError> {
        for file in [CERTIFICATE_FILE, KEY_FILE] {
            let path = folder.join(file);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FileError::new(&path, error).into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The host's id.
    pub fn host_id(&self) -> HostId {
        self.key.host_id()
    }

    /// The host's name.
    pub fn name(&self) -> &HostName {
        &self.stored.name
    }

    /// Its key.
    pub fn key(&self) -> &HostKey {
        &self.key
    }

    /// Its certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.stored.certificate
    }

    /// What names the cluster.
    pub fn cluster(&self) -> Fingerprint {
        Fingerprint::of(&self.stored.certificate.authority)
    }

    /// Whether the certificate says that this host speaks for the authority.
    pub fn is_issuer(&self) -> bool {
        tls::names_issuer(&CertificateDer::from(self.stored.certificate.der.as_slice()))
    }

    /// Whether the certificate should be renewed: less than a third of its time is left.
    pub fn renewal_is_due(&self, now: SystemTime) -> bool {
        let certificate = &self.stored.certificate;
        let lifetime = certificate.not_after.duration_since(certificate.not_before).unsigned_abs();
        match Duration::try_from(certificate.not_after.duration_since(timestamp(now))) {
            Ok(left) => left < lifetime / 3,
            Err(_) => true,
        }
    }
}

fn timestamp(time: SystemTime) -> jiff::Timestamp {
    jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Authority;

    #[test]
    fn a_hosts_certificate_is_checked_before_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (here, there) = (folder.path().join("host"), folder.path().join("other"));
        let authority = Authority::create(&folder.path().join("authority")).unwrap();
        let stranger = Authority::create(&folder.path().join("stranger")).unwrap();
        let (key, other) =
            (HostKey::open_or_create(&here).unwrap(), HostKey::open_or_create(&there).unwrap());
        assert_eq!(HostKey::open_or_create(&here).unwrap().host_id(), key.host_id(), "the key stays");
        let name: HostName = "one".parse().unwrap();
        let now = SystemTime::now();
        let store =
            |certificate| Credentials::store(&here, name.clone(), authority.fingerprint(), certificate);
        let good = authority.issue(&name, key.public(), false, now).unwrap();
        for (wrong, why) in [
            (stranger.issue(&name, key.public(), false, now).unwrap(), "another authority's"),
            (authority.issue(&name, other.public(), false, now).unwrap(), "another key"),
            (
                Certificate {
                    authority: good.authority.clone(),
                    ..stranger.issue(&name, key.public(), false, now).unwrap()
                },
                "cannot be used",
            ),
        ] {
            let error = store(wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(Credentials::open(&here).unwrap().is_none(), "nothing wrong was kept");
        store(good.clone()).unwrap();
        let read = Credentials::open(&here).unwrap().unwrap();
        assert_eq!((read.host_id(), read.certificate(), read.name()), (key.host_id(), &good, &name));
        assert!(!read.renewal_is_due(now) && !read.is_issuer());
        assert!(read.renewal_is_due(now + Duration::from_secs(65 * 24 * 60 * 60)));
        assert!(read.renewal_is_due(now + 2 * super::super::CERTIFICATE_LIFETIME));
        Credentials::forget(&here).unwrap();
        assert!(Credentials::open(&here).unwrap().is_none());
        assert_ne!(HostKey::open_or_create(&here).unwrap().host_id(), key.host_id());
    }
}
