//! Reading `machines`: what each boots, its size and its disks.

use std::collections::{BTreeMap, HashMap};

use crate::document::{Key, Node, Value};
use crate::environment::{Accelerator, Boot, Disk, Machine};
use crate::limits::{
    CPUS, DEFAULT_MEMORY_BYTES, DISK_BYTES, DISK_STEP_BYTES, MAX_CMDLINE_BYTES, MAX_CPU_MODEL_BYTES,
    MAX_DISKS, MAX_LABELS, MAX_MACHINES, MEMORY_BYTES, MEMORY_STEP_BYTES,
};
use crate::names::{DiskName, HostName, LabelName, LabelValue, MachineName};
use crate::problem::{At, Excerpt, listed, nearest};

use super::Reader;
use super::fields::Fields;
use super::nic::{NicDrafts, Taken};

/// The fields of a machine.
pub(crate) const MACHINE_FIELDS: &[&str] = &[
    "image",
    "kernel",
    "initrd",
    "cmdline",
    "cpus",
    "memory",
    "cpu",
    "accelerator",
    "nics",
    "disks",
    "host",
    "labels",
];
/// The fields of a disk.
pub(crate) const DISK_FIELDS: &[&str] = &["name", "size", "image"];

/// The longest disk name, in characters: the length of a virtio disk's serial number.
const MAX_DISK_NAME_LENGTH: usize = 20;
/// The name of the disk that a machine boots from, where it boots from one.
const BOOT_DISK: &str = "root";

