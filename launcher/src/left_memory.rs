//! Shared memory that killed workers leave behind. An MPI library maps a file of `/dev/shm` into all ranks of a machine and
//! removes it at its orderly end; when the ranks are killed it stays, and takes memory until the machine restarts.
//!
//! What the workers of a run have mapped is noted while they live, in `RUN/.shm` (a supervisor that is killed too does not
//! forget), and removed when they are gone: only a file that is still the same, is ours, and that no process maps any
//! longer. So nothing of another program is ever touched, whatever its name.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mentee_config::replace::write_atomically;

use crate::processes::leftovers;
use crate::rundir::RunDir;

const SHARED_MEMORY: &str = "/dev/shm/";

/// A file of shared memory: its inode and path.
type Segment = (u64, PathBuf);

fn list(dir: &RunDir) -> PathBuf {
    dir.path().join(".shm")
}

/// Notes what the run's workers on this machine have mapped just now.
pub fn note(dir: &RunDir) {
    let workers = leftovers(dir);
    let mut segments = read(dir);
    let known = segments.len();
    for pid in workers {
        segments.extend(mapped(&fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default()));
    }
    if segments.len() == known {
        return;
    }
    let host = mentee_cluster::server::hostname();
    let mut text = format!("{host}\n");
    for (inode, path) in &segments {
        text.push_str(&format!("{inode} {}\n", path.display()));
    }
    if let Err(error) = write_atomically(&list(dir), text.as_bytes()) {
        tracing::debug!("cannot note the workers' shared memory: {error}");
    }
}

/// Removes what workers that are gone have left.
pub fn clean(dir: &RunDir) {
    let mut left = read(dir);
    left.retain(|(inode, path)| {
        fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.ino() == *inode && is_ours(&file))
    });
    let all = left.len();
    if !left.is_empty() {
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let maps = fs::read_to_string(process.path().join("maps")).unwrap_or_default();
            for segment in mapped(&maps) {
                left.remove(&segment);
            }
        }
    }
    for (_, path) in &left {
        match fs::remove_file(path) {
            Ok(()) => tracing::info!("removed {}, left by killed workers", path.display()),
            Err(error) => tracing::debug!("cannot remove {}: {error}", path.display()),
        }
    }
    // What is still mapped, by a worker that has not ended yet, is for the next time.
    if left.len() == all {
        let _ = fs::remove_file(list(dir));
    }
}

fn is_ours(file: &fs::Metadata) -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    file.uid() == unsafe { libc::geteuid() }
}

/// What was noted on this machine.
fn read(dir: &RunDir) -> BTreeSet<Segment> {
    let text = fs::read_to_string(list(dir)).unwrap_or_default();
    let mut lines = text.lines();
    if lines.next() != Some(mentee_cluster::server::hostname().as_str()) {
        return BTreeSet::new();
    }
    lines
        .filter_map(|line| {
            let (inode, path) = line.split_once(' ')?;
            let path = Path::new(path);
            let inside = path.parent() == Some(Path::new(SHARED_MEMORY));
            Some((inode.parse().ok()?, path.to_owned())).filter(|_| inside)
        })
        .collect()
}

/// The files of shared memory in the text of a `/proc/PID/maps` (see proc(5)) that have not been removed.
fn mapped(maps: &str) -> BTreeSet<Segment> {
    maps.lines()
        .filter_map(|line| {
            // address perms offset dev inode path
            let mut rest = line;
            let mut word = || {
                let (word, after) = rest.trim_start().split_once(' ')?;
                rest = after;
                Some(word)
            };
            let inode = [(); 5].map(|()| word())[4]?.parse().ok()?;
            let path = rest.trim_start();
            let wanted = path.starts_with(SHARED_MEMORY) && !path.ends_with(" (deleted)");
            wanted.then(|| (inode, PathBuf::from(path)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        let text = "\
7f00-7f01 rw-s 00000000 00:1a 42                         /dev/shm/mpich_shm_1_0
7f01-7f02 rw-s 00001000 00:1a 42                         /dev/shm/mpich_shm_1_0
7f02-7f03 rw-s 00000000 00:1a 43                         /dev/shm/gone (deleted)
7f03-7f04 r-xp 00000000 08:01 44                         /usr/lib/libc.so
7f04-7f05 rw-p 00000000 00:00 0
7f05-7f06 rw-p 00000000 00:00 0                          [heap]
";
        assert_eq!(mapped(text), BTreeSet::from([(42, PathBuf::from("/dev/shm/mpich_shm_1_0"))]));
    }

    #[test]
    fn only_what_nobody_maps_and_nobody_replaced_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = RunDir::at(folder.path()).expect("a path");
        let name =
            |part: &str| PathBuf::from(format!("{SHARED_MEMORY}mentee-test-{part}-{}", std::process::id()));
        let [left, replaced, used, other] = ["left", "replaced", "used", "other"].map(name);
        for path in [&left, &replaced, &used, &other] {
            fs::write(path, [0; 4096]).expect("shared memory can be written");
        }
        let inode = |path: &Path| fs::metadata(path).expect("there").ino();
        let host = mentee_cluster::server::hostname();
        let text = format!(
            "{host}\n{} {}\n{} {}\n{} {}\n1 /etc/passwd\n",
            inode(&left),
            left.display(),
            inode(&replaced) + 1,
            replaced.display(),
            inode(&used),
            used.display()
        );
        fs::write(list(&dir), text).expect("written");
        let file = fs::File::open(&used).expect("there");
        // SAFETY: a new mapping of one page of an open file; nothing else is touched.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                std::os::fd::AsRawFd::as_raw_fd(&file),
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        clean(&dir);
        assert_eq!([&left, &replaced, &used, &other].map(|path| path.exists()), [false, true, true, true]);
        assert!(list(&dir).exists(), "one is still mapped");
        // SAFETY: the mapping made above, used no more.
        unsafe { libc::munmap(address, 4096) };
        clean(&dir);
        assert!(!used.exists() && !list(&dir).exists());
        for path in [replaced, other] {
            fs::remove_file(path).expect("there");
        }
    }
}
