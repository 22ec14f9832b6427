//! What holds for any text and any environment. A failure prints its least input, and its seed as the environment
//! variable that repeats it.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use diorama_topology::{
    Accelerator, Boot, Disk, Environment, Files, InterfaceAddress, MacAddress, Machine, Network, Nic,
    Problem, SourceFile, parse,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;

#[path = "../../../testing/mangle.rs"]
mod mangle;

struct AllPresent;

impl Files for AllPresent {
    fn is_file(&self, _: &Path) -> bool {
        true
    }
}

fn read(text: &str) -> Result<Environment, Vec<Problem>> {
    parse(&SourceFile { name: "diorama.yaml", text, folder: Path::new("/lab") }, &AllPresent, &["micro"])
}

/// What holds of any answer.
fn check(text: &str) {
    match read(text) {
        Ok(environment) => {
            let again = read(&environment.to_yaml().unwrap());
            assert_eq!(again.as_ref(), Ok(&environment));
            let macs: Vec<_> = environment.machines.iter().flat_map(|m| &m.nics).map(|nic| nic.mac).collect();
            assert_eq!(macs.iter().collect::<HashSet<_>>().len(), macs.len());
            for nic in environment.machines.iter().flat_map(|m| &m.nics) {
                assert!(environment.network(&nic.network).is_some());
            }
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            assert!(problems.is_sorted_by_key(|problem| (problem.line, problem.column)));
            for problem in problems {
                assert!(problem.line >= 1 && problem.column >= 1);
                assert!(problem.span.clone().is_none_or(|span| text.get(span).is_some()));
                assert!(!problem.to_string().chars().any(char::is_control));
            }
        }
    }
}

const FULL: &str = include_str!("full.yaml");

#[test]
fn the_file_that_is_mangled_below_is_right() {
    assert_eq!(read(FULL).map(|environment| environment.machines.len()), Ok(4));
}

/// Many small documents in one, and each bound of the parser's.
#[test]
fn mangled_files_of_any_bytes() {
    let anchors = format!("{FULL}\nx: &a [1, 2]\ny: &b [*a, *a, *a]\nz: [*b, *b, *b]\n");
    for whole in [FULL, &anchors] {
        proptest!(mangle::config(256), |(how in mangle::mangles())| {
            check(&String::from_utf8_lossy(&mangle::mangled(whole.as_bytes(), &how)));
        });
    }
}

/// What stands for more than anybody can have is refused before it is had.
#[test]
fn a_few_bytes_that_mean_many_are_refused() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..40 {
        let last = level - 1;
        bomb.push_str(&format!("a{level}: &a{level} [*a{last}, *a{last}, *a{last}, *a{last}, *a{last}]\n"));
    }
    let deep = format!("name: {}", "[".repeat(200_000));
    let wide = format!("machines: {{{}}}", "? ".repeat(100_000));
    for text in [&bomb, &deep, &wide] {
        let begun = std::time::Instant::now();
        check(text);
        assert!(read(text).is_err());
        assert!(begun.elapsed().as_secs() < 20, "{} bytes took {:?}", text.len(), begun.elapsed());
    }
}

