//! Two machines on one network, with memory, disks, a kernel and two frames in flight.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diorama_store::backend::Backend;
use diorama_store::*;
use diorama_topology as topology;

use crate::scratch;

pub const MIB: u64 = 1 << 20;
/// A check of everything.
pub const ALL: CheckOptions = CheckOptions { read_data: true, repair: false };
/// Not a whole number of blocks.
pub const RAM_BYTES: u64 = 3 * MIB + 64 * 1024;
/// Where memory is not zero: a page in the first block, one across two, and the last page. The second block is a
/// hole but for one page of zeros that is written.
pub const USED: [(u64, u64); 3] = [(8192, 4096), (3 * MIB - 4096, 8192), (RAM_BYTES - 4096, 4096)];

pub struct Sample {
    pub folder: tempfile::TempDir,
    pub store: Store,
    pub options: OpenOptions,
    /// Where the store is: `crate::place` says, so that the same tests run in a folder and in a bucket.
    pub location: Location,
    pub backend: Arc<dyn Backend>,
}

pub type Make = fn() -> Sample;

/// A store, and an encrypted one.
pub const BOTH: [Make; 2] = [Sample::new, Sample::encrypted];

pub fn key(seed: u8) -> Secret {
    Secret::key(vec![seed; 32].into()).unwrap()
}

pub fn none(_: u64, _: u64) {}

impl Sample {
    pub fn new() -> Self {
        let folder = scratch::folder();
        let location = crate::place::new(folder.path());
        let store = Store::open(&location).unwrap();
        Self::around(folder, location, store, OpenOptions::default())
    }

    pub fn encrypted() -> Self {
        let folder = scratch::folder();
        let location = crate::place::new(folder.path());
        let store = Store::create_encrypted(&location, &key(1), PassphraseCost::default(), "first").unwrap();
        Self::around(folder, location, store, OpenOptions { secret: Some(key(1)), signer: None })
    }

    /// An encrypted one that signs.
    pub fn signing() -> Self {
        Self::encrypted().signed().0
    }

    /// The same, and from now on it signs with a key of its own.
    pub fn signed(self) -> (Self, PublicKey) {
        let path = self.folder.path().join("signing.pem");
        fs::write(&path, &*SigningKey::generate().0).unwrap();
        self.signed_with(&path)
    }

    /// The same with this key.
    pub fn signed_with(mut self, path: &Path) -> (Self, PublicKey) {
        let signer = SigningKey::read(path).unwrap();
        let public = signer.public();
        self.options.signer = Some(signer);
        self.store = self.reopened();
        (self, public)
    }

    /// One whose store is somewhere else.
    #[allow(dead_code, reason = "what only a bucket's tests need")]
    pub fn in_place(location: impl Into<Location>) -> Self {
        let (folder, location) = (scratch::folder(), location.into());
        let store = Store::open(&location).unwrap();
        Self::around(folder, location, store, OpenOptions::default())
    }

    fn around(folder: tempfile::TempDir, location: Location, store: Store, options: OpenOptions) -> Self {
        let backend = location.backend().unwrap();
        fs::write(folder.path().join("kernel"), vec![9; 10_000]).unwrap();
        for machine in ["client", "server"] {
            fs::write(layer(folder.path(), machine, 0), machine.repeat(50_000)).unwrap();
        }
        Self { folder, store, options, location, backend }
    }

    /// One whose store is in a folder, wherever others are.
    #[allow(dead_code, reason = "what only a bucket's tests need")]
    pub fn in_folder() -> Self {
        let folder = scratch::folder();
        let location = Location::Folder(folder.path().join("store"));
        let store = Store::open(&location).unwrap();
        Self::around(folder, location, store, OpenOptions::default())
    }

    /// Whole and as it was, for whoever has the store open and whoever opens it now.
    pub fn assert_whole(&self, id: &SnapshotId, seed: u8) {
        for store in [&self.store, &self.reopened()] {
            assert!(store.verify(id, &mut none).unwrap().is_sound());
            self.restores(store, id, seed).unwrap();
            assert!(store.check(ALL, &mut none).unwrap().is_sound());
        }
        assert_eq!(self.names_in("incoming"), [""; 0]);
    }

