//! Talking to Slurm: what has become of a job, putting it back into the queue, ending its steps; and
//! `RUN/slurm.json`, by which a run directory knows its job.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use mentee_cluster::identity::Allocation;
use mentee_config::replace::write_atomically;
use mentee_config::{complain, say};
use serde::{Deserialize, Serialize};

use crate::child;
use crate::failure::Failure;
use crate::rundir::{RunDir, unix_time};
use crate::supervise::StopSignal;

/// Slurm's commands wait long for a controller that does not answer; nobody here does.
const DEADLINE: Duration = Duration::from_secs(15);
/// How often a controller that does not answer is asked to requeue a job, and the time between.
const REQUEUE_TRIES: u32 = 6;
const REQUEUE_PAUSE: Duration = Duration::from_secs(5);
/// Variables of Slurm that are about the cluster; all others describe the job or step that a process is in.
const OF_THE_CLUSTER: [&str; 6] =
    ["SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_DEBUG"];
/// So many times in a row a job may go back into the queue without having completed a step.
const MAX_BARREN: u32 = 3;

/// What a run directory knows of its job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Slurm's id: `12`, or `12_3` for a task of an array.
    pub job: String,
    /// Seconds since 1970.
    pub submitted: f64,
    /// What was submitted.
    pub script: PathBuf,
    /// Every time the supervisor has put the job back into the queue.
    #[serde(default)]
    pub requeues: Vec<Requeue>,
    /// How many of the last of these had completed no step.
    #[serde(default)]
    pub barren: u32,
}

/// One return into the queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Requeue {
    /// Seconds since 1970.
    pub time: f64,
    /// The step of the newest checkpoint.
    pub step: u64,
    /// The signal that asked for it.
    pub signal: String,
}

impl Record {
    /// Of a job that was just submitted.
    pub fn new(job: String, script: PathBuf) -> Record {
        Record { job, submitted: unix_time(), script, requeues: Vec::new(), barren: 0 }
    }

    /// Reads it; `None` when the run was not submitted.
    pub fn read(run: &RunDir) -> Option<Record> {
        serde_json::from_slice(&std::fs::read(run.slurm()).ok()?).ok()
    }

    /// The one of a run directory, made anew where it speaks of another job.
    pub fn of_job(run: &RunDir, allocation: &Allocation) -> Record {
        let job = allocation.job().to_owned();
        match Record::read(run) {
            Some(record) if record.job == job => record,
            Some(other) => Record::new(job, other.script),
            None => Record::new(job, run.script()),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, run: &RunDir) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(self).expect("a record is JSON");
        write_atomically(&run.slurm(), &text).map_err(|error| Failure::io("write", &run.slurm(), &error))
    }
}

/// What Slurm says of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    /// `PENDING`, `RUNNING`, `COMPLETED`, …
    pub state: String,
    /// Why it waits or has failed, in Slurm's word; `None` for no reason.
    pub reason: Option<String>,
    /// How often it was requeued.
    pub restarts: u32,
    /// Where it runs or ran, compressed as `n[1-2]`; `None` before it has run.
    pub nodes: Option<String>,
    /// How long it has run this time.
    pub run_time: String,
    /// How long it may.
    pub time_limit: String,
    /// When it started, or when Slurm expects it to; `None` when it does not know.
    pub start: Option<String>,
}

impl Job {
    /// From the one line of `scontrol show job --oneliner`.
    fn parse(line: &str) -> Option<Job> {
        // Paths at the end of the line may hold anything: the first of equal keys counts.
        let pairs: BTreeMap<&str, &str> =
            line.split_whitespace().rev().filter_map(|word| word.split_once('=')).collect();
        let known = |key: &str| {
            let value = *pairs.get(key)?;
            (!value.is_empty() && !["None", "(null)", "Unknown"].contains(&value)).then(|| value.to_owned())
        };
        Some(Job {
            state: known("JobState")?,
            reason: known("Reason"),
            restarts: known("Restarts").and_then(|count| count.parse().ok()).unwrap_or(0),
            nodes: known("NodeList"),
            run_time: known("RunTime").unwrap_or_default(),
            time_limit: known("TimeLimit").unwrap_or_default(),
            start: known("StartTime"),
        })
    }

