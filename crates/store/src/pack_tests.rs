//! Packs there and back, and every byte of one changed.

use proptest::prelude::*;

use super::*;

fn build(kind: PackKind, chunks: &[Vec<u8>]) -> (PackId, Vec<u8>, Table) {
    let mut pack = PackBuilder::new(kind, [7; 16]);
    let mut group = GroupBuilder::new(kind);
    for chunk in chunks {
        if !group.fits(chunk.len()) {
            pack.add(group.seal().unwrap());
        }
        group.push(Address::of(chunk), chunk);
    }
    if let Some(last) = group.seal() {
        pack.add(last);
    }
    pack.finish()
}

/// All chunks of a pack, by the file's bytes and its id alone.
fn read(id: &PackId, bytes: &[u8]) -> Result<Vec<Vec<u8>>, PackError> {
    let pack_bytes = bytes.len() as u64;
    let (_, footer) = bytes.split_last_chunk::<FOOTER_BYTES>().ok_or(PackError::NotAPack)?;
    let length = table_bytes(footer, pack_bytes)? as usize;
    if !bytes.starts_with(MAGIC) {
        return Err(PackError::NotAPack);
    }
    let end = bytes.len() - FOOTER_BYTES;
    let table = Table::decode(id, &bytes[end - length..end], pack_bytes)?;
    assert_eq!(table.pack_bytes(), pack_bytes);
    let mut opener = Opener::new();
    let mut raw = Vec::new();
    let mut chunks = Vec::new();
    for (index, group) in table.groups.iter().enumerate() {
        table.open_group(
            index,
            &bytes[group.offset as usize..group.end() as usize],
            &mut opener,
            &mut raw,
        )?;
        table.check_chunks(index, &raw)?;
        for chunk in group.chunk_range() {
            assert_eq!(table.group_of(chunk), index);
            let at = table.offset_in_group(index, chunk);
            chunks.push(raw[at..at + table.chunk_bytes(chunk)].to_vec());
        }
    }
    Ok(chunks)
}

/// Compressible and not, of all lengths.
fn sample() -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..700_u32).flat_map(|n| *Address::of(&n.to_le_bytes()).as_bytes()).collect();
    vec![vec![1; 4096], noise[..4096].to_vec(), vec![2], noise[5000..20_000].to_vec(), vec![3; 65536], {
        let mut half = vec![4; 65536];
        half[..20_000].copy_from_slice(&noise[..20_000]);
        half
    }]
}

#[test]
fn what_is_packed_is_read() {
    for kind in [PackKind::Data, PackKind::Tree] {
        let chunks: Vec<Vec<u8>> = match kind {
            PackKind::Data => sample(),
            PackKind::Tree => {
                (0..3000_u32).map(|n| Address::of(&n.to_le_bytes()).as_bytes().repeat(3)).collect()
            }
        };
        let (id, bytes, table) = build(kind, &chunks);
        assert!(table.groups.len() > 1);
        assert_eq!(read(&id, &bytes).unwrap(), chunks);
    }
    let (id, bytes, _) = build(PackKind::Data, &[]);
    assert!(read(&id, &bytes).unwrap().is_empty());
}

#[test]
fn every_changed_byte_is_noticed() {
    let chunks = [vec![1; 300], (0..200).collect(), vec![9; 50]];
    let (id, bytes, _) = build(PackKind::Data, &chunks);
    assert!(bytes.len() < 600, "{}", bytes.len());
    for at in 0..bytes.len() {
        for change in [1, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= change;
            assert!(read(&id, &changed).is_err(), "byte {at}");
        }
    }
    for length in 0..bytes.len() {
        assert!(read(&id, &bytes[..length]).is_err(), "cut to {length}");
    }
    for more in 1..40 {
        let longer = [bytes.clone(), vec![0; more]].concat();
        assert!(read(&id, &longer).is_err(), "{more} more");
    }
}

proptest! {
    /// Whatever stands in a table whose hash is right: it is refused or in bounds, and takes no memory it has not got.
    #[test]
    fn forged_tables_do_no_harm(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in 0_usize..40,
    ) {
        let (_, bytes, table) = build(PackKind::Data, &sample());
        let mut forged = table.encode();
        for (at, value) in edits {
            let at = at.index(forged.len());
            forged[at] = value;
        }
        forged.truncate(forged.len() - cut);
        let id = PackId::of_table(&forged);
        if let Ok(table) = Table::decode(&id, &forged, bytes.len() as u64) {
            let mut raw = Vec::new();
            for (index, group) in table.groups.iter().enumerate() {
                let stored = &bytes[group.offset as usize..group.end() as usize];
                // An error or not, but no panic.
                let _ = table.open_group(index, stored, &mut Opener::new(), &mut raw)
                    .and_then(|()| table.check_chunks(index, &raw));
            }
        }
    }

    #[test]
    fn packs_of_anything(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..3000), 0..60)) {
        let (id, bytes, _) = build(PackKind::Data, &chunks);
        prop_assert_eq!(read(&id, &bytes), Ok(chunks));
    }
}

/// Of pages that compress to next to nothing the table is what grows: a pack must not outgrow what is read.
#[test]
fn a_pack_is_full_when_its_table_is_long() {
    let mut pack = PackBuilder::new(PackKind::Data, [7; 16]);
    let mut group = GroupBuilder::new(PackKind::Data);
    let mut number = 0_u32;
    while !pack.is_full() {
        let chunk = number.to_le_bytes().repeat(8);
        number += 1;
        if !group.fits(chunk.len()) {
            pack.add(group.seal().unwrap());
        }
        group.push(Address::of(&chunk), &chunk);
    }
    let (_, bytes, table) = pack.finish();
    assert!(table.len() > 300_000, "{}", table.len());
    assert!(bytes.len() <= PACK_BYTES + (1 << 20), "{}", bytes.len());
}
