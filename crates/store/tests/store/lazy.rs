//! Memory read a group at a time is what was put, and says what is lost.

use std::fs;

use diorama_store::*;

use crate::sample::*;

/// Everything that two machines' memory has, by [`LazyMemory`].
fn read(memory: &LazyMemory) -> Result<([Vec<u8>; 2], Vec<LostPage>), StoreError> {
    let mut contents = [(); 2].map(|()| vec![0; RAM_BYTES as usize]);
    let mut lost = Vec::new();
    let mut group = 0;
    while group < memory.groups() {
        let run = memory.run(group, 1 << 20);
        group = run.end;
        lost.extend(memory.read(run, &mut |machine, page, bytes| {
            contents[machine][page as usize * 4096..][..4096].copy_from_slice(bytes);
        })?);
    }
    Ok((contents, lost))
}

fn whole(store: &Store, stored: &Stored, machine: &str) -> Vec<u8> {
    let file = crate::scratch::file();
    store.copy_ram(stored, machine, &file, &mut none).unwrap();
    contents(&file)
}

#[test]
fn every_page_is_handed_out_once() {
    for make in BOTH {
        let sample = make();
        let id = sample.commit("one", 1);
        let stored = sample.store.load(&id).unwrap();
        let memory = LazyMemory::open(&sample.store, &stored, &["server", "client"]).unwrap();
        let (pages, lost) = read(&memory).unwrap();
        assert!(lost.is_empty(), "{lost:?}");
        for (index, machine) in ["server", "client"].into_iter().enumerate() {
            assert!(pages[index] == whole(&sample.store, &stored, machine), "{machine}");
            for page in 0..memory.pages_of(index) {
                let zero = pages[index][page as usize * 4096..][..4096].iter().all(|byte| *byte == 0);
                assert_eq!(memory.group_of(index, page).is_none(), zero, "{machine} {page}");
            }
            let used: u64 = USED.iter().map(|(_, bytes)| bytes / 4096).sum();
            assert_eq!(memory.pages(index), used);
        }
        assert_eq!(memory.group_of(0, RAM_BYTES / 4096), None);
    }
}

/// A snapshot's memory, to be read, and what the first machine's is.
fn opened(sample: &Sample, id: &SnapshotId) -> (LazyMemory, Vec<u8>) {
    let stored = sample.store.load(id).unwrap();
    let memory = LazyMemory::open(&sample.store, &stored, &["server", "client"]).unwrap();
    (memory, whole(&sample.store, &stored, "server"))
}

#[test]
fn packs_stay_while_somebody_may_need_them() {
    let sample = Sample::new();
    let id = sample.commit("one", 1);
    let stored = sample.store.load(&id).unwrap();
    let (memory, expected) = opened(&sample, &id);
    let other = sample.reopened();
    other.remove(&id).unwrap();
    other.collect(CollectOptions::default(), &mut none).unwrap();
    let (pages, lost) = read(&memory).unwrap();
    assert!(lost.is_empty() && pages[0] == expected, "{lost:?}");
    assert!(LazyMemory::open(&sample.store, &stored, &["nobody"]).is_err());
}

#[test]
fn what_is_lost_is_said_and_the_rest_is_there() {
    let sample = Sample::new();
    let id = sample.commit("one", 1);
    let (memory, expected) = opened(&sample, &id);
    let Location::Folder(folder) = &sample.location else { return };
    let mut losses = 0;
    for pack in fs::read_dir(folder.join("packs")).unwrap().flatten() {
        let whole = fs::read(pack.path()).unwrap();
        for group in groups(&whole) {
            let mut bytes = whole.clone();
            bytes[group] ^= 1;
            fs::write(pack.path(), bytes).unwrap();
            let (pages, lost) = read(&memory).unwrap();
            losses += usize::from(!lost.is_empty());
            for lost in &lost {
                assert!(lost.error.is_damage(), "{lost:?}");
            }
            for page in 0..expected.len() / 4096 {
                let at = page * 4096..(page + 1) * 4096;
                let is_lost = lost.iter().any(|lost| lost.machine == 0 && lost.page == page as u64);
                assert!(is_lost || pages[0][at.clone()] == expected[at], "{page}");
            }
        }
        fs::write(pack.path(), whole).unwrap();
    }
    // Which group holds what is not the same each time, but some hold memory.
    assert!(losses > 0);
    assert!(read(&memory).unwrap().1.is_empty());
}

/// Where each group of a pack begins, by its table (docs/store-format.md).
fn groups(pack: &[u8]) -> Vec<usize> {
    let number = |at: usize| u32::from_le_bytes(pack[at..at + 4].try_into().unwrap()) as usize;
    let footer = pack.len() - 12;
    let table = footer - number(footer);
    let lengths = (0..number(table + 20)).map(|group| number(table + 28 + group * 44));
    lengths
        .scan(8, |start, length| {
            *start += length;
            Some(*start - length)
        })
        .collect()
}