    /// Whether it waits or runs: a second job in its run directory would spoil both.
    pub fn is_active(&self) -> bool {
        const OVER: [&str; 10] = [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "REVOKED",
            "TIMEOUT",
        ];
        !OVER.iter().any(|over| self.state.starts_with(over))
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let on = self.nodes.as_ref().map_or(String::new(), |nodes| format!(" on {nodes}"));
        let reason = self.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
        match self.state.as_str() {
            "PENDING" => {
                write!(f, "queued{reason}")?;
                if let Some(start) = &self.start {
                    write!(f, ", expected to start {start}")?;
                }
            }
            "RUNNING" => write!(f, "running{on}, {} of {}", self.run_time, self.time_limit)?,
            state => write!(f, "{}{on}{reason}", state.to_lowercase())?,
        }
        match self.restarts {
            0 => Ok(()),
            1 => f.write_str(", requeued once"),
            times => write!(f, ", requeued {times} times"),
        }
    }
}

/// What Slurm knows of a job, `None` when it has forgotten it; or why it could not be asked.
pub type Known = Result<Option<Job>, String>;

/// Asks for one job.
pub fn query(job: &str) -> Known {
    Ok(list(job)?.into_iter().next().map(|(_, job)| job))
}

/// The allocation that this process is in. A shell can outlive its job and keep the variables: those of several nodes, which
/// would be reached through Slurm, are asked about.
pub fn allocation() -> Option<Allocation> {
    let allocation = Allocation::from_env(&|name| std::env::var(name).ok())?;
    let job = allocation.job();
    if allocation.nodes.len() > 1 && query(job).is_ok_and(|known| !known.is_some_and(|job| job.is_active())) {
        complain!(
            "warning: this shell has the variables of Slurm's job {job}, which is over: they are passed over"
        );
        return None;
    }
    Some(allocation)
}

/// In words.
pub fn describe(known: &Known) -> String {
    match known {
        Ok(Some(job)) => job.to_string(),
        Ok(None) => "no longer known to Slurm".to_owned(),
        Err(why) => format!("Slurm could not be asked ({why})"),
    }
}

/// Asks for many jobs, of which most are tasks of one array: once for each array, and no more after the first question
/// without an answer.
#[derive(Debug, Default)]
pub struct Jobs {
    lists: BTreeMap<String, Vec<(Option<String>, Job)>>,
    failed: Option<String>,
}

impl Jobs {
    /// Why there was no answer, where there was none.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// What is known of one of them.
    pub fn query(&mut self, job: &str) -> Known {
        let (array, task) = job.split_once('_').map_or((job, None), |(array, task)| (array, Some(task)));
        if !self.lists.contains_key(array) {
            if let Some(why) = &self.failed {
                return Err(why.clone());
            }
            let list = list(array).inspect_err(|why| self.failed = Some(why.clone()))?;
            self.lists.insert(array.to_owned(), list);
        }
        let list = self.lists.get(array).into_iter().flatten();
        let mut fitting = list.filter(|(tasks, _)| match (tasks, task) {
            (Some(tasks), Some(task)) => task.parse().is_ok_and(|task| is_among(tasks, task)),
            (None, None) => true,
            _ => false,
        });
        Ok(fitting.next().map(|(_, job)| job.clone()))
    }
}

/// Every line that Slurm has of a job: which tasks of an array it is of, and what it says of them.
fn list(job: &str) -> Result<Vec<(Option<String>, Job)>, String> {
    let said = match ask("scontrol", &["show", "job", "--oneliner", job]) {
        Err(why) if why.contains("Invalid job id") => String::new(),
        said => said?,
    };
    let tasks = |line: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix("ArrayTaskId=")).map(str::to_owned)
    };
    Ok(said.lines().filter_map(|line| Some((tasks(line), Job::parse(line)?))).collect())
}

/// Whether a task is among `3`, `0-7`, `1,4-6`, `0-8:2`, `0-7%2`, as Slurm writes the tasks that still wait together.
fn is_among(tasks: &str, task: u32) -> bool {
    let tasks = tasks.split_once('%').map_or(tasks, |(tasks, _)| tasks);
    tasks.split(',').any(|part| {
        let (range, step) = part.split_once(':').unwrap_or((part, "1"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last), Ok(step)) = (first.parse(), last.parse(), step.parse()) else {
            return false;
        };
        (first..=last).contains(&task) && (task - first).checked_rem(step) == Some(0)
    })
}

/// Whether a run that has ended goes back into the queue: when the scheduler only warned, or stopped the tasks alone.
/// After its SIGTERM it requeues the job itself (preemption, `scontrol requeue`), or does not want to (`scancel`).
pub fn goes_back(stopped_by: &[StopSignal]) -> bool {
    stopped_by.iter().all(|signal| *signal == StopSignal::Warning)
}

