//! The processes of a run on this machine: found by what they were started as, and ended.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use mentee_config::{counted, say};

use crate::failure::Failure;
use crate::rundir::RunDir;

/// How long the workers of a supervisor that was killed get to end by themselves before a new one ends them.
const LEFTOVER_GRACE: Duration = Duration::from_secs(10);

/// Workers of a run here that have no supervisor: those of one that was killed a moment ago. Their command line has
/// `--run-dir` and this directory; what only reads a run (`mentee-worker eval DIR`) is left alone.
pub fn leftovers(dir: &RunDir) -> Vec<libc::pid_t> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let me = std::process::id();
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<libc::pid_t>().ok())
        .filter(|&pid| pid as u32 != me)
        .filter(|pid| {
            let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
            let mut words = command.split(|&byte| byte == 0);
            let program = words.next().unwrap_or_default();
            program.ends_with(crate::engine::WORKER.as_bytes())
                && words.any(|word| word == b"--run-dir")
                && words.next() == Some(dir.path().as_os_str().as_encoded_bytes())
        })
        .collect()
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
        use std::os::unix::process::CommandExt;
        use std::process::{Child, Command, Stdio};

        let folder = tempfile::tempdir().expect("a folder");
        let here = folder.path().to_str().expect("UTF-8");
        // A shell that waits, by the name and with the words of a worker.
        let waiting = |words: &[&str]| -> Child {
            let mut command = Command::new("sh");
            command.arg0(crate::engine::WORKER).args(["-c", "read line", "sh"]).args(words);
            command.stdin(Stdio::piped()).spawn().expect("sh")
        };
        let mut workers = [
            waiting(&["plan.toml", "--run-dir", here]),
            waiting(&["eval", here]),
            waiting(&["plan.toml", "--run-dir", "elsewhere", "--set", here]),
        ];
        let expected = vec![workers[0].id() as libc::pid_t];
        let found = leftovers(&RunDir::at(folder.path()).expect("a path"));
        for worker in &mut workers {
            drop(worker.stdin.take());
            worker.wait().expect("ended");
        }
        assert_eq!(found, expected);
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