impl Reader<'_> {
    /// All machines, or `None` when one of them cannot be read.
    pub(super) fn machines(&mut self, fields: &Fields<'_>, networks: &[&str]) -> Option<Vec<Machine>> {
        let entries = match fields.value("machines").map(|node| (node, &node.value)) {
            Some((_, Value::Map(entries))) if !entries.is_empty() => entries,
            Some((node, Value::Map(_) | Value::Null)) => {
                self.no_machines(&node.at);
                return None;
            }
            Some((node, _)) => {
                self.problems.push(node.unexpected("a mapping from each machine's name to its settings"));
                return None;
            }
            None => {
                self.no_machines(&At::start());
                return None;
            }
        };
        if let Some((key, _)) = entries.get(MAX_MACHINES) {
            let message = format!("{} machines; an environment has at most {MAX_MACHINES}", entries.len());
            self.problems.push(key.at.problem(message, "one too many"));
        }
        let mut taken = Taken::default();
        let mut drafts: Vec<(Machine, NicDrafts)> = Vec::new();
        for (name, key, node) in self.named("machine", &entries[..entries.len().min(MAX_MACHINES)]) {
            if self.problems.is_full() {
                break;
            }
            drafts.extend(self.machine(name, key, node, networks, &mut taken));
        }
        if !self.problems.is_empty() {
            return None;
        }
        // Only now are all MAC addresses known that the file gives, and the others can keep clear of them.
        Some(drafts.into_iter().map(|(machine, nics)| nics.attach(machine, &mut taken)).collect())
    }

    fn no_machines(&mut self, at: &At) {
        let problem = at.problem("the environment has no machines", "no machines");
        self.problems.push(problem.hint("the least is `machines: {one: {image: micro}}`"));
    }

    /// One machine, its NICs still apart.
    fn machine(
        &mut self,
        name: Option<MachineName>,
        key: &Key,
        node: &Node,
        networks: &[&str],
        taken: &mut Taken,
    ) -> Option<(Machine, NicDrafts)> {
        let entries = match &node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            _ => {
                self.problems.push(node.unexpected("a machine's settings, such as `{image: micro}`"));
                return None;
            }
        };
        let fields = Fields::read("a machine", entries, MACHINE_FIELDS, &mut self.problems);
        let boot = self.boot(&fields, key);
        let cpus = match fields.value("cpus") {
            Some(node) => self
                .whole_number(node, "a whole number of CPUs", &CPUS)
                .and_then(|cpus| u32::try_from(cpus).ok()),
            None => Some(1),
        };
        let memory_bytes = match fields.value("memory") {
            Some(node) => self.size(node, "a machine's memory", &MEMORY_BYTES, MEMORY_STEP_BYTES),
            None => Some(DEFAULT_MEMORY_BYTES),
        };
        let cpu_model = match fields.value("cpu") {
            Some(node) => self.cpu_model(node).map(Some),
            None => Some(None),
        };
        let accelerator = match fields.value("accelerator") {
            Some(node) => self.word(node, &["auto", "kvm", "tcg"]).map(|word| match word {
                "kvm" => Accelerator::Kvm,
                "tcg" => Accelerator::Tcg,
                _ => Accelerator::Auto,
            }),
            None => Some(Accelerator::Auto),
        };
        let nics = match fields.value("nics") {
            Some(node) => self.nics(node, key, networks, taken),
            None => Some(NicDrafts::default()),
        };
        let disks = match fields.value("disks") {
            Some(node) => self.disks(node, matches!(boot, Some(Boot::DiskImage { .. }))),
            None => Some(Vec::new()),
        };
        let host = match fields.value("host") {
            Some(node) => self.name::<HostName>(node, "a host's name").map(Some),
            None => Some(None),
        };
        let labels = match fields.value("labels") {
            Some(node) => self.labels(node),
            None => Some(BTreeMap::new()),
        };
        let machine = Machine {
            name: name?,
            boot: boot?,
            cpus: cpus?,
            memory_bytes: memory_bytes?,
            cpu_model: cpu_model?,
            accelerator: accelerator?,
            nics: Vec::new(),
            disks: disks?,
            host: host?,
            labels: labels?,
        };
        Some((machine, nics?))
    }

    /// The labels that the machine's host must carry.
    fn labels(&mut self, node: &Node) -> Option<BTreeMap<LabelName, LabelValue>> {
        let Value::Map(entries) = &node.value else {
            self.problems.push(node.unexpected("labels of hosts, such as `{rack: a}`"));
            return None;
        };
        if let Some((key, _)) = entries.get(MAX_LABELS) {
            let message = format!("{} labels; a machine asks for at most {MAX_LABELS}", entries.len());
            self.problems.push(key.at.problem(message, "one too many"));
            return None;
        }
        let mut labels = BTreeMap::new();
        for (name, _, node) in self.named::<LabelName>("label", entries) {
            let Some(text) = self.text(node, "a label's value as text, such as `a` or `'true'`") else {
                continue;
            };
            match text.parse::<LabelValue>() {
                Ok(value) => labels.extend(name.map(|name| (name, value))),
                Err(error) => self.problems.push(node.at.problem(error.to_string(), "not a label's value")),
            }
        }
        Some(labels)
    }

    fn boot(&mut self, fields: &Fields<'_>, machine: &Key) -> Option<Boot> {
        match (fields.get("image"), fields.get("kernel")) {
            (Some((image, _)), Some((kernel, _))) => {
                let message = format!("{} has both an `image` and a `kernel`", Excerpt(&machine.text));
                let hint = format!("it boots one of them: `image` is on line {}; remove one", image.at.line);
                self.problems.push(kernel.at.problem(message, "besides `image`").hint(hint));
                None
            }
            (None, None) => {
                let message = format!("{} has nothing to boot", Excerpt(&machine.text));
                let hint = "add `image: micro`, `image: ./disk.qcow2` or `kernel: ./vmlinuz`";
                self.problems.push(machine.at.problem(message, "no `image` and no `kernel`").hint(hint));
                None
            }
            (Some((_, image)), None) => {
                for without_kernel in ["initrd", "cmdline"] {
                    if let Some((key, _)) = fields.get(without_kernel) {
                        let message = format!(
                            "`{without_kernel}` belongs to a `kernel`, and this machine boots an `image`"
                        );
                        let hint = "remove it, or name a `kernel` instead of the `image`";
                        self.problems.push(key.at.problem(message, "without a `kernel`").hint(hint));
                    }
                }
                self.image(image)
            }
            (None, Some((_, kernel))) => {
                let kernel = self.file(kernel, "a kernel's path");
                let initrd = match fields.value("initrd") {
                    Some(node) => self.file(node, "an initial RAM disk's path").map(Some),
                    None => Some(None),
                };
                let cmdline = match fields.value("cmdline") {
                    Some(node) => self.cmdline(node),
                    None => Some(String::new()),
                };
                Some(Boot::Kernel { kernel: kernel?, initrd: initrd?, cmdline: cmdline? })
            }
        }
    }

    fn image(&mut self, node: &Node) -> Option<Boot> {
        let text = self.text(node, "a built-in image's name or a disk image's path")?;
        if text.contains(['/', '.']) {
            return self.file(node, "a disk image's path").map(|path| Boot::DiskImage { path });
        }
        if self.built_in_images.contains(&text) {
            return Some(Boot::BuiltIn { image: text.to_owned() });
        }
        let all = listed(self.built_in_images.iter().copied());
        let meant = match nearest(text, self.built_in_images.iter().copied()) {
            Some(word) => format!("did you mean `{word}`? "),
            None => String::new(),
        };
        let hint = format!("{meant}Built in: {all}. A path has a `/` or a `.` in it, such as `./disk.qcow2`");
        let message = format!("{} is not a built-in image", Excerpt(text));
        self.problems.push(node.at.problem(message, "unknown image").hint(hint));
        None
    }

    fn cmdline(&mut self, node: &Node) -> Option<String> {
        // The one place where "nothing" is a usual value.
        let text =
            if matches!(node.value, Value::Null) { "" } else { self.text(node, "a kernel's command line")? };
        if text.len() > MAX_CMDLINE_BYTES {
            let message =
                format!("the command line has {} bytes; a kernel takes {MAX_CMDLINE_BYTES}", text.len());
            self.problems.push(node.at.problem(message, "too long"));
            return None;
        }
        // A folded block's last line end is not meant.
        let text = text.trim_end_matches('\n');
        if text.chars().any(char::is_control) {
            let problem = node
                .at
                .problem("the command line has a line end or another control character", "not one line");
            self.problems.push(problem.hint("write long ones as a folded block: `cmdline: >-`"));
            return None;
        }
        Some(text.to_owned())
    }

    fn cpu_model(&mut self, node: &Node) -> Option<String> {
        let expected = "a CPU model in QEMU's words, such as `qemu64` or `Skylake-Client-v1,-avx`";
        let text = self.text(node, expected)?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.,+=:".contains(c);
        if text.is_empty() || text.len() > MAX_CPU_MODEL_BYTES || !text.chars().all(allowed) {
            self.problems.push(node.unexpected(expected));
            return None;
        }
        Some(text.to_owned())
    }

    fn disks(&mut self, node: &Node, boots_from_disk: bool) -> Option<Vec<Disk>> {
        let Value::List(nodes) = &node.value else {
            self.problems.push(node.unexpected("a list of disks, such as `[{name: data, size: 1GiB}]`"));
            return None;
        };
        if let Some(extra) = nodes.get(MAX_DISKS) {
            let message = format!("{} disks; a machine has at most {MAX_DISKS}", nodes.len());
            self.problems.push(extra.at.problem(message, "one too many"));
        }
        let mut first_lines = HashMap::new();
        let disks =
            nodes.iter().take(MAX_DISKS).map(|node| self.disk(node, boots_from_disk, &mut first_lines));
        // Not collected into an option at once: that would stop at the first disk with a problem.
        let disks: Vec<Option<Disk>> = disks.collect();
        disks.into_iter().collect()
    }

    fn disk(
        &mut self,
        node: &Node,
        boots_from_disk: bool,
        first_lines: &mut HashMap<DiskName, u32>,
    ) -> Option<Disk> {
        let Value::Map(entries) = &node.value else {
            self.problems.push(node.unexpected("a disk, such as `{name: data, size: 1GiB}`"));
            return None;
        };
        let fields = Fields::read("a disk", entries, DISK_FIELDS, &mut self.problems);
        let name = match fields.value("name") {
            Some(name) => self.disk_name(name, boots_from_disk, first_lines),
            None => {
                self.problems
                    .push(node.at.problem("the disk has no name", "no `name`").hint("add `name: data`"));
                None
            }
        };
        let size_bytes = match fields.value("size") {
            Some(node) => self.size(node, "a disk's size", &DISK_BYTES, DISK_STEP_BYTES).map(Some),
            None => Some(None),
        };
        let image = match fields.value("image") {
            Some(node) => self.file(node, "a disk image's path").map(Some),
            None => Some(None),
        };
        if fields.value("size").is_none() && fields.value("image").is_none() {
            let problem =
                node.at.problem("the disk has neither a size nor an image", "no `size` and no `image`");
            self.problems.push(problem.hint("add `size: 1GiB` for an empty disk, or `image: ./data.qcow2`"));
            return None;
        }
        Some(Disk { name: name?, size_bytes: size_bytes?, image: image? })
    }

    fn disk_name(
        &mut self,
        node: &Node,
        boots_from_disk: bool,
        first_lines: &mut HashMap<DiskName, u32>,
    ) -> Option<DiskName> {
        let name: DiskName = self.name(node, "a disk's name")?;
        if name.len() > MAX_DISK_NAME_LENGTH || !name.starts_with(|first: char| first.is_ascii_lowercase()) {
            let message = format!("`{name}` cannot be a disk's name");
            let hint = format!(
                "a disk's name starts with a letter and has at most {MAX_DISK_NAME_LENGTH} characters: QEMU and the \
                 guest know the disk by it"
            );
            self.problems.push(node.at.problem(message, "not a disk's name").hint(hint));
            return None;
        }
        if boots_from_disk && name.as_str() == BOOT_DISK {
            let message = format!("the disk `{BOOT_DISK}` is the one that this machine boots from");
            self.problems.push(node.at.problem(message, "already taken").hint("give this one another name"));
            return None;
        }
        if let Some(first_line) = first_lines.get(&name) {
            let message = format!("the machine has two disks `{name}`");
            let hint = format!("the first is on line {first_line}: rename or remove one");
            self.problems.push(node.at.problem(message, "declared again").hint(hint));
            return None;
        }
        first_lines.insert(name.clone(), node.at.line);
        Some(name)
    }
}