/// Puts the job that this process is part of back into the queue; it ends then.
///
/// # Errors
/// [`Failure`] with exit code 75 when it went back too often without a step between, or Slurm refuses.
pub fn put_back(
    run: &RunDir,
    allocation: &Allocation,
    first_step: u64,
    step: u64,
    stopped_by: &[StopSignal],
) -> Result<(), Failure> {
    let job = allocation.job();
    let mut record = Record::of_job(run, allocation);
    let again = format!("sbatch {} continues it", record.script.display());
    let preempted = |line: String| Failure { exit_code: mentee_config::exit_code::PREEMPTED, line };
    record.barren = if step > first_step { 0 } else { record.barren + 1 };
    if record.barren > MAX_BARREN {
        return Err(preempted(format!(
            "the job went back into the queue {MAX_BARREN} times without one completed step and stays out of it now: \
             give it more --time; {again}"
        )));
    }
    let signal = stopped_by.first().map_or("a signal to the workers", |signal| signal.name());
    let before = record.clone();
    record.requeues.push(Requeue { time: unix_time(), step, signal: signal.to_owned() });
    // First, as this process ends with the requeue. A disk without room is no reason to stay out.
    let note = |record: &Record| {
        if let Err(failure) = record.write(run) {
            complain!("warning: {}", failure.line);
        }
    };
    note(&record);
    say!("{signal}: checkpoint at step {step}; job {job} goes back into the queue");
    let mut tries = 0;
    loop {
        tries += 1;
        let Err(why) = ask("scontrol", &["requeue", job]) else { return Ok(()) };
        if tries == REQUEUE_TRIES {
            note(&before);
            return Err(preempted(format!("job {job} cannot be requeued ({why}): {again}")));
        }
        complain!(
            "warning: job {job} cannot be requeued yet ({why}): trying again in {} s",
            REQUEUE_PAUSE.as_secs()
        );
        std::thread::sleep(REQUEUE_PAUSE);
    }
}

/// SIGKILL to the steps of a job that have this name, on all of its nodes; its batch script lives on. Returns how many there
/// were.
///
/// # Errors
/// Why Slurm could not be asked.
pub fn kill_job_step(job: &str, name: &str) -> Result<usize, String> {
    let jobs = format!("--jobs={job}");
    let steps = ask("squeue", &["--steps", "--noheader", &jobs, "--format=%i %j"])?;
    let steps = steps.lines().filter_map(|line| line.trim().split_once(' ').filter(|step| step.1 == name));
    let mut there = 0;
    for (step, _) in steps {
        there += 1;
        match ask("scancel", &["--signal=KILL", step]) {
            Ok(_) => tracing::info!("killed step {step}"),
            Err(why) => tracing::warn!("cannot kill step {step}: {why}"),
        }
    }
    Ok(there)
}

