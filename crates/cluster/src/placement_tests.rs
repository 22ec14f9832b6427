use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn labels(text: &str) -> BTreeMap<LabelName, LabelValue> {
    let pairs = text.split_whitespace().map(|pair| pair.split_once('=').unwrap());
    pairs.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

fn machine(name: &str, memory_mib: u64) -> Wanted {
    Wanted {
        machine: name.parse().unwrap(),
        memory_bytes: memory_mib * MIB,
        host: None,
        labels: BTreeMap::new(),
    }
}

fn on(name: &str, memory_mib: u64, host: &str) -> Wanted {
    Wanted { host: Some(host.parse().unwrap()), ..machine(name, memory_mib) }
}

fn host(number: u8, free_mib: u64) -> Candidate {
    Candidate {
        id: HostId([number; 16]),
        name: format!("h{number}").parse().unwrap(),
        labels: BTreeMap::new(),
        free_memory_bytes: free_mib * MIB,
        alive: true,
        draining: false,
    }
}

/// `machine:host` pairs, by machine.
fn shown(result: Result<BTreeMap<MachineName, HostId>, PlacementError>) -> String {
    match result {
        Ok(placed) => {
            let pairs = placed.iter().map(|(machine, id)| format!("{machine}:h{}", id.0[0]));
            pairs.collect::<Vec<_>>().join(" ")
        }
        Err(error) => error.to_string(),
    }
}

fn at(pairs: &[(&str, u8)]) -> BTreeMap<MachineName, HostId> {
    pairs.iter().map(|(machine, host)| (machine.parse().unwrap(), HostId([*host; 16]))).collect()
}

#[test]
fn machines_spread_by_free_memory() {
    let hosts = [host(1, 1000), host(2, 1000), host(3, 600)];
    let machines: Vec<Wanted> = ["a", "b", "c", "d", "e"].iter().map(|name| machine(name, 256)).collect();
    assert_eq!(shown(place(&machines, &hosts, &at(&[]))), "a:h1 b:h2 c:h1 d:h2 e:h3");
}

#[test]
fn names_labels_and_both() {
    let mut hosts = [host(1, 4000), host(2, 1000), host(3, 1000)];
    hosts[1].labels = labels("rack=a disk=ssd");
    hosts[2].labels = labels("rack=b disk=ssd");
    let machines = [
        on("a", 10, "h3"),
        Wanted { labels: labels("rack=a"), ..machine("b", 10) },
        Wanted { labels: labels("disk=ssd"), ..machine("c", 10) },
        machine("d", 10),
        Wanted { labels: labels("rack=b"), ..on("e", 10, "h3") },
    ];
    assert_eq!(shown(place(&machines, &hosts, &at(&[]))), "a:h3 b:h2 c:h2 d:h1 e:h3");
}

#[test]
fn the_machine_with_the_least_choice_comes_first() {
    // `a` is first by name and size, and would fill h1, where `z` must be.
    let machines = [machine("a", 900), on("z", 500, "h1")];
    let hosts = [host(1, 1000), host(2, 950)];
    assert_eq!(shown(place(&machines, &hosts, &at(&[]))), "a:h2 z:h1");
}

#[test]
fn a_place_is_kept_while_it_is_valid() {
    let machines = [machine("a", 100), machine("b", 100), on("c", 100, "h2"), machine("d", 100)];
    let current = at(&[("a", 1), ("b", 1), ("c", 1), ("d", 3), ("gone", 2)]);
    // However much better another host would be; `c` was given another host since, and h3 is lost.
    let mut hosts = [host(1, 300), host(2, 9000), host(3, 9000)];
    hosts[2].alive = false;
    assert_eq!(shown(place(&machines, &hosts, &current)), "a:h1 b:h1 c:h2 d:h2");
    hosts[0].draining = true;
    assert_eq!(shown(place(&machines, &hosts, &current)), "a:h2 b:h2 c:h2 d:h2");
    // Room for one of two: the first by name stays.
    hosts[0].draining = false;
    hosts[0].free_memory_bytes = 150 * MIB;
    assert_eq!(shown(place(&machines, &hosts, &current)), "a:h1 b:h2 c:h2 d:h2");
}

#[test]
fn a_new_machine_does_not_drive_out_one_that_is_there() {
    let machines = [machine("new", 900), machine("old", 500)];
    let hosts = [host(1, 1000), host(2, 950)];
    assert_eq!(shown(place(&machines, &hosts, &at(&[("old", 1)]))), "new:h2 old:h1");
}

#[test]
fn errors_name_machines_and_reasons() {
    let mut hosts = [host(1, 100), host(2, 100), host(3, 100), host(4, 100)];
    hosts[0].labels = labels("rack=b");
    hosts[2].alive = false;
    hosts[2].labels = labels("rack=a");
    hosts[3].draining = true;
    hosts[3].labels = labels("rack=a");
    let machines = [
        Wanted { labels: labels("rack=a"), ..machine("b", 10) },
        on("a", 10, "nowhere"),
        on("c", 200, "h1"),
        machine("fits", 10),
    ];
    assert_eq!(
        shown(place(&machines, &hosts, &at(&[]))),
        "no host can have the machine `a`: there is no host `nowhere`\n\
         no host can have the machine `b`: `h1`: its label `rack` is `b`, not `a`; \
         `h2`: it has no label `rack` (`a` is wanted); `h3`: it is lost: its agent does not answer; `h4`: it is draining\n\
         no host can have the machine `c`: `h1`: it has 100 MiB of memory left, and 200 MiB are needed; \
         `h2`: the machine names another host; `h3`: the machine names another host; `h4`: the machine names another host"
    );
    assert_eq!(
        shown(place(&[machine("a", 1)], &[], &at(&[]))),
        "no host can have the machine `a`: there are no hosts"
    );
    assert_eq!(shown(place(&[], &[], &at(&[]))), "");
}

prop_compose! {
    fn machines()(parts in proptest::collection::vec((1u64..2000, 0u8..12, 0u8..6), 0..12)) -> Vec<Wanted> {
        parts.into_iter().enumerate().map(|(index, (memory, named, rack))| Wanted {
            host: (named < 5).then(|| format!("h{named}").parse().unwrap()),
            labels: if rack < 2 { labels(&format!("rack={rack}")) } else { BTreeMap::new() },
            ..machine(&format!("m{index}"), memory)
        }).collect()
    }
}

prop_compose! {
    fn hosts()(parts in proptest::collection::vec((0u64..6000, 0u8..8, 0u8..3), 0..6)) -> Vec<Candidate> {
        parts.into_iter().enumerate().map(|(index, (free, state, rack))| Candidate {
            alive: state != 0,
            draining: state == 1,
            labels: labels(&format!("rack={rack}")),
            ..host(index as u8, free)
        }).collect()
    }
}

proptest! {
    #[test]
    fn placements_keep_the_rules(
        machines in machines(),
        hosts in hosts(),
        current in proptest::collection::btree_map(0usize..12, 0u8..6, 0..12),
    ) {
        let current: BTreeMap<MachineName, HostId> = current
            .into_iter()
            .map(|(machine, host)| (format!("m{machine}").parse().unwrap(), HostId([host; 16])))
            .collect();
        let result = place(&machines, &hosts, &current);
        let reversed = |list: &[Wanted]| list.iter().rev().cloned().collect::<Vec<_>>();
        let mirrored: Vec<Candidate> = hosts.iter().rev().cloned().collect();
        prop_assert_eq!(&result, &place(&reversed(&machines), &mirrored, &current), "any order");
        match result {
            Ok(placed) => {
                prop_assert_eq!(placed.len(), machines.len());
                for machine in &machines {
                    let host = hosts.iter().find(|host| host.id == placed[&machine.machine]).unwrap();
                    prop_assert_eq!(refusal(machine, host, u64::MAX), None);
                }
                for host in &hosts {
                    let used: u64 = machines.iter().filter(|m| placed[&m.machine] == host.id).map(|m| m.memory_bytes).sum();
                    prop_assert!(used <= host.free_memory_bytes);
                }
                prop_assert_eq!(place(&machines, &hosts, &placed).unwrap(), placed, "stable");
            }
            Err(error) => prop_assert!(!error.0.is_empty() && error.0.iter().all(|u| u.refusals.len() == hosts.len())),
        }
    }
}
