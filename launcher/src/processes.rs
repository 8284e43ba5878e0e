//! The processes of a run on this machine: found by what they were started as, and ended.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mentee_config::{counted, say};

use crate::failure::Failure;
use crate::rundir::{RunDir, resolved};

/// How long the workers of a supervisor that was killed get to end by themselves before a new one ends them.
const LEFTOVER_GRACE: Duration = Duration::from_secs(10);

/// Workers of a run here that have no supervisor: those of one that was killed a moment ago. They are this user's, their
/// command line has `--run-dir` and this directory, and it is this directory that they see there: containers that share their
/// processes may mount others at the same path. What only reads a run (`mentee-worker eval DIR`) is left alone.
pub fn leftovers(dir: &RunDir) -> Vec<libc::pid_t> {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let user = unsafe { libc::geteuid() };
    let me = std::process::id() as libc::pid_t;
    workers_in(Path::new("/proc"), user, dir.path()).into_iter().filter(|&pid| pid != me).collect()
}

/// The processes of `user` in `proc`, a folder as proc(5) has it, that work in `run_dir`.
fn workers_in(proc: &Path, user: libc::uid_t, run_dir: &Path) -> Vec<libc::pid_t> {
    let Ok(processes) = fs::read_dir(proc) else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<libc::pid_t>().ok())
        .filter(|pid| {
            let process = proc.join(pid.to_string());
            let Ok(command) = fs::read(process.join("cmdline")) else { return false };
            let mut words = command.split(|&byte| byte == 0);
            let program = words.next().unwrap_or_default();
            program.ends_with(crate::engine::WORKER.as_bytes())
                && words.any(|word| word == b"--run-dir")
                && words.next().is_some_and(|given| names(&process, given, run_dir))
                && fs::metadata(&process).is_ok_and(|it| it.uid() == user)
                && sees(&process, run_dir)
        })
        .collect()
}

/// Whether a path that was given to a process names the directory.
fn names(process: &Path, given: &[u8], run_dir: &Path) -> bool {
    let current = fs::read_link(process.join("cwd")).unwrap_or_default();
    let given = current.join(OsStr::from_bytes(given));
    given == run_dir || resolved(&given).is_ok_and(|given| given == run_dir)
}

/// Whether a process finds the directory at `path` that this one finds there.
fn sees(process: &Path, path: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
    let root = process.join("root");
    let theirs = place(&root.join(path.strip_prefix("/").unwrap_or(path)));
    match (theirs, place(path)) {
        // Removed, for both: it is by the name alone that they are in one place. One whose root cannot be seen is ending, or
        // another container's.
        (None, None) => place(&root).is_some_and(|root| Some(root) == place(Path::new("/"))),
        (theirs, ours) => theirs == ours,
    }
}

