//! What a run asks of the file system it is kept on: that a rename replaces, that bytes and names can be made to last, that
//! a lock keeps a second supervisor out.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Finding, judge::readable};

/// A sync that takes longer makes checkpoints slow.
const SLOW_SYNC: Duration = Duration::from_secs(2);

/// What was tried in the run directory, or in the nearest folder above it that exists.
#[derive(Debug)]
pub struct Probe {
    pub folder: PathBuf,
    /// What it is: "ext4 or ext3", "NFS".
    pub kind: String,
    /// Whether it goes with the machine's memory.
    pub in_memory: bool,
    /// For this user; `None` when the system does not say.
    pub free_bytes: Option<u64>,
    /// Each with what the system said when it failed.
    pub write: Result<(), String>,
    pub sync: Result<Duration, String>,
    pub rename: Result<(), String>,
    pub lock: Result<(), String>,
}

/// Tries all of it, in a folder of its own that goes again.
pub fn probe(run_dir: &Path) -> Probe {
    let folder = run_dir.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned();
    let kind = kind_of(&folder);
    let own = folder.join(format!(".mentee-doctor-{}", std::process::id()));
    let not_tried = || "not tried: nothing can be written".to_owned();
    let mut probe = Probe {
        in_memory: kind == "memory",
        kind,
        free_bytes: free_bytes(&folder),
        folder,
        write: fs::create_dir(&own).map_err(text),
        sync: Err(not_tried()),
        rename: Err(not_tried()),
        lock: Err(not_tried()),
    };
    if probe.write.is_ok() {
        probe.write = fs::write(own.join("old"), b"old").map_err(text);
        if probe.write.is_ok() {
            probe.sync = synced(&own).map_err(text);
            probe.rename = renamed(&own);
            probe.lock = locked(&own);
        }
        // What could not be removed is a few bytes under a name that says whose they are.
        let _ = fs::remove_dir_all(&own);
    }
    probe
}