    /// Everything that a restore reads, compared with what was put.
    pub fn restores(&self, store: &Store, id: &SnapshotId, seed: u8) -> Result<(), StoreError> {
        let stored = store.load(id)?;
        assert_eq!(store.read_frames(&stored)?, frames(seed));
        let copy = || scratch::file();
        for machine in &stored.manifest.machines {
            let ram_copy = copy();
            store.copy_ram(&stored, &machine.name, &ram_copy, &mut none)?;
            assert!(contents(&ram_copy) == contents(&ram(seed)), "memory of {}", machine.name);
            assert_eq!(store.read_state(&stored, &machine.name)?, state(seed));
            let layer_copy = copy();
            store.copy_layer(&machine.disks[0].layers[0], &layer_copy, &mut none)?;
            assert_eq!(contents(&layer_copy), machine.name.repeat(50_000).as_bytes());
            let kernel_copy = copy();
            store.copy_blob(machine.kernel.as_ref().unwrap(), &kernel_copy)?;
            assert_eq!(contents(&kernel_copy), vec![9; 10_000]);
        }
        Ok(())
    }

    pub fn commit(&self, name: &str, seed: u8) -> SnapshotId {
        let writer = self.store.begin().unwrap();
        let manifest = self.put_all(&writer, name, seed).unwrap();
        writer.commit(manifest).unwrap()
    }

    /// A snapshot of one machine with this memory and device state, and no disks.
    pub fn commit_memory(&self, store: &Store, name: &str, ram: &File, state: &[u8]) -> SnapshotId {
        let writer = store.begin().unwrap();
        let bytes = ram.metadata().unwrap().len();
        let ram = writer.put_ram("client", ram, bytes, &mut none).unwrap();
        let state = writer.put_bytes(Piece::DeviceState, "client", state).unwrap();
        let frames = writer.put_frames(&frames(1)).unwrap();
        let manifest = manifest(name, vec![machine("client", ram, state)], frames, writer.seal().unwrap());
        writer.commit(manifest).unwrap()
    }

    /// Puts everything, each machine from a thread of its own.
    pub fn put_all(&self, writer: &Writer, name: &str, seed: u8) -> Result<Manifest, StoreError> {
        let machines = std::thread::scope(|scope| {
            let threads = ["client", "server"]
                .map(|machine| scope.spawn(move || put_machine(self.folder.path(), writer, machine, seed)));
            threads.map(|thread| thread.join().unwrap()).into_iter().collect::<Result<Vec<_>, _>>()
        })?;
        let frames = writer.put_frames(&frames(seed))?;
        Ok(manifest(name, machines, frames, writer.seal()?))
    }

    /// The packs that appear while `make` runs.
    pub fn new_packs<T>(&self, make: impl FnOnce() -> T) -> (T, Vec<PathBuf>) {
        let before = self.names_in("packs");
        let made = make();
        let new = self.names_in("packs").into_iter().filter(|pack| !before.contains(pack));
        let root = self.root().join("packs");
        (made, new.map(|pack| root.join(pack)).collect())
    }

    pub fn manifest_file(&self, id: &SnapshotId) -> PathBuf {
        self.root().join(format!("snapshots/{id}.json"))
    }

    /// The object that says who has this name in the environment `pair`.
    pub fn name_file(&self, name: &str, id: &SnapshotId) -> PathBuf {
        let plain = self.root().join("names/pair").join(name);
        if self.options.secret.is_none() {
            return plain;
        }
        // What it is called is hidden; it is the one that goes missing with its snapshot's name.
        let folder = self.names_in("names").pop().unwrap();
        let names = self.names_in(&format!("names/{folder}"));
        let leads = |file: &String| {
            let path = self.root().join("names").join(&folder).join(file);
            let aside = self.root().join("aside");
            fs::rename(&path, &aside).unwrap();
            let gone = self.store.find_name("pair", name).unwrap() != Some(*id);
            fs::rename(&aside, &path).unwrap();
            gone
        };
        let file = names.iter().find(|file| leads(file)).unwrap();
        self.root().join("names").join(&folder).join(file)
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The store as another process sees it.
    pub fn reopened(&self) -> Store {
        Store::open_with(&self.location, &self.options).unwrap()
    }

    pub fn names_in(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.backend.list(folder).unwrap().into_iter().map(|object| object.name).collect();
        names.sort();
        names
    }
}

pub fn layer(folder: &Path, machine: &str, index: usize) -> PathBuf {
    folder.join(format!("{machine}-{index}.qcow2"))
}

pub fn ram(seed: u8) -> File {
    let file = scratch::file();
    file.set_len(RAM_BYTES).unwrap();
    for (offset, bytes) in USED {
        file.write_all_at(&vec![seed; bytes as usize], offset).unwrap();
    }
    file.write_all_at(&[0; 4096], MIB + 4096).unwrap();
    file
}

/// Device state: what is in no other snapshot, and does not compress to nothing.
pub fn state(seed: u8) -> Vec<u8> {
    noise(u64::from(seed), 150_000)
}

/// Bytes that do not repeat.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut all = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut all);
    all
}

