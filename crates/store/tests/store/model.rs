//! The store against a plain model of it: snapshots are a map from names to contents.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use diorama_store::*;
use proptest::prelude::*;

use crate::sample::*;
use crate::scratch;

/// A memory: for each page, which of a few contents it has; 0 is zeros.
type Pages = Vec<u8>;

#[derive(Debug, Clone)]
enum Step {
    /// Takes a snapshot of this memory.
    Take(Pages),
    /// Changes some pages of an earlier one, and takes a snapshot of that.
    Change(prop::sample::Index, Vec<(prop::sample::Index, u8)>),
    Remove(prop::sample::Index),
    Collect(u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), 0_u8..30), 1..6);
    prop_oneof![
        3 => prop::collection::vec(0_u8..30, 0..400).prop_map(Step::Take),
        3 => (any::<prop::sample::Index>(), changes).prop_map(|(of, changes)| Step::Change(of, changes)),
        3 => any::<prop::sample::Index>().prop_map(Step::Remove),
        2 => (0_u8..=100).prop_map(Step::Collect),
        1 => Just(Step::Reopen),
    ]
}

fn memory(pages: &Pages) -> std::fs::File {
    let file = scratch::file();
    for (page, kind) in (0_u64..).zip(pages) {
        let bytes = if *kind == 0 { vec![0; 4096] } else { noise((*kind).into(), 4096) };
        file.write_all_at(&bytes, page * 4096).unwrap();
    }
    file
}

fn take(sample: &Sample, store: &Store, name: &str, pages: &Pages) {
    sample.commit_memory(store, name, &memory(pages), name.as_bytes());
    assert_eq!(sample.names_in("incoming"), [""; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::place::CASES, ..ProptestConfig::default() })]

    #[test]
    fn a_store_is_a_map_of_snapshots(kind in 0..2_usize, steps in prop::collection::vec(step(), 1..14)) {
        let sample = BOTH[kind]();
        let mut store = sample.reopened();
        let mut model: BTreeMap<String, Pages> = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            let name = format!("s{number}");
            match step {
                Step::Take(pages) => {
                    take(&sample, &store, &name, &pages);
                    model.insert(name, pages);
                }
                Step::Change(of, changes) if !model.is_empty() => {
                    let mut pages = model.values().nth(of.index(model.len())).unwrap().clone();
                    if pages.is_empty() {
                        continue;
                    }
                    for (page, kind) in changes {
                        let page = page.index(pages.len());
                        pages[page] = kind;
                    }
                    take(&sample, &store, &name, &pages);
                    model.insert(name, pages);
                }
                Step::Remove(which) if !model.is_empty() => {
                    let name = model.keys().nth(which.index(model.len())).unwrap().clone();
                    store.remove(&store.resolve(&name, Some("pair")).unwrap()).unwrap();
                    model.remove(&name);
                }
                Step::Collect(unused_percent_max) => {
                    let collected = store.collect(CollectOptions { unused_percent_max }, &mut none).unwrap();
                    prop_assert!(!collected.deferred);
                }
                Step::Reopen => store = sample.reopened(),
                _ => {}
            }
            let names: Vec<String> =
                store.list().unwrap().iter().map(|summary| summary.entry().unwrap().name.clone()).collect();
            prop_assert_eq!(names.len(), model.len());
            let mut before: Option<(SnapshotId, &Pages)> = None;
            for (name, pages) in &model {
                let id = store.find_name("pair", name).unwrap().unwrap();
                let stored = store.load(&id).unwrap();
                let copy = scratch::file();
                store.copy_ram(&stored, "client", &copy, &mut none).unwrap();
                prop_assert!(contents(&copy) == contents(&memory(pages)), "memory of {}", name);
                prop_assert_eq!(store.read_state(&stored, "client").unwrap(), name.as_bytes());
                if let Some((other, other_pages)) = before.replace((id, pages)) {
                    let longer = pages.len().max(other_pages.len());
                    let page = |pages: &Pages, at: usize| pages.get(at).copied().unwrap_or(0);
                    let differing =
                        (0..longer).filter(|at| page(pages, *at) != page(other_pages, *at)).count() as u64;
                    let diff = store.diff(&other, &id).unwrap();
                    let found = match &diff.machines[..] {
                        [MachineDiff::Both { pages_differing, .. }] => *pages_differing,
                        others => panic!("{others:?}"),
                    };
                    prop_assert_eq!(found, differing);
                }
            }
        }
        let report = store.check(ALL, &mut none).unwrap();
        prop_assert!(report.is_sound(), "{:?}", report);
    }
}
