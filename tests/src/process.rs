//! Starting the binaries, waiting with a limit, killing them.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::root;

/// No run of the tests takes longer; what does is hanging.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Variables by which launchers tell a process its rank: a test must not inherit those of the shell that runs it.
const LAUNCHER_PREFIXES: [&str; 9] =
    ["MENTEE_", "OMPI_", "PMI", "MPI_", "MPIR_", "HYDRA_", "SLURM_", "MV2_", "TORCHELASTIC_"];
const LAUNCHER_NAMES: [&str; 6] =
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

/// `target/release`, also where `CARGO_TARGET_DIR` moved it: this test lies in its `deps`.
fn release_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    test.ancestors().nth(2).expect("a test lies in <target>/<profile>/deps").to_path_buf()
}

/// The path of one of the project's binaries, built if it is not there or older than its sources; the one in the folder
/// that `TEST_BINARIES` names, when it is set: to test what was built elsewhere, or against another MPI.
pub fn binary(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("TEST_BINARIES") {
        let path = PathBuf::from(folder).join(name);
        assert!(path.is_file(), "{} is missing", path.display());
        return path;
    }
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        // The same selection as ci/test makes, so that nothing is compiled twice with other features.
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--release", "--workspace", "--bins", "--quiet"])
            .current_dir(root())
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the binaries do not build");
    });
    let path = release_dir().join(name);
    assert!(path.is_file(), "{} is missing after a build", path.display());
    path
}

/// The command without the variables of any launcher around this test.
pub fn clean(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if LAUNCHER_NAMES.contains(&&*name) || LAUNCHER_PREFIXES.iter().any(|p| name.starts_with(p)) {
            command.env_remove(&*name);
        }
    }
    command
}

/// `mentee`, from outside any launcher.
pub fn mentee() -> Command {
    clean(Command::new(binary("mentee")))
}

/// `mentee-worker`, from outside any launcher: a world of one.
pub fn worker() -> Command {
    clean(Command::new(binary("mentee-worker")))
}

/// `mpirun -n N`, the program still to be added.
pub fn mpirun(ranks: u32) -> Command {
    let ours = root().join(".venv/bin/mpirun");
    let mut command = clean(Command::new(if ours.is_file() { ours } else { "mpirun".into() }));
    command.args(["-n", &ranks.to_string()]);
    command
}

/// How a process ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; minus the signal's number when one ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    command: String,
}

impl Outcome {
    /// Panics with everything the process said unless it ended with `code`.
    pub fn expect(self, code: i32) -> Self {
        assert!(self.code == code, "{code} was expected of this:\n{}", self.told());
        self
    }

    /// The one line that starts with `error: `; panics if there are none or several, or if something panicked.
    pub fn error_line(&self) -> &str {
        let lines = self.error_lines();
        assert!(lines.len() == 1, "{} error lines instead of one:\n{}", lines.len(), self.told());
        lines[0]
    }

    /// All lines that start with `error: `, for ranks that have no world yet in which one could speak for all.
    pub fn error_lines(&self) -> Vec<&str> {
        assert!(!self.stderr.contains("panicked at"), "a panic instead of an error:\n{}", self.told());
        self.stderr.lines().filter_map(|line| line.strip_prefix("error: ")).collect()
    }

    /// The command, how it ended and what it said.
    pub fn told(&self) -> String {
        format!(
            "{}\nended with {}\n--- stdout\n{}\n--- stderr\n{}\n---",
            self.command, self.code, self.stdout, self.stderr
        )
    }
}

/// A started process; killed, with its process group, if it is dropped while it runs.
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    command: String,
    since: Instant,
}

/// Starts a command without standard input, its output collected.
pub fn start(mut command: Command) -> Running {
    // Files, not pipes: nobody has to read them in time, and a grandchild that lives on does not keep us waiting.
    let stdout = tempfile::tempfile().expect("a temporary file");
    let stderr = tempfile::tempfile().expect("a temporary file");
    command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().expect("a second handle"))
        .stderr(stderr.try_clone().expect("a second handle"))
        .process_group(0);
    let told = format!("{command:?}");
    let child = command.spawn().unwrap_or_else(|error| panic!("{told}: {error}"));
    Running { child, stdout, stderr, command: told, since: Instant::now() }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the child can be asked").is_some()
    }

    /// Sends it a signal (not its children).
    pub fn signal(&self, signal: i32) {
        send(self.child.id() as i32, signal);
    }

    /// Waits until it has ended; panics with what it said so far when that takes longer than [`LIMIT`].
    pub fn finish(mut self) -> Outcome {
        while !self.has_ended() {
            if self.since.elapsed() > LIMIT {
                send(-(self.child.id() as i32), libc::SIGKILL);
                let outcome = self.collect();
                panic!("still running after {LIMIT:?}:\n{}", outcome.told());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.collect()
    }

    fn collect(&mut self) -> Outcome {
        let status = self.child.wait().expect("the child can be waited for");
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        Outcome {
            code,
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
            command: self.command.clone(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            send(-(self.child.id() as i32), libc::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Starts a command and waits for its end.
pub fn finish(command: Command) -> Outcome {
    start(command).finish()
}

/// Kills every process whose command line names this run directory: launcher, mpirun and all ranks, as `kill -9` on a
/// whole machine would. Returns how many there were.
pub fn kill_run(run_dir: &Path) -> usize {
    let needle = run_dir.to_str().expect("a path in UTF-8").as_bytes();
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.windows(needle.len()).any(|window| window == needle) {
            send(pid, libc::SIGKILL);
            killed += 1;
        }
    }
    killed
}

/// SIGKILL to a rank, by the process id that the run's status names.
pub fn kill_rank(pid: u32) {
    send(pid as i32, libc::SIGKILL);
}

fn send(pid: i32, signal: i32) {
    // SAFETY: kill touches no memory of ours; the ids are those of children of this test, which has not waited for them yet,
    // or were read from /proc just now by the unique temporary path on their command line.
    unsafe { libc::kill(pid, signal) };
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().expect("the start of the output");
    file.read_to_end(&mut bytes).expect("the output");
    String::from_utf8_lossy(&bytes).into_owned()
}
