//! What crosses a process boundary: requests, replies, events, errors, and the client that speaks them.
//!
//! The agent serves HTTP/1.1 with JSON bodies on a unix socket (see [`Folders::socket`]). Requests that
//! take time answer with a stream of [`Event`]s, one JSON document a line (`application/x-ndjson`), of which
//! the last is [`Event::Done`] or [`Event::Failed`]. A client that closes its connection early cancels the
//! operation; the agent then undoes what was begun.
//!
//! | method and path | request | answer |
//! | --- | --- | --- |
//! | `GET /v1/agent` | | [`AgentInfo`] |
//! | `POST /v1/agent/stop` | [`StopAgentRequest`] | [`Empty`] |
//! | `GET /v1/environments` | | `Vec<`[`EnvironmentStatus`]`>` |
//! | `GET /v1/environments/{name}` | | [`EnvironmentStatus`] |
//! | `POST /v1/environments` | [`UpRequest`] | events, [`EnvironmentStatus`] |
//! | `POST /v1/environments/{name}/down` | [`DownRequest`] | events, [`DownReport`] |
//! | `POST /v1/environments/{name}/pause`, `…/resume` | [`MachinesRequest`] | events, [`EnvironmentStatus`] |
//! | `POST /v1/environments/{name}/snapshots` | [`CreateSnapshotRequest`] | events, [`SnapshotReport`] |
//! | `POST /v1/environments/{name}/restore` | [`RestoreRequest`] | events, [`RestoreReport`] |
//! | `POST /v1/restore` | [`RestoreRequest`] | events, [`RestoreReport`] (the environment is the snapshot's own) |
//! | `POST /v1/forks` | [`ForkRequest`] | events, [`ForkReport`] |
//! | `POST /v1/environments/{name}/machines/{machine}/exec` | [`ExecRequest`] | events, [`ExecReport`] |
//! | `GET /v1/environments/{name}/machines/{machine}/console` | `Upgrade: diorama-console` | raw bytes both ways |
//! | `GET /v1/environments/{name}/machines/{machine}/log?follow=&lines=` | | raw bytes |
//! | `GET /v1/snapshots` | | [`SnapshotList`] |
//! | `GET /v1/snapshots/{query}?environment=` | | [`SnapshotReport`] |
//! | `DELETE /v1/snapshots/{query}?environment=` | | [`RemoveReport`] |
//! | `POST /v1/snapshots/{query}/verify?environment=` | [`VerifyRequest`] | events, [`VerifyReport`] |
//! | `GET /v1/snapshots/{query}/diff/{other}?environment=` | | [`DiffReport`] |
//! | `POST /v1/snapshots/{query}/extract?environment=` | [`ExtractRequest`] | events, [`ExtractReport`] |
//! | `POST /v1/snapshots/{query}/export?environment=` | [`ExportRequest`] | events, [`ExportReport`] |
//! | `GET /v1/hosts` | | `Vec<`[`HostInfo`]`>` |
//! | `POST /v1/hosts/init`, `…/join` | [`InitHostRequest`], [`JoinHostRequest`] | [`HostInfo`] |
//! | `POST /v1/hosts/token` | [`TokenRequest`] | [`TokenReply`] |
//! | `POST /v1/hosts/drain` | [`DrainHostRequest`] | [`HostInfo`] |
//! | `POST /v1/hosts/remove` | [`RemoveHostRequest`] | [`Empty`] |
//! | `POST /v1/hosts/leave` | [`LeaveHostRequest`] | [`LeaveHostReport`] |
//! | `GET /v1/store` | | [`StoreStats`] |
//! | `POST /v1/store/check` | [`StoreCheckRequest`] | events, [`StoreCheckReport`] |
//! | `POST /v1/store/gc` | [`StoreGcRequest`] | events, [`StoreGcReport`] |
//! | `POST /v1/store/prune` | [`PruneRequest`] | events, [`PruneReport`] |
//! | `POST /v1/store/import` | [`ImportRequest`] | events, [`ArrivalReport`] |
//! | `POST /v1/store/push`, `…/pull` | [`TransferRequest`] | events, [`TransferReport`] |
//!
//! An error outside an event stream has a 4xx or 5xx status and an [`ErrorBody`].

mod client;
mod environment;
mod error;
mod event;
mod folders;
mod host;
mod snapshot;
mod store;
mod system;
mod transfer;

pub use client::*;
pub use environment::*;
pub use error::*;
pub use event::*;
pub use folders::*;
pub use host::*;
pub use snapshot::*;
pub use store::*;
pub use system::*;
pub use transfer::*;