proptest! {
    #![proptest_config(mangle::config(512))]

    #[test]
    fn any_bytes(bytes in vec(any::<u8>(), 0..300)) {
        check(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn anything_like_yaml(text in "([a-c:{}\\[\\],\\-?!&*<|>'\"#% \n\t\r~0é]|name|machines|networks|image|micro|nics|: |\n  ){0,60}") {
        check(&text);
    }

    #[test]
    fn a_mangled_file(cuts in vec((any::<Index>(), 0usize..12, "[a-z0-9:{}\\[\\],&*<'\"\n ~/.-]{0,6}"), 1..4)) {
        let mut characters: Vec<char> = FULL.chars().collect();
        for (start, length, replacement) in cuts {
            let start = start.index(characters.len());
            let end = (start + length).min(characters.len());
            characters.splice(start..end, replacement.chars());
        }
        check(&characters.into_iter().collect::<String>());
    }

    #[test]
    fn a_written_environment_reads_back_equal(environment in environment()) {
        let text = environment.to_yaml().unwrap();
        prop_assert_eq!(read(&text), Ok(environment.clone()), "{}", text);
        let json = serde_json::to_string(&environment).unwrap();
        prop_assert_eq!(serde_json::from_str::<Environment>(&json).unwrap(), environment);
    }
}

const NAME: &str = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?";

fn path() -> impl Strategy<Value = PathBuf> {
    "(/[a-zA-Z0-9 ._:#'\"~é{}\n-]{1,12}){1,3}".prop_map(PathBuf::from)
}

fn boot() -> impl Strategy<Value = Boot> {
    prop_oneof![
        Just(Boot::BuiltIn { image: "micro".to_owned() }),
        path().prop_map(|path| Boot::DiskImage { path }),
        (path(), option::of(path()), "[ -~é]{0,40}").prop_map(|(kernel, initrd, cmdline)| Boot::Kernel {
            kernel,
            initrd,
            cmdline
        }),
    ]
}

fn disk() -> impl Strategy<Value = (Option<u64>, Option<PathBuf>)> {
    let size = (1u64 << 11..1 << 20).prop_map(|sectors| sectors * 512);
    (option::of(size), path(), any::<bool>())
        .prop_map(|(size, path, overlay)| (size, (overlay || size.is_none()).then_some(path)))
}

/// One machine's parts, without what must differ between machines.
type Parts = (
    Boot,
    u32,
    u64,
    Option<String>,
    Accelerator,
    Vec<(Index, bool, bool)>,
    Vec<(Option<u64>, Option<PathBuf>)>,
    (Option<String>, BTreeMap<String, String>),
);

fn parts() -> impl Strategy<Value = Parts> {
    let accelerator = prop_oneof![Just(Accelerator::Auto), Just(Accelerator::Kvm), Just(Accelerator::Tcg)];
    let cpu = option::of("[a-zA-Z0-9_.,+=:-]{1,20}");
    (
        boot(),
        1u32..=64,
        32u64..=1 << 20,
        cpu,
        accelerator,
        vec(any::<(Index, bool, bool)>(), 0..=4),
        vec(disk(), 0..=3),
        (option::of(NAME), btree_map(NAME, "[A-Za-z0-9._-]{1,63}", 0..4)),
    )
}

fn environment() -> impl Strategy<Value = Environment> {
    let names =
        || proptest::collection::hash_set(NAME, 1..5).prop_map(|set| set.into_iter().collect::<Vec<_>>());
    let network = (68u16..=65000, 128u64 << 10..=1 << 30);
    (NAME, names(), names(), vec(parts(), 4), vec(network, 4)).prop_map(
        |(name, machines, networks, parts, settings)| {
            let networks: Vec<Network> = networks
                .iter()
                .zip(settings)
                .map(|(name, (mtu, queue_bytes))| Network { name: name.parse().unwrap(), mtu, queue_bytes })
                .collect();
            let mut nic_count = 0u32;
            let mut nic = |(network, v4, v6): (Index, bool, bool)| {
                nic_count += 1;
                let [_, _, high, low] = nic_count.to_be_bytes();
                let ip = match (v4, v6) {
                    (true, _) => Some((IpAddr::from(Ipv4Addr::new(10, 1, high, low)), 8)),
                    (false, true) => {
                        Some((IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, nic_count as u16)), 64))
                    }
                    (false, false) => None,
                };
                Nic {
                    network: networks[network.index(networks.len())].name.clone(),
                    mac: MacAddress::new([0x02, 0, 0, 0, high, low]).unwrap(),
                    address: ip.map(|(ip, prefix)| InterfaceAddress::new(ip, prefix).unwrap()),
                }
            };
            let machines = machines
                .iter()
                .zip(parts)
                .map(
                    |(
                        name,
                        (boot, cpus, memory_mib, cpu_model, accelerator, nics, disks, (host, labels)),
                    )| Machine {
                        name: name.parse().unwrap(),
                        boot,
                        cpus,
                        memory_bytes: memory_mib << 20,
                        cpu_model,
                        accelerator,
                        nics: nics.into_iter().map(&mut nic).collect(),
                        disks: disks
                            .into_iter()
                            .enumerate()
                            .map(|(index, (size_bytes, image))| Disk {
                                name: format!("disk-{index}").parse().unwrap(),
                                size_bytes,
                                image,
                            })
                            .collect(),
                        host: host.map(|host| host.parse().unwrap()),
                        labels: labels
                            .into_iter()
                            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                            .collect(),
                    },
                )
                .collect();
            Environment { name: name.parse().unwrap(), machines, networks }
        },
    )
}
