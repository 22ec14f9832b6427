//! The control groups that a process is in (cgroups(7)): they limit what it may have of memory and of processors.

use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// The groups of a process, of both versions.
#[derive(Debug, Clone)]
pub(crate) struct ControlGroups(String);

impl ControlGroups {
    pub(crate) fn of_this_process() -> Self {
        Self::read("/proc/self/cgroup")
    }

    /// What `/proc/PID/cgroup` says; without groups where there is no such file.
    pub(crate) fn read(path: &str) -> Self {
        Self(std::fs::read_to_string(path).unwrap_or_default())
    }

    /// The folders of its group of version 2 and of those around it, from the outermost.
    pub(crate) fn unified(&self) -> Vec<PathBuf> {
        let group = self.0.lines().find_map(|line| line.strip_prefix("0::/"));
        group.map_or_else(Vec::new, |group| folders(PathBuf::from(MOUNT), group))
    }

    /// The same of version 1, as far as it has this controller.
    pub(crate) fn with_controller(&self, controller: &str) -> Vec<PathBuf> {
        let group = self.group_with(controller);
        group.map_or_else(Vec::new, |group| folders(Path::new(MOUNT).join(controller), group))
    }

    /// Whether these two controllers of version 1 have it in groups of one name.
    pub(crate) fn is_the_same_with(&self, one: &str, other: &str) -> bool {
        self.group_with(one) == self.group_with(other)
    }

    fn group_with(&self, controller: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let (controllers, group) = line.split_once(':')?.1.split_once(":/")?;
            controllers.split(',').any(|name| name == controller).then_some(group)
        })
    }
}

/// The root is among them: within a container, it is the container's group, and has limits. Its name may be the name outside, which is
/// not found then.
fn folders(mount: PathBuf, group: &str) -> Vec<PathBuf> {
    let mut folders = vec![mount];
    for name in group.split('/').filter(|name| !name.is_empty()) {
        folders.push(folders[folders.len() - 1].join(name));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_in_a_group_and_in_those_around_it() {
        let groups = ControlGroups("3:cpu,cpuacct:/a\n1:name=systemd:/x\n0::/system.slice/x\n".to_owned());
        let text =
            |paths: Vec<PathBuf>| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(
            text(groups.unified()),
            ["/sys/fs/cgroup", "/sys/fs/cgroup/system.slice", "/sys/fs/cgroup/system.slice/x"]
        );
        assert_eq!(
            text(groups.with_controller("cpuacct")),
            ["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/cpuacct/a"]
        );
        assert!(groups.with_controller("memory").is_empty());
        assert!(groups.is_the_same_with("cpu", "cpuacct") && !groups.is_the_same_with("cpu", "memory"));
        assert_eq!(text(ControlGroups("0::/\n".to_owned()).unified()), ["/sys/fs/cgroup"]);
        assert!(ControlGroups::read("/proc/0/cgroup").unified().is_empty());
    }
}