/// What the probe means.
pub fn judge(probe: &Probe) -> Vec<Finding> {
    let place = probe.folder.display();
    let says = |what: &str| format!("{place} ({}): {what}", probe.kind);
    if let Err(error) = &probe.write {
        let remedy = "give a --run-dir that you may write to";
        return vec![Finding::fault("files", says(&format!("cannot be written: {error}")), remedy)];
    }
    let mut findings = Vec::new();
    let free = probe.free_bytes.map_or(String::new(), |free| format!(", {} free", readable(free)));
    match &probe.sync {
        Err(error) => findings.push(Finding::fault(
            "files",
            says(&format!("what is written cannot be made to last: {error}")),
            "checkpoints would not survive a crash: give another --run-dir",
        )),
        Ok(took) if *took > SLOW_SYNC => findings.push(Finding::note(
            "files",
            says(&format!("a sync takes {:.1} s", took.as_secs_f64())),
            "checkpoints will be slow: write fewer (checkpoint.every_steps), or use another file system",
        )),
        Ok(_) => {}
    }
    if let Err(error) = &probe.rename {
        findings.push(Finding::fault(
            "files",
            says(&format!("a rename does not replace: {error}")),
            "a reader could see half a checkpoint: give another --run-dir",
        ));
    }
    if let Err(error) = &probe.lock {
        findings.push(Finding::fault(
            "files",
            says(&format!("a lock keeps nobody out: {error}")),
            "two supervisors could write one run: mount it with locks (NFS, Lustre: flock), or give another --run-dir",
        ));
    }
    if findings.is_empty() {
        findings.push(match probe.in_memory {
            false => Finding::ok("files", says(&format!("rename, sync and locks work{free}"))),
            true => Finding::note(
                "files",
                says(&format!("rename, sync and locks work{free}")),
                "a restart of the machine takes the run with it: give a --run-dir on a disk",
            ),
        });
    }
    findings
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// How long it takes until a new file and its name are on the disk.
fn synced(own: &Path) -> io::Result<Duration> {
    let began = Instant::now();
    let mut file = File::create(own.join("synced"))?;
    file.write_all(&[0; 4096])?;
    file.sync_all()?;
    File::open(own)?.sync_all()?;
    Ok(began.elapsed())
}

/// A file takes the place of another, and a reader that has the old one open keeps it.
fn renamed(own: &Path) -> Result<(), String> {
    let (old, new) = (own.join("old"), own.join("new"));
    let reader = File::open(&old).map_err(text)?;
    fs::write(&new, b"new").map_err(text)?;
    fs::rename(&new, &old).map_err(text)?;
    let (now, before) = (fs::read(&old).map_err(text)?, io::read_to_string(&reader).map_err(text)?);
    match (now == b"new", before == "old") {
        (true, true) => Ok(()),
        (false, _) => Err("the old content is still there".to_owned()),
        (_, false) => Err("who reads the old file loses it".to_owned()),
    }
}

/// A second open file does not get the lock that a first one holds, and gets it afterwards.
fn locked(own: &Path) -> Result<(), String> {
    let path = own.join("synced");
    let open =
        || File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(text);
    let take = |file: &File| {
        // SAFETY: the descriptor is open as long as `file`.
        let code = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    let (first, second) = (open()?, open()?);
    take(&first).map_err(text)?;
    if take(&second).is_ok() {
        return Err("two have it at once".to_owned());
    }
    drop(first);
    take(&second).map_err(text)
}

/// What a file system is called, by its number in `statfs(2)`.
pub fn kind_of(path: &Path) -> String {
    let Some(magic) = status(path).map(|status| status.f_type as u64) else { return "unknown".to_owned() };
    let name = match magic & 0xffff_ffff {
        0x0000_ef53 => "ext2, ext3 or ext4",
        0x5846_5342 => "XFS",
        0x9123_683e => "Btrfs",
        0x2fc1_2fc1 => "ZFS",
        0x794c_7630 => "overlay",
        0x0102_1994 => "memory",
        0x0000_6969 => "NFS",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x00c3_6400 => "Ceph",
        0x6573_5546 => "FUSE",
        other => return format!("file system {other:#x}"),
    };
    name.to_owned()
}

fn free_bytes(folder: &Path) -> Option<u64> {
    let status = status(folder)?;
    Some(status.f_bavail.saturating_mul(u64::try_from(status.f_frsize).ok()?))
}

fn status(path: &Path) -> Option<libc::statfs> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: all fields may be zero.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is zero-terminated and lives over the call, which fills `status`.
    (unsafe { libc::statfs(path.as_ptr(), &raw mut status) } == 0).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_folder_to_be_is_tried_in_the_one_above_and_left_clean() {
        let folder = tempfile::tempdir().expect("a folder");
        let probe = probe(&folder.path().join("runs/new"));
        assert_eq!(probe.folder, folder.path());
        assert!(probe.write.is_ok() && probe.sync.is_ok(), "{probe:?}");
        assert!(probe.rename.is_ok() && probe.lock.is_ok(), "{probe:?}");
        assert!(probe.free_bytes.is_some_and(|free| free > 0));
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 0);
        assert!(judge(&probe).iter().all(|finding| finding.level != Level::Fault));
    }

    #[test]
    fn each_failure_has_its_line() {
        let well = || Probe {
            folder: "/runs".into(),
            kind: "NFS".into(),
            in_memory: false,
            free_bytes: Some(5 << 30),
            write: Ok(()),
            sync: Ok(Duration::from_millis(5)),
            rename: Ok(()),
            lock: Ok(()),
        };
        let said = |probe: Probe| judge(&probe).iter().map(Finding::line).collect::<Vec<_>>().join("\n");
        assert_eq!(said(well()), "ok    files       /runs (NFS): rename, sync and locks work, 5.0 GiB free");
        assert_eq!(
            said(Probe { lock: Err("two have it at once".into()), ..well() }),
            "FAULT files       /runs (NFS): a lock keeps nobody out: two have it at once: two supervisors could write \
             one run: mount it with locks (NFS, Lustre: flock), or give another --run-dir"
        );
        assert!(said(Probe { write: Err("denied".into()), ..well() }).contains("cannot be written: denied"));
        assert!(said(Probe { rename: Err("x".into()), ..well() }).starts_with("FAULT "));
        assert!(said(Probe { sync: Err("x".into()), ..well() }).starts_with("FAULT "));
        assert!(said(Probe { sync: Ok(Duration::from_secs(3)), ..well() }).starts_with("note "));
        assert!(said(Probe { in_memory: true, ..well() }).starts_with("note "));
    }
}
