//! Who signs snapshots here, and whose signatures are asked for.
//!
//! `DIORAMA_SIGNING_KEY` names a private key: every snapshot that this agent commits is signed with it.
//! `DIORAMA_TRUSTED_KEYS` names a file of public keys: what none of them has signed is neither restored nor forked, nor sound
//! to `snapshot verify`.

use std::path::{Path, PathBuf};

use diorama_api::{ApiError, ErrorKind, NewSignerReport, SignatureReport, SignatureState, VerifyProblem};
use diorama_store::{KeyFileError, PublicKey, Signature, SigningKey, SnapshotId, Stored};

use crate::Agent;
use crate::problem::{io_error, store_error};
use crate::store_keys::{variable, write_new};

/// Names the private key that signs.
pub const SIGNING_KEY: &str = "DIORAMA_SIGNING_KEY";
/// Names the file of public keys whose signatures count.
pub const TRUSTED_KEYS: &str = "DIORAMA_TRUSTED_KEYS";

/// What problems call the signature.
const SIGNATURE: &str = "signature";

/// The key that the process's variable names, if it does.
pub(crate) fn signer_from_process() -> Result<Option<SigningKey>, ApiError> {
    variable(SIGNING_KEY).map(|path| SigningKey::read(&path).map_err(key_file_error)).transpose()
}

/// The keys that the process's variable names; `None`: everybody's snapshots are as good.
pub(crate) fn trusted_from_process() -> Result<Option<Vec<PublicKey>>, ApiError> {
    variable(TRUSTED_KEYS).map(|path| PublicKey::read_all(&path).map_err(key_file_error)).transpose()
}

/// The files that the process's variables name, by variable, from whatever folder they are read.
///
/// # Errors
/// When there is no current folder.
pub fn variables() -> Result<Vec<(&'static str, PathBuf)>, ApiError> {
    let named = [SIGNING_KEY, TRUSTED_KEYS].into_iter().filter_map(|name| Some((name, variable(name)?)));
    named
        .map(|(name, path)| Ok((name, std::path::absolute(&path).map_err(|error| io_error(&path, &error))?)))
        .collect()
}

fn key_file_error(error: KeyFileError) -> ApiError {
    let kind = match error {
        KeyFileError::Read { .. } => ErrorKind::Io,
        _ => ErrorKind::Invalid,
    };
    ApiError::new(kind, error.to_string()).hint("`diorama store signer FILE` makes a pair of keys")
}

/// Makes a pair of keys: the private one in a new file of the user's alone, the public one beside it.
///
/// # Errors
/// When one of them is there, or cannot be written.
pub fn new_signer(path: &Path) -> Result<NewSignerReport, ApiError> {
    let public_path = {
        let mut name = path.as_os_str().to_owned();
        name.push(".pub");
        PathBuf::from(name)
    };
    let (private, public) = SigningKey::generate();
    write_new(path, 0o600, private.as_bytes())?;
    write_new(&public_path, 0o644, public.to_pem().as_bytes())?;
    Ok(NewSignerReport {
        file: path.display().to_string(),
        public_file: public_path.display().to_string(),
        key: public.to_string(),
    })
}

impl Agent {
    /// Opens a snapshot that is to run: signed by somebody who is trusted, where that is asked for.
    pub(crate) fn load_trusted(&self, id: &SnapshotId) -> Result<Stored, ApiError> {
        if let Some(trusted) = &self.trusted {
            let signature = self.store.signature(id).map_err(store_error)?;
            if let Some(problem) = objection(&signature, Some(trusted)) {
                return Err(ApiError::new(
                    ErrorKind::Untrusted,
                    format!("snapshot {} is not used: {problem}", id.short()),
                )
                .hint(format!("{TRUSTED_KEYS} names the keys that are trusted")));
            }
        }
        self.store.load(id).map_err(store_error)
    }

    /// Who has signed a snapshot.
    pub(crate) fn signature_report(&self, signature: &Signature) -> SignatureReport {
        let (state, key) = match signature {
            Signature::None => (SignatureState::None, None),
            Signature::By(key) => (SignatureState::Valid, Some(key.to_string())),
            Signature::Wrong { .. } => (SignatureState::Wrong, None),
        };
        let trusted = self.trusted.as_ref().map(|trusted| objection(signature, Some(trusted)).is_none());
        SignatureReport { state, key, trusted }
    }

    /// What is wrong with a snapshot's signature: it has to be by one of the keys in these files' texts, else by one that is
    /// trusted here, else by anybody if there is one.
    pub(crate) fn signature_problem(
        &self,
        signature: &Signature,
        signed_by: &[String],
    ) -> Result<Option<VerifyProblem>, ApiError> {
        let mut named = Vec::new();
        for text in signed_by {
            named.extend(PublicKey::parse_all(text, Path::new("what was given")).map_err(key_file_error)?);
        }
        let wanted = if signed_by.is_empty() { self.trusted.as_deref() } else { Some(&named[..]) };
        Ok(objection(signature, wanted).map(|problem| VerifyProblem {
            file: SIGNATURE.to_owned(),
            offset: None,
            problem,
        }))
    }
}

/// Why a signature is not enough, if it is not.
fn objection(signature: &Signature, wanted: Option<&[PublicKey]>) -> Option<String> {
    match (signature, wanted) {
        (Signature::Wrong { object, damage }, _) => Some(format!("{}: {damage}", object.display())),
        (_, None) => None,
        (Signature::None, Some(_)) => Some("nobody has signed it".to_owned()),
        (Signature::By(key), Some(wanted)) if wanted.contains(key) => None,
        (Signature::By(key), Some(_)) => {
            Some(format!("it is signed with key {key}, which is none of those asked for"))
        }
    }
}
