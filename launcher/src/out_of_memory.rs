//! Whether the kernel has ended processes for want of memory: whoever waits for them hears of SIGKILL and no more.

use std::fs;
use std::path::{Path, PathBuf};

/// How many processes of this one's memory cgroup the kernel has ended so; `None` where it does not say. Workers that are
/// started on this machine without Slurm's srun are in that group.
pub fn kills() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    counters(&groups).iter().find_map(|path| count(&fs::read_to_string(path).ok()?))
}

/// The files that may count them, the one to be believed first, from the text of `/proc/self/cgroup` (see cgroups(7)).
fn counters(groups: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (mount, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.events"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.oom_control")
            }
            _ => continue,
        };
        let mount = Path::new(mount);
        // A container sees its own group as the root of the mount, whatever it is called outside.
        paths.extend([mount.join(group.trim_start_matches('/')).join(file), mount.join(file)]);
    }
    paths
}

/// From the text of `memory.events` or `memory.oom_control`.
fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_both_versions_are_found() {
        let named = |groups: &str| -> Vec<String> {
            counters(groups).iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(
            named("0::/system.slice/slurmstepd.scope/job_7/step_batch\n"),
            [
                "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_batch/memory.events",
                "/sys/fs/cgroup/memory.events"
            ]
        );
        assert_eq!(
            named("9:name=systemd:/\n4:cpu,memory:/a:b\n0::/\n"),
            [
                "/sys/fs/cgroup/memory/a:b/memory.oom_control",
                "/sys/fs/cgroup/memory/memory.oom_control",
                "/sys/fs/cgroup/memory.events",
                "/sys/fs/cgroup/memory.events"
            ]
        );
        assert_eq!(named("3:cpuset:/x\nnonsense\n"), [""; 0]);
    }

    #[test]
    fn kills_are_read() {
        assert_eq!(count("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n"), Some(2));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"), Some(5));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\n"), None);
    }
}