pub fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub fn frames(seed: u8) -> Vec<StoredFrame> {
    ["client", "server"]
        .map(|machine| StoredFrame {
            network: "lan".into(),
            machine: machine.into(),
            nic: 0,
            colour: 3,
            after_cut_ns: 1_000,
            bytes: vec![seed; 60],
        })
        .into()
}

fn put_machine(folder: &Path, writer: &Writer, name: &str, seed: u8) -> Result<MachineRecord, StoreError> {
    let ram = writer.put_ram(name, &ram(seed), RAM_BYTES, &mut none)?;
    let mut machine = machine(name, ram, writer.put_bytes(Piece::DeviceState, name, &state(seed))?);
    machine.disks.push(DiskRecord {
        name: "root".into(),
        layers: vec![writer.put_layer(name, "root", 0, LayerFormat::Qcow2, &layer(folder, name, 0))?],
        base: None,
        virtual_bytes: 64 * MIB,
    });
    machine.kernel = Some(writer.put_blob(&folder.join("kernel"))?);
    Ok(machine)
}

fn machine(name: &str, ram: RamRecord, device_state: FileRecord) -> MachineRecord {
    MachineRecord {
        name: name.into(),
        host: "here".into(),
        state: MachineState::Running,
        pause_us: 2_100,
        stall_us: 2_900,
        drain_incomplete: false,
        hardware: Hardware {
            qemu_version: "7.2.22".into(),
            machine_type: "pc-q35-7.2".into(),
            cpu_model: "qemu64".into(),
            accelerator: "tcg".into(),
            vcpus: 2,
            memory_bytes: RAM_BYTES,
            tb_size_mib: Some(32),
        },
        ram,
        device_state,
        disks: Vec::new(),
        kernel: None,
        initrd: None,
        cmdline: Some("console=ttyS0".into()),
    }
}

fn manifest(name: &str, machines: Vec<MachineRecord>, frames: FileRecord, bytes: Bytes) -> Manifest {
    Manifest {
        format: FORMAT.into(),
        name: name.into(),
        message: "a message".into(),
        environment: "pair".into(),
        parent: None,
        created: "2026-01-02T03:04:05Z".into(),
        capture: Capture::Live,
        in_flight_policy: InFlightPolicy::Record,
        specification: environment(),
        cut: CutRecord { epoch: 4, skew_us: 310, hosts: 1, attempt: "5e".repeat(16) },
        networks: vec![NetworkRecord {
            name: "lan".into(),
            accounting: Accounting {
                sent_before: 10,
                delivered_before: 7,
                in_flight: 2,
                dropped: Dropped { queue_full: 1, ..Dropped::default() },
                unaccounted: 0,
            },
            learned: vec![LearnedRecord {
                mac: "52:54:00:00:00:01".into(),
                machine: "client".into(),
                nic: 0,
            }],
        }],
        machines,
        frames,
        bytes,
    }
}

fn environment() -> topology::Environment {
    let machine = |name: &str, mac: &str| topology::Machine {
        name: name.parse().unwrap(),
        boot: topology::Boot::BuiltIn { image: "micro".into() },
        cpus: 2,
        memory_bytes: 256 * MIB,
        cpu_model: None,
        accelerator: topology::Accelerator::Auto,
        nics: vec![topology::Nic {
            network: "lan".parse().unwrap(),
            mac: mac.parse().unwrap(),
            address: None,
        }],
        host: None,
        labels: Default::default(),
        disks: vec![],
    };
    topology::Environment {
        name: "pair".parse().unwrap(),
        machines: vec![machine("client", "52:54:00:00:00:01"), machine("server", "52:54:00:00:00:02")],
        networks: vec![topology::Network { name: "lan".parse().unwrap(), mtu: 1500, queue_bytes: MIB }],
    }
}