/// Ends what a supervisor that was killed may have left: two gangs in one directory would spoil both.
pub fn end_leftovers(dir: &RunDir) -> Result<(), Failure> {
    let started = Instant::now();
    let mut told = false;
    loop {
        let left = leftovers(dir);
        if left.is_empty() {
            return Ok(());
        }
        if !told {
            let workers = counted(left.len() as u64, "worker");
            say!("waiting for {workers} of an earlier run in {}", dir.path().display());
            told = true;
        }
        if started.elapsed() > 2 * LEFTOVER_GRACE {
            return Err(Failure::failed(format!(
                "process {} still works in {}: end it, then run the same command again",
                left[0],
                dir.path().display()
            )));
        }
        if started.elapsed() > LEFTOVER_GRACE {
            kill_all(&left);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Ends every worker here, whose `mpirun` has ended.
pub fn end_workers(dir: &RunDir, grace: Duration) -> Result<(), String> {
    let started = Instant::now();
    loop {
        let left = leftovers(dir);
        if !kill_all(&left) {
            return Ok(());
        }
        if started.elapsed() > grace {
            return Err(format!("process {} does not end", left[0]));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes that descend from `root`, those without children of their own.
pub fn descendants(root: libc::pid_t) -> Vec<libc::pid_t> {
    let mut children: BTreeMap<libc::pid_t, Vec<libc::pid_t>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // `pid (name) state parent …`, where the name may hold anything.
        let parent = std::fs::read_to_string(entry.path().join("stat"))
            .ok()
            .and_then(|stat| stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<libc::pid_t>().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let (mut leaves, mut open) = (Vec::new(), vec![root]);
    while let Some(pid) = open.pop() {
        match children.remove(&pid) {
            Some(below) => open.extend(below),
            None if pid != root => leaves.push(pid),
            None => {}
        }
    }
    leaves
}

/// SIGKILL to all of them; whether there were any.
pub fn kill_all(processes: &[libc::pid_t]) -> bool {
    for &pid in processes {
        // SAFETY: no memory is involved; the process was found a moment ago to be one of the run's.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    !processes.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leftovers_of_a_run_are_the_workers_that_write_there() {
        use std::io::Read;
        use std::os::unix::process::CommandExt;
        use std::process::{Child, Command, Stdio};

        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path().to_str().expect("UTF-8");
        let name = folder.path().file_name().and_then(OsStr::to_str).expect("UTF-8");
        // A shell that waits, by the name and with the words of a worker.
        let waiting = |words: &[&str]| -> Child {
            let mut command = Command::new("sh");
            command.arg0(crate::engine::WORKER).args(["-c", "echo; read line", "sh"]).args(words);
            command.current_dir(folder.path().parent().expect("a folder"));
            let mut worker = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh");
            // Only then it has its own command line for sure.
            worker.stdout.as_mut().expect("piped").read_exact(&mut [0]).expect("a line");
            worker
        };
        let mut workers = [
            waiting(&["plan.toml", "--run-dir", here]),
            waiting(&["plan.toml", "--run-dir", &format!("{name}/../{name}")]),
            waiting(&["eval", here]),
            waiting(&["plan.toml", "--run-dir", "elsewhere", "--set", here]),
        ];
        let mut expected = [0, 1].map(|n: usize| workers[n].id() as libc::pid_t);
        let mut found = leftovers(&RunDir::at(folder.path()).expect("a path"));
        expected.sort_unstable();
        found.sort_unstable();
        for worker in &mut workers {
            drop(worker.stdin.take());
            worker.wait().expect("ended");
        }
        assert_eq!(found, expected);
    }

    /// Two containers with one list of processes, each with a volume of its own at `/runs/a`.
    #[test]
    fn a_worker_of_another_user_or_in_another_directory_of_that_path_is_no_leftover() {
        use std::os::unix::fs::symlink;

        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let run_dir = at("runs/a");
        fs::create_dir_all(&run_dir).expect("made");
        let below = run_dir.strip_prefix("/").expect("absolute");
        fs::create_dir_all(at("container").join(below)).expect("made");
        for (pid, root) in [("11", Path::new("/")), ("12", &at("container")), ("13", &at("gone"))] {
            let process = at("proc").join(pid);
            fs::create_dir_all(&process).expect("made");
            symlink(root, process.join("root")).expect("a link");
            let words = format!("/bin/mentee-worker\0plan.toml\0--run-dir\0{}\0", run_dir.display());
            fs::write(process.join("cmdline"), words).expect("written");
        }
        let user = fs::metadata(&run_dir).expect("there").uid();
        assert_eq!(workers_in(&at("proc"), user, &run_dir), [11]);
        assert_eq!(workers_in(&at("proc"), user + 1, &run_dir), [0; 0]);
        // Where the directory is gone, that of another root is none of ours still.
        fs::remove_dir(&run_dir).expect("removed");
        assert_eq!(workers_in(&at("proc"), user, &run_dir), [11]);
        fs::remove_dir(at("container").join(below)).expect("removed");
        assert_eq!(workers_in(&at("proc"), user, &run_dir), [11]);
    }

    #[test]
    fn the_last_of_those_that_descend_from_a_process_are_found() {
        use std::io::BufRead;
        use std::process::{Command, Stdio};

        let mut shell = Command::new("sh");
        // A shell that starts another, which waits: with a name that looks like the end of one.
        shell
            .args(["-c", "sh -c 'echo $$; read line; exit 0'; exit 0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut shell = shell.spawn().expect("sh");
        let mut pid = String::new();
        std::io::BufReader::new(shell.stdout.take().expect("piped")).read_line(&mut pid).expect("a line");
        let found = descendants(shell.id() as libc::pid_t);
        drop(shell.stdin.take());
        shell.wait().expect("ended");
        assert_eq!(found, [pid.trim().parse::<libc::pid_t>().expect("a number")]);
    }
}
