//! Which bucket, how it is reached, and how patient the backend is.

use std::fmt;
use std::time::Duration;

use crate::error::StoreError;

/// Which bucket, and how it is reached.
#[derive(Clone)]
pub struct S3Settings {
    /// The bucket's name.
    pub bucket: String,
    /// What all keys begin with, without slashes at its ends; may be empty.
    pub prefix: String,
    /// Where the server is, if it is not Amazon's: `http://HOST:PORT` or `https://…`.
    pub endpoint: Option<String>,
    /// The bucket's region.
    pub region: String,
    /// Who asks; `None` to take what the surroundings give (a container's or a virtual machine's role).
    pub credentials: Option<S3Credentials>,
    /// How long things may take.
    pub timing: S3Timing,
}

/// Who asks.
#[derive(Clone)]
pub struct S3Credentials {
    /// The access key's id.
    pub access_key_id: String,
    /// The access key's secret.
    pub secret_access_key: String,
    /// What temporary credentials have besides.
    pub session_token: Option<String>,
}

/// How long things may take. The defaults are for everybody but tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct S3Timing {
    /// How long a request is tried again and again, beyond the first try.
    pub patience: Duration,
    /// The same as long as the server has never answered.
    pub first_patience: Duration,
    /// How long one try may take, besides the time that its bytes take.
    pub attempt: Duration,
    /// How often a session is renewed.
    pub renew: Duration,
    /// After how long without a renewal a session has ended, by the server's clock. A writer gives up after four
    /// fifths of it, by a clock of its own that runs on while the computer sleeps.
    pub expiry: Duration,
    /// After how long a request that was sent is certain never to be carried out any more.
    pub in_flight: Duration,
    /// How long it is remembered that a session was ended by others.
    pub remembered: Duration,
}

impl Default for S3Timing {
    fn default() -> Self {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        Self {
            patience: minutes(1),
            first_patience: Duration::from_secs(6),
            attempt: Duration::from_secs(15),
            renew: Duration::from_secs(20),
            expiry: minutes(5),
            // Servers refuse what was signed more than 15 minutes before or after their time.
            in_flight: minutes(60),
            remembered: minutes(24 * 60),
        }
    }
}

impl S3Settings {
    /// `s3://BUCKET/PREFIX`, and the variables that tools for S3 share.
    pub(crate) fn parse(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, StoreError> {
        let bad = |problem| StoreError::BadLocation { location: text.to_owned(), problem };
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let rest = text.strip_prefix("s3://").unwrap_or(text);
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let of = |text: &str, others: &str| {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || others.as_bytes().contains(&byte))
        };
        if bucket.is_empty() {
            return Err(bad("it names no bucket"));
        }
        if bucket.bytes().any(|byte| byte.is_ascii_uppercase()) || !of(bucket, ".-") {
            return Err(bad("a bucket's name has lower-case letters, digits, `.` and `-`"));
        }
        let prefix = prefix.trim_end_matches('/');
        let is_part = |part: &str| !part.is_empty() && part != "." && part != ".." && of(part, "._-");
        if !prefix.is_empty() && !prefix.split('/').all(is_part) {
            return Err(bad("a prefix has letters, digits, `.`, `_`, `-` and single `/`"));
        }
        let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
        let endpoint = endpoint.map(|endpoint| endpoint.trim_end_matches('/').to_owned());
        if endpoint.as_ref().is_some_and(|e| !e.starts_with("http://") && !e.starts_with("https://")) {
            return Err(bad("AWS_ENDPOINT_URL begins with neither http:// nor https://"));
        }
        let credentials = match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            (Some(access_key_id), Some(secret_access_key)) => Some(S3Credentials {
                access_key_id,
                secret_access_key,
                session_token: variable("AWS_SESSION_TOKEN"),
            }),
            (Some(_), None) => return Err(bad("AWS_ACCESS_KEY_ID is set, and AWS_SECRET_ACCESS_KEY is not")),
            (None, _) => None,
        };
        let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint,
            region: region.unwrap_or_else(|| "us-east-1".to_owned()),
            credentials,
            timing: S3Timing::default(),
        })
    }

    /// The server, for messages.
    pub(super) fn server(&self) -> String {
        self.endpoint.clone().unwrap_or_else(|| format!("Amazon S3 in {}", self.region))
    }
}

impl fmt::Display for S3Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

impl fmt::Debug for S3Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} at {}", self.server())
    }
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Credentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}
