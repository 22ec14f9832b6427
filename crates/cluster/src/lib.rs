//! Several hosts as one cluster: who belongs to it, what they agree on, who runs what, and how they talk.
//!
//! - [`identity`]: the cluster's authority, hosts' keys and certificates, join tokens, TLS.
//! - [`admission`]: founding a cluster, joining it.
//! - [`directory`]: what the cluster agrees on, in etcd (or a file, for one host): members, hosts, environments, locks.
//! - [`placement`]: which machine runs on which host. Pure.
//! - [`channel`]: HTTP over mutual TLS among members.
//! - [`renewal`]: new certificates before the old ones end.
//!
//! Nothing here is a consensus system: that is etcd. What the parts promise when something dies is in docs/cluster.md.

pub mod admission;
pub mod channel;
pub mod directory;
pub mod identity;
pub mod placement;
pub mod private_file;
pub mod renewal;

pub use directory::Directory;
pub use identity::{Fingerprint, HostId, Member, Members};
pub use private_file::FileError;

/// Bytes as base64 in JSON.
pub(crate) mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
