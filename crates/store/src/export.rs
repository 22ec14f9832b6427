//! Out of a store into one file, and from such a file into a store. What the file's bytes are: [`crate::archive`].

use std::io::{Read, Write};

use crate::Progress;
use crate::address::Address;
use crate::archive::{ArchiveProblem, ArchiveReader, ArchiveWriter, Kind, damaged};
use crate::error::StoreError;
use crate::id::SnapshotId;
use crate::ingest::Chunks;
use crate::manifest::{BaseRecord, Manifest, Unreadable};
use crate::pack::{
    self, FOOTER_BYTES, GroupBuilder, MAGIC, Opener, PackBuilder, PackError, PackId, PackKind, Table,
};
use crate::root::Store;
use crate::seal::random_bytes;
use crate::signature::signer_of;
use crate::transfer::{Arrived, Copied, Intake};

/// A snapshot that was written into a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The snapshot.
    pub id: SnapshotId,
    /// How long the file is.
    pub file_bytes: u64,
    /// How many chunks are in it.
    pub chunks: u64,
    /// The user's images under its disks, which are not in it.
    pub bases: Vec<BaseRecord>,
}

impl Store {
    /// Writes a snapshot as one file, with its signature if it has one. What the snapshot does not need is not in it.
    /// `progress` counts stored bytes.
    ///
    /// # Errors
    /// When something of it is damaged, or the file cannot be written.
    pub fn export(
        &self,
        id: &SnapshotId,
        out: &mut dyn Write,
        progress: Progress<'_>,
    ) -> Result<Exported, StoreError> {
        let copied = self.copied(id)?;
        let needed = self.needed(&copied.manifest)?;
        let mut archive = ArchiveWriter::new(out)?;
        archive.record(Kind::Manifest, &copied.bytes)?;
        if let Some(signature) = &copied.signature {
            archive.record(Kind::Signature, signature)?;
        }
        let mut packing = Packing { archive: &mut archive, open: None };
        self.each_chunk(&needed, &mut |kind, address, bytes| packing.push(kind, *address, bytes), progress)?;
        packing.close()?;
        let disks = copied.manifest.machines.iter().flat_map(|machine| &machine.disks);
        Ok(Exported {
            id: *id,
            file_bytes: archive.finish()?,
            chunks: needed.len(),
            bases: disks.filter_map(|disk| disk.base.clone()).collect(),
        })
    }

    /// Takes in a snapshot from a file, as `name` or by the name in it. Nothing of it is visible before all of it has
    /// been checked. `progress` counts the file's bytes, whose number is not known: the total is 0.
    ///
    /// # Errors
    /// When the file is not what was exported, the name is taken, or the store cannot be written.
    pub fn import(
        &self,
        input: &mut dyn Read,
        name: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<Arrived, StoreError> {
        let mut archive = ArchiveReader::new(input)?;
        let at = archive.offset();
        let mut copied = opened_manifest(archive.manifest()?).map_err(|problem| damaged(at, problem))?;
        if let Some((at, signature)) = archive.signature()? {
            if signer_of(&copied.id, &signature).is_none() {
                return Err(damaged(at, ArchiveProblem::Signature));
            }
            copied.signature = Some(signature);
        }
        let name = name.unwrap_or(&copied.manifest.name);
        let intake = Intake::begin(self, &copied, name)?;
        let mut chunks = Chunks::new(&intake.target);
        let (mut opener, mut raw) = (Opener::new(), Vec::new());
        let mut count = 0;
        while let Some((at, bytes)) = archive.pack()? {
            let broken = |problem| damaged(at, ArchiveProblem::Pack(problem));
            let table = opened_table(&bytes).map_err(broken)?;
            for (group, place) in table.groups.iter().enumerate() {
                // Within the pack: the table has been checked.
                let stored = &bytes[place.offset as usize..place.end() as usize];
                table
                    .open_group(group, stored, &mut opener, &mut raw)
                    .and_then(|()| table.check_chunks(group, &raw))
                    .map_err(broken)?;
                let mut rest = &raw[..];
                for chunk in place.chunk_range() {
                    let (bytes, after) = rest.split_at(table.chunk_bytes(chunk));
                    rest = after;
                    intake.take(&mut chunks, table.kind, &table.addresses[chunk], bytes)?;
                    count += 1;
                }
            }
            progress(archive.offset(), 0);
        }
        chunks.flush()?;
        drop(chunks);
        let end = archive.offset();
        intake.settle(&copied, name, count, |part| damaged(end, ArchiveProblem::Lacks { part }))
    }
}

/// Packs on their way into an archive.
struct Packing<'a, 'b> {
    archive: &'a mut ArchiveWriter<'b>,
    open: Option<(PackBuilder, GroupBuilder)>,
}

impl Packing<'_, '_> {
    fn push(&mut self, kind: PackKind, address: Address, chunk: &[u8]) -> Result<(), StoreError> {
        if self.open.as_ref().is_some_and(|(_, group)| group.kind() != kind) {
            self.close()?;
        }
        let (pack, group) = self
            .open
            .get_or_insert_with(|| (PackBuilder::new(kind, random_bytes()), GroupBuilder::new(kind)));
        if !group.fits(chunk.len())
            && let Some(sealed) = group.seal()
        {
            pack.add(sealed);
            if pack.is_full() {
                let full = std::mem::replace(pack, PackBuilder::new(kind, random_bytes()));
                self.archive.record(Kind::Pack, &full.finish().1)?;
            }
        }
        group.push(address, chunk);
        Ok(())
    }

    fn close(&mut self) -> Result<(), StoreError> {
        let Some((mut pack, mut group)) = self.open.take() else { return Ok(()) };
        if let Some(sealed) = group.seal() {
            pack.add(sealed);
        }
        // There is a group being filled whenever there is a pack.
        self.archive.record(Kind::Pack, &pack.finish().1)
    }
}

fn opened_manifest(bytes: Vec<u8>) -> Result<Copied, ArchiveProblem> {
    let manifest = Manifest::parse(&bytes).map_err(|problem| match problem {
        Unreadable::NotOne { line, column } => ArchiveProblem::NotAManifest { line, column },
        Unreadable::Rules(problem) => ArchiveProblem::Manifest(problem),
    })?;
    Ok(Copied { id: SnapshotId::of_manifest(&bytes), bytes, manifest, signature: None })
}

fn opened_table(pack: &[u8]) -> Result<Table, PackError> {
    let length = pack.len();
    let Some(rest) = pack.strip_prefix(MAGIC).filter(|rest| rest.len() >= FOOTER_BYTES) else {
        return Err(PackError::NotAPack);
    };
    let (_, footer) = rest.split_at(rest.len() - FOOTER_BYTES);
    let mut last = [0; FOOTER_BYTES];
    last.copy_from_slice(footer);
    // At most what stands between magic and footer.
    let table_bytes = pack::table_bytes(&last, length as u64)? as usize;
    let table = &pack[length - FOOTER_BYTES - table_bytes..length - FOOTER_BYTES];
    Table::decode(&PackId::of_table(table), table, length as u64)
}
