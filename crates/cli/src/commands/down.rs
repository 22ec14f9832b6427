//! `diorama down`.

use clap::Args;
use diorama_api::{DownReport, DownRequest};
use serde::Serialize;

use crate::environment_choice::choose;
use crate::failure::Failure;
use crate::quantity::count;
use crate::session::Session;

/// Stop an environment
///
/// Its machines are ended at once, as if unplugged. Its disks are kept unless `--volumes` is given; its snapshots are
/// always kept.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama down              stop it; `diorama up` starts from its disks again
  diorama down --volumes    stop it and forget its disks
  diorama down --all        stop every environment")]
pub struct Arguments {
    /// Remove its disks too
    #[arg(long)]
    volumes: bool,

    /// Every environment
    #[arg(long)]
    all: bool,
}

#[derive(Serialize)]
struct Document {
    environments: Vec<DownReport>,
}

/// Stops them, one after another.
///
/// # Errors
/// When one cannot be stopped; those before it have been.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let names = if arguments.all {
        session.client().environments().await?.into_iter().map(|environment| environment.name).collect()
    } else {
        vec![choose(session).await?]
    };
    let request = DownRequest { volumes: arguments.volumes };
    let mut environments = Vec::new();
    for name in &names {
        let mut progress = session.operation();
        environments
            .push(session.client().down(name.as_ref(), &request, |notice| progress.show(notice)).await?);
    }
    let document = Document { environments };
    session.output().result(&document, || text(&document))?;
    Ok(0)
}

fn text(document: &Document) -> String {
    if document.environments.is_empty() {
        return "nothing to stop\n".to_owned();
    }
    let mut text = String::new();
    for report in &document.environments {
        let machines = count(u64::from(report.machines_stopped), "machine");
        text.push_str(&format!("{} is down: {machines} stopped", report.environment));
        if !report.disks_kept.is_empty() {
            text.push_str(&format!(", {} kept", count(report.disks_kept.len() as u64, "disk")));
        }
        if !report.disks_removed.is_empty() {
            text.push_str(&format!(", {} removed", count(report.disks_removed.len() as u64, "disk")));
        }
        text.push('\n');
    }
    text
}
