//! A Slurm of two nodes on this machine, by `ci/slurm-lab`, and jobs in it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Outcome, finish, mentee};
use crate::{root, run_dir};

/// No job of the tests takes longer; what does is stuck.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A running lab, two nodes of four CPUs and two GPUs; it ends with the value.
pub struct Lab {
    folder: tempfile::TempDir,
}

impl Lab {
    /// Starts one, beside any that a developer has running.
    ///
    /// # Errors
    /// Why there can be none on this machine.
    pub fn up() -> Result<Lab, String> {
        // Sockets lie in it, whose paths must be short.
        let folder = tempfile::Builder::new().prefix("mlab-").tempdir_in("/tmp").expect("a temporary folder");
        let lab = Lab { folder };
        let outcome = finish(lab.script("up"));
        match outcome.code {
            0 => Ok(lab),
            77 => {
                let said = outcome.stdout.trim();
                Err(said.strip_prefix("skipped: ").unwrap_or(said).to_owned())
            }
            _ => panic!("the lab does not start:\n{}", outcome.told()),
        }
    }

    fn script(&self, verb: &str) -> Command {
        let mut command = Command::new(root().join("ci/slurm-lab"));
        let folder = self.folder.path().join("lab");
        command.arg(verb).env("MENTEE_SLURM_LAB", folder).env("PORT", "17200").env("GPUS", "2");
        command
    }

    /// A command in the lab: Slurm's programs and the project's own are on its `PATH`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = crate::process::clean(Command::new(program));
        self.point(&mut command);
        command
    }

    /// `mentee` in the lab.
    pub fn mentee(&self) -> Command {
        let mut command = mentee();
        self.point(&mut command);
        command
    }

    fn point(&self, command: &mut Command) {
        command
            .env("PATH", crate::guide::search_path())
            // As docs/slurm.md says: with all transports of some machines MPICH's addresses are too long for Slurm's PMI.
            .env("UCX_TLS", "^posix")
            .env("SLURM_CONF", self.folder.path().join("lab/etc/slurm.conf"))
            .env("MENTEE_SITE", self.folder.path().join("site.toml"));
        let site = self.folder.path().join("site.toml");
        if !site.exists() {
            std::fs::write(site, "").expect("an empty file of defaults");
        }
    }

    /// What one of Slurm's commands prints; panics when it fails.
    pub fn slurm(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = self.command(program);
        command.args(arguments);
        finish(command).expect(0).stdout
    }

    /// `mentee submit` of a recipe.
    pub fn submit(&self, recipe: &Path, run_dir: &Path, more: &[&str]) -> Outcome {
        let mut command = self.mentee();
        command.arg("submit").arg(recipe).arg("--run-dir").arg(run_dir).args(more);
        finish(command)
    }

    /// `mentee status --json` of a run.
    pub fn status(&self, run_dir: &Path) -> Value {
        let mut command = self.mentee();
        command.arg("status").arg(run_dir).arg("--json");
        serde_json::from_str(&finish(command).expect(0).stdout).expect("JSON")
    }

    /// The run's job as `mentee status` has it: id and state.
    pub fn job(&self, run_dir: &Path) -> (String, String) {
        let status = self.status(run_dir);
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        (text(&status["slurm"]["record"]["job"]), text(&status["slurm"]["job"]["state"]))
    }

    /// How often Slurm has requeued the run's job.
    pub fn requeues(&self, run_dir: &Path) -> u64 {
        self.status(run_dir)["slurm"]["job"]["restarts"].as_u64().expect("a count")
    }

    /// Waits until the run has logged `count` train lines; panics when its job ends before.
    pub fn wait_for_lines(&self, run_dir: &Path, count: usize) {
        self.wait(run_dir, &format!("{count} steps"), || {
            let lines = run_dir::metrics(run_dir).iter().filter(|line| line["kind"] == "train").count();
            lines >= count
        });
    }

    /// Waits for what `met` looks for, with the run's own words when it does not come.
    pub fn wait(&self, run_dir: &Path, what: &str, mut met: impl FnMut() -> bool) {
        let since = Instant::now();
        while !met() {
            if since.elapsed() > PATIENCE {
                panic!("no {what} in {PATIENCE:?}:\n{}", self.told(run_dir));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the run's job has ended for good, and checks how.
    pub fn wait_for_end(&self, run_dir: &Path, state: &str) {
        let ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"];
        let mut now = String::new();
        self.wait(run_dir, "end of the job", || {
            std::thread::sleep(Duration::from_millis(200));
            now = self.job(run_dir).1;
            ended.contains(&now.as_str())
        });
        assert_eq!(now, state, "{}", self.told(run_dir));
    }

    /// What the run and Slurm said, for messages.
    pub fn told(&self, run_dir: &Path) -> String {
        let read = |name: &str| std::fs::read_to_string(run_dir.join(name)).unwrap_or_default();
        format!(
            "{}\n--- slurm.log\n{}\n--- worker-output.log\n{}",
            self.status(run_dir),
            read("logs/slurm.log"),
            read("logs/worker-output.log")
        )
    }

    /// The folder, for paths in it that every node sees.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let outcome = finish(self.script("down"));
        if !std::thread::panicking() {
            outcome.expect(0);
        }
    }
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