/// The same until Slurm lists none any more, at most for `patience`.
///
/// # Errors
/// Why it is not known to be gone.
pub fn end_job_step(job: &str, name: &str, patience: Duration) -> Result<(), String> {
    let since = Instant::now();
    while kill_job_step(job, name)? > 0 {
        if since.elapsed() > patience {
            return Err(format!("{name} is still there after {} s", patience.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// Why a command of Slurm's gave no answer, in one line.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// It was not started, or refused.
    #[error("{0}")]
    Refused(String),
    /// It was ended for its lateness: what it was asked for may have been done.
    #[error("{program} did not answer within {} s", DEADLINE.as_secs())]
    Late {
        /// Which.
        program: String,
    },
}

/// Runs one of Slurm's commands; its standard output, or in one line why there is none.
///
/// # Errors
/// The last line the command wrote to standard error, or that it could not be started or did not end.
pub fn ask(program: &str, arguments: &[&str]) -> Result<String, String> {
    request(program, arguments).map_err(|why| why.to_string())
}

/// The same of one that does something.
///
/// # Errors
/// As [`ask`].
pub fn request(program: &str, arguments: &[&str]) -> Result<String, NoAnswer> {
    let mut command = Command::new(program);
    command.args(arguments);
    answer(program, command)
}

/// Runs sbatch, without what describes a job that this process may be in, which the new one would take for its own, and without
/// the variables `SBATCH_…` named, which would win over a script.
///
/// # Errors
/// As [`ask`].
pub fn submission(arguments: &[&str], overridden: &[&str]) -> Result<String, NoAnswer> {
    let mut command = Command::new("sbatch");
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("SLURM_") && !OF_THE_CLUSTER.contains(&&*text)
            || text.strip_prefix("SBATCH_").is_some_and(|name| overridden.contains(&name))
        {
            command.env_remove(&name);
        }
    }
    answer("sbatch", command)
}

fn answer(program: &str, command: Command) -> Result<String, NoAnswer> {
    let said = child::ask(command, DEADLINE).map_err(|error| {
        NoAnswer::Refused(match error.kind() {
            std::io::ErrorKind::NotFound => format!("{program} is not on PATH: load your site's Slurm"),
            _ => format!("{program}: {error}"),
        })
    })?;
    if said.timed_out {
        return Err(NoAnswer::Late { program: program.to_owned() });
    }
    if said.code == Some(0) {
        return Ok(said.out);
    }
    let says_why = |line: &&str| !line.trim().is_empty() && !line.starts_with("Try ");
    let last = said.err.lines().rfind(says_why).unwrap_or("it said nothing");
    // "sbatch: error: why" is one prefix for a reader.
    let why = last.trim().trim_start_matches(&format!("{program}: ")).trim_start_matches("error: ");
    Err(NoAnswer::Refused(format!("{program}: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_slurm_says_of_a_job_is_read() {
        // As Slurm 22.05 writes it, shortened.
        let job = |state: &str, rest: &str| {
            let line = format!(
                "JobId=7 JobName=tiny UserId=root(0) Priority=1 QOS=(null) JobState={state} Dependency=(null) Requeue=1 \
                 BatchFlag=1 ExitCode=0:0 TimeLimit=00:10:00 Partition=main {rest} NumNodes=2 Command=/a b/c=d"
            );
            Job::parse(&line).expect("a job")
        };
        let running = job(
            "RUNNING",
            "Reason=None Restarts=2 RunTime=00:01:13 StartTime=2026-01-02T03:04:05 NodeList=n[1-2]",
        );
        assert_eq!(running.to_string(), "running on n[1-2], 00:01:13 of 00:10:00, requeued 2 times");
        assert!(running.is_active());
        let queued =
            job("PENDING", "Reason=Resources Restarts=0 RunTime=00:00:00 StartTime=Unknown NodeList=(null)");
        assert_eq!(queued.to_string(), "queued (Resources)");
        let again = job(
            "PENDING",
            "Reason=BeginTime Restarts=1 RunTime=00:00:00 StartTime=2026-01-02T03:04:05 NodeList=",
        );
        assert_eq!(
            again.to_string(),
            "queued (BeginTime), expected to start 2026-01-02T03:04:05, requeued once"
        );
        assert!(again.is_active());
        let over = job("FAILED", "Reason=NonZeroExitCode Restarts=0 RunTime=00:01:00 NodeList=n[1-2]");
        assert_eq!(over.to_string(), "failed on n[1-2] (NonZeroExitCode)");
        assert!(!over.is_active());
        for (state, active) in [
            ("SIGNALING", true),
            ("STAGE_OUT", true),
            ("REQUEUE_HOLD", true),
            ("NODE_FAIL", false),
            ("REVOKED", false),
        ] {
            let job = Job { state: state.into(), ..over.clone() };
            assert_eq!(job.is_active(), active, "{state}");
        }
        assert_eq!(Job::parse("slurm_load_jobs error: Invalid job id specified"), None);
    }

    #[test]
    fn tasks_of_an_array_are_found_in_its_lists() {
        for (tasks, inside, outside) in
            [("3", 3, 30), ("0-7", 7, 8), ("1,4-6%2", 5, 2), ("0-8:2", 4, 3), ("0-8:0", 9, 0), ("x", 9, 0)]
        {
            assert_eq!(is_among(tasks, inside), inside != 9, "{tasks}");
            assert!(!is_among(tasks, outside), "{tasks}");
        }
    }

    #[test]
    fn only_a_warned_job_puts_itself_back() {
        use StopSignal::{HangUp, Interrupt, Terminate, Warning};
        assert!(goes_back(&[]), "the tasks alone were signalled");
        assert!(goes_back(&[Warning]) && goes_back(&[Warning, Warning]));
        assert!(!goes_back(&[Terminate]), "scancel, or a requeue that Slurm does itself");
        assert!(!goes_back(&[Warning, Terminate]), "preempted before the checkpoint was written");
        assert!(!goes_back(&[Interrupt]) && !goes_back(&[HangUp]));
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = ask("mentee-no-such-command", &[]).expect_err("not there");
        assert!(error.contains("mentee-no-such-command is not on PATH"), "{error}");
        assert_eq!(ask("sh", &["-c", "echo one; exit 0"]), Ok("one\n".to_owned()));
        assert_eq!(
            ask("sh", &["-c", "echo sh: first >&2; echo sh: error: second >&2; exit 3"]),
            Err("sh: second".into())
        );
    }
}
