//! `diorama snapshot extract`.

use std::path::PathBuf;

use clap::Args;
use diorama_api::{DiskForm, Extract, ExtractReport, ExtractRequest, MemoryForm};

use crate::arguments::not_empty;
use crate::commands::export::absolute;
use crate::completion;
use crate::environment_choice::scope;
use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::{bytes, short_id};
use crate::session::Session;

/// Write what a snapshot holds as ordinary files, for other tools; nothing is started
///
/// manifest.json and environment.yaml say what it is; `diorama up` can start the latter. frames.pcapng has the frames
/// that were in flight, with an interface for each network, and a comment on each frame: its receiver, its sender, its
/// colour. For each machine there are:
///
///   memory.elf     an ELF core file, with main memory where the guest's processor finds it; debuggers and tools of
///                  memory forensics read it. What is zero is a hole
///   disks/         each disk as one qcow2 image; one over an image of yours names that as its backing file
///   kernel, initrd what it was booted with, if it was booted so
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    after_long_help = "\
Examples:
  diorama snapshot extract before --to before/                   everything
  diorama snapshot extract before --to x --memory --machine server
  diorama snapshot extract before --to x --disks --raw-disks     then `mount -o loop` and the like
  diorama snapshot extract before --to x --disks --flatten       images that need no other file
  diorama snapshot extract before --to x --frames && wireshark x/frames.pcapng"
)]
pub struct Arguments {
    /// Its name, its id, or a unique beginning of its id
    #[arg(value_parser = not_empty, add = completion::snapshots())]
    snapshot: String,

    /// The folder to write to; it is made if it is not there
    #[arg(long, value_name = "FOLDER", value_hint = clap::ValueHint::DirPath)]
    to: PathBuf,

    /// Only of this machine; may be given several times
    #[arg(long, value_name = "MACHINE", value_parser = not_empty, add = completion::machines())]
    machine: Vec<String>,

    /// Machines' memory (with this and the next four: only what is named)
    #[arg(long)]
    memory: bool,

    /// Machines' disks
    #[arg(long)]
    disks: bool,

    /// Kernels and initrds
    #[arg(long)]
    kernels: bool,

    /// The frames in flight
    #[arg(long)]
    frames: bool,

    /// The manifest and the environment's file
    #[arg(long)]
    description: bool,

    /// Write memory as memory.raw: main memory's bytes one after another, wherever the guest has them
    #[arg(long, visible_alias = "raw")]
    raw_memory: bool,

    /// Write disks as their bytes, sparse, what they have of images of yours included
    #[arg(long)]
    raw_disks: bool,

    /// Copy what disks have of images of yours, so that each disk is one file
    #[arg(long)]
    flatten: bool,

    /// Write over files that are there
    #[arg(short, long)]
    force: bool,
}

/// Extracts.
///
/// # Errors
/// When there is no such snapshot, something of it is damaged, or the files cannot be written.
pub async fn run(arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let scope = scope(session);
    let what = [
        (arguments.memory, Extract::Memory),
        (arguments.disks, Extract::Disks),
        (arguments.kernels, Extract::Kernels),
        (arguments.frames, Extract::Frames),
        (arguments.description, Extract::Description),
    ];
    let request = ExtractRequest {
        to: absolute(&arguments.to)?,
        machines: arguments.machine,
        what: what.into_iter().filter(|(named, _)| *named).map(|(_, what)| what).collect(),
        memory: if arguments.raw_memory { MemoryForm::Raw } else { MemoryForm::Elf },
        disks: if arguments.raw_disks { DiskForm::Raw } else { DiskForm::Qcow2 },
        flatten: arguments.flatten,
        force: arguments.force,
    };
    let mut progress = session.operation();
    let report = session
        .client()
        .extract_snapshot(&arguments.snapshot, scope.as_ref().map(AsRef::as_ref), &request, |notice| {
            progress.show(notice)
        })
        .await?;
    drop(progress);
    session.output().result(&report, || text(&report, session.output()))?;
    Ok(0)
}

fn text(report: &ExtractReport, output: &Output) -> String {
    let mut text = format!(
        "snapshot {} ({}) in {}\n",
        printable(&report.name),
        printable(short_id(&report.id)),
        printable(&report.to.display().to_string()),
    );
    let mut table = output.table();
    table.set_header(["FILE", "LENGTH", "ON DISK", "NEEDS"]);
    for file in &report.files {
        let backing = file.backing.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string());
        table.add_row([
            printable(&file.path.display().to_string()).into_owned(),
            bytes(file.bytes),
            bytes(file.allocated_bytes),
            printable(&backing).into_owned(),
        ]);
    }
    text.push_str(&lines(&table, "  "));
    text
}
