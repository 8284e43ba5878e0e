//! The processes of a run: feeds [`Supervisor`] with what happens to them and does what it says.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mentee_cluster::identity::Allocation;
use mentee_cluster::{Agreement, CoordinatorHandle, Lock, Output, WorkerEvent, server};
use mentee_config::{Plan, complain, counted, exit_code, say};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::engine::{self, Engine, Layout, Tools};
use crate::failure::Failure;
use crate::flood::Flood;
use crate::left_memory;
use crate::logs;
use crate::metrics::Metrics;
use crate::out_of_memory;
use crate::processes::{descendants, end_workers, kill_all, leftovers};
use crate::progress::Display;
use crate::prometheus::{self, Exported};
use crate::report;
use crate::rundir::{RunDir, unix_time};
use crate::slurm;
use crate::status::{Rank, State, Status};
use crate::supervise::{Action, Culprit, Event, Exit, LaunchFailure, Outcome, StopSignal, Supervisor, Timer};

/// Lines of the workers' output that are kept for a failure report.
const TAIL: usize = 20;
/// Longest line of the workers' output, bytes; the rest becomes the next line.
const MAX_LINE: usize = 16 * 1024;
/// How long workers that were killed, and their launcher, get to be gone.
const ABANDON_GRACE: Duration = Duration::from_secs(5);
/// How often `status.json` is written.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// How often the workers' shared memory is noted until all of them go: one that dies before would leave it behind.
const NOTE_MEMORY_EVERY: Duration = Duration::from_millis(250);
/// How long what a start has left gets to be gone from all machines before the next one.
const LEFT_GRACE: Duration = Duration::from_secs(30);

/// A run as it is started: what stays the same over its restarts, and the layout, which may lose machines.
pub struct Job<'a> {
    pub dir: &'a RunDir,
    pub lock: &'a Lock,
    pub plan: &'a Plan,
    pub tools: Tools,
    pub engine: Engine,
    /// Where the coordinator listens; none: everywhere.
    pub interface: Option<IpAddr>,
    pub allocation: Option<&'a Allocation>,
    pub workers: u32,
    pub layout: Layout,
    /// What a stop may take at least.
    pub stop_grace: Duration,
}

impl Job<'_> {
    /// A coordinator for the workers of this job.
    async fn coordinator(&self) -> std::io::Result<CoordinatorHandle> {
        let agreement = Agreement {
            token: server::fresh_token()?,
            world_size: self.workers,
            plan_hash: Some(self.plan.recipe.hash()),
            version: env!("CARGO_PKG_VERSION").into(),
            stall: Duration::try_from_secs_f64(self.plan.recipe.parallel.stall_s).unwrap_or(Duration::MAX),
        };
        server::start(self.interface, agreement).await
    }
}

/// Everything that is alive during a run but the decisions.
struct Shell<'a> {
    job: Job<'a>,
    coordinator: CoordinatorHandle,
    child: Option<Child>,
    /// The workers have been killed, their launcher not yet.
    killed: bool,
    lines: (mpsc::Sender<Vec<u8>>, mpsc::Receiver<Vec<u8>>),
    output: File,
    tail: VecDeque<String>,
    /// The first `error: …` line of this start.
    said: Option<String>,
    /// Slurm's first word that this start was not brought about.
    launch_failure: Option<LaunchFailure>,
    /// Processes that the kernel had ended for want of memory before this start.
    oom_kills: Option<u64>,
    timer: Option<(Timer, tokio::time::Instant)>,
    /// Done when nothing is left of the last start.
    nothing_left: Option<tokio::sync::oneshot::Receiver<()>>,
    display: Display,
    flood: Flood,
    status: Status,
    exported: Option<Exported>,
}

/// Runs the workers until it is over: the exit code, and the signals that came. `metrics_listener`: where Prometheus may ask.
pub async fn supervise(
    job: Job<'_>,
    max_restarts: u32,
    metrics_listener: Option<std::net::TcpListener>,
) -> Result<(i32, Vec<StopSignal>), Failure> {
    let cannot = |what: &str, error: std::io::Error| Failure::failed(format!("cannot {what}: {error}"));
    let coordinator =
        job.coordinator().await.map_err(|error| cannot("open a port for the workers", error))?;
    let output = job.dir.worker_output();
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&output)
        .map_err(|error| Failure::io("open", &output, &error))?;
    let mut signals = [
        (StopSignal::Interrupt, SignalKind::interrupt()),
        (StopSignal::Terminate, SignalKind::terminate()),
        (StopSignal::HangUp, SignalKind::hangup()),
        (StopSignal::Warning, SignalKind::user_defined1()),
    ]
    .into_iter()
    .filter(|(_, kind)| *kind != SignalKind::hangup() || !is_ignored(libc::SIGHUP)) // by nohup
    .map(|(name, kind)| Ok((name, signal(kind)?)))
    .collect::<std::io::Result<Vec<(StopSignal, Signal)>>>()
    .map_err(|error| cannot("listen for signals", error))?;

    let display = Display::new();
    let name = &job.plan.recipe.run.name;
    let newest_step = job.dir.newest_step();
    display.say(&format!(
        "{name}: {} ({}), {}{}, in {}",
        counted(job.workers.into(), "worker"),
        format!("{:?}", job.engine).to_lowercase(),
        counted(job.plan.end_step(), "step"),
        if newest_step > 0 { format!(", continued from step {newest_step}") } else { String::new() },
        job.dir.path().display()
    ));
    let status = Status::new(name, job.workers);
    let exported = match metrics_listener {
        Some(listener) => {
            let (at, exported) = prometheus::serve(listener, &status)?;
            display.say(&format!("numbers for Prometheus: http://{at}/metrics"));
            Some(exported)
        }
        None => None,
    };
    let direct = job.engine == Engine::Direct;
    let nodes = if job.engine == Engine::Srun { job.layout.nodes as usize } else { 1 };
    let mut shell = Shell {
        job,
        coordinator,
        child: None,
        killed: false,
        lines: mpsc::channel(256),
        output,
        tail: VecDeque::new(),
        said: None,
        launch_failure: None,
        oom_kills: None,
        timer: None,
        nothing_left: None,
        display,
        flood: Flood::default(),
        status,
        exported,
    };
    let started = Instant::now();
    let (mut supervisor, first) = Supervisor::new(max_restarts, direct, nodes, newest_step > 0);
    supervisor.least_stop_grace = shell.job.stop_grace;
    let mut stopped_by = Vec::new();
    let mut actions = first;
    let mut status_due = tokio::time::interval(STATUS_EVERY);
    let mut memory_due = tokio::time::interval(NOTE_MEMORY_EVERY);
    memory_due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        for action in std::mem::take(&mut actions) {
            if shell.job.lock.is_lost(&shell.job.dir.plan()) {
                return Err(shell.abandon().await);
            }
            match shell.perform(action).await {
                Ok(Some(outcome)) => return Ok((shell.end(outcome)?, stopped_by)),
                Ok(None) => {}
                Err(failure) => {
                    shell.write_end(failure.exit_code, Some(failure.line.clone()));
                    return Err(failure);
                }
            }
        }
        let due = shell.timer.map(|(_, at)| at);
        let event = tokio::select! {
            Some(output) = shell.coordinator.events.recv() => {
                shell.note(&output);
                Event::Coordinator(output)
            }
            exit = wait(&mut shell.child) => {
                shell.child = None;
                shell.killed = false;
                left_memory::clean(shell.job.dir);
                Event::Exited(exit)
            }
            signal = any(&mut signals) => {
                shell.status.state = State::Stopping;
                stopped_by.push(signal);
                Event::Signal(signal)
            }
            () = tokio::time::sleep_until(due.unwrap_or_else(tokio::time::Instant::now)), if due.is_some() => {
                shell.due()
            }
            Some(line) = shell.lines.1.recv() => {
                shell.keep(&line);
                continue;
            }
            _ = memory_due.tick(), if shell.is_gathering() => {
                left_memory::note(shell.job.dir);
                continue;
            }
            _ = status_due.tick() => {
                if shell.job.lock.is_lost(&shell.job.dir.plan()) {
                    return Err(shell.abandon().await);
                }
                shell.write_status();
                continue;
            }
        };
        actions = supervisor.handle_event(started.elapsed(), event);
    }
}

impl Shell<'_> {
    /// Does what was decided; an outcome ends the run.
    async fn perform(&mut self, action: Action) -> Result<Option<Outcome>, Failure> {
        match action {
            Action::Start { generation } => self.start(generation).await?,
            Action::RequestStop { reason } => self.coordinator.request_stop(&reason),
            Action::Terminate => {
                left_memory::note(self.job.dir);
                self.signal(libc::SIGTERM);
            }
            Action::Kill => self.kill(),
            Action::Arm(timer, after) => self.timer = Some((timer, tokio::time::Instant::now() + after)),
            Action::RecordRestart { generation, culprit } => {
                self.end_what_is_left();
                self.record_restart(generation, &culprit);
            }
            Action::LeaveOut { host } => self.leave_out(&host).await?,
            Action::Say(line) => {
                tracing::warn!("{line}");
                self.display.say(&line);
            }
            Action::Finish(outcome) => return Ok(Some(outcome)),
        }
        Ok(None)
    }

    async fn start(&mut self, generation: u32) -> Result<(), Failure> {
        if let Some(over) = self.nothing_left.take() {
            let _ = over.await; // bounded by the thread that ends it
        }
        let address = if generation == 0 {
            self.coordinator.address.clone()
        } else {
            self.coordinator.new_generation(generation)
        };
        let arguments: [OsString; 3] =
            [self.job.dir.plan().into(), "--run-dir".into(), self.job.dir.path().into()];
        let line = engine::command_line(
            self.job.engine,
            self.job.workers,
            &self.job.tools,
            &self.job.layout,
            Some(&address),
            &arguments,
        );
        let mut command = Command::new(&line.program);
        command.args(&line.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in &line.clear {
            command.env_remove(name);
        }
        command.envs(line.set.iter().map(|(name, value)| (name, value)));
        // Ctrl-C at the terminal is for the supervisor alone.
        command.process_group(0);
        let death_signal = if self.job.engine == Engine::Direct { libc::SIGKILL } else { libc::SIGTERM };
        // SAFETY: getpid has no preconditions and cannot fail.
        let supervisor = unsafe { libc::getpid() };
        // SAFETY: between fork and exec only prctl, getppid and _exit are called, all async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, death_signal) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // The supervisor may have died before the signal was asked for.
                if libc::getppid() != supervisor {
                    libc::_exit(exit_code::FAILED);
                }
                Ok(())
            });
        }
        self.oom_kills = out_of_memory::kills();
        let mut child = command
            .spawn()
            .map_err(|error| Failure::failed(format!("cannot start {}: {error}", line.program.display())))?;
        let header = format!("--- start {generation}: {}\n", counted(self.job.workers.into(), "worker"));
        let _ = self.output.write_all(header.as_bytes());
        self.tail.clear();
        (self.said, self.launch_failure) = (None, None);
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(read_lines(stdout, self.lines.0.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(read_lines(stderr, self.lines.0.clone()));
        }
        tracing::info!(generation, workers = self.job.workers, "started {}", line.program.display());
        self.child = Some(child);
        self.status.generation = generation;
        self.status.state = State::Starting;
        self.status.ranks.clear();
        self.display.restart();
        self.write_status();
        Ok(())
    }

    /// Workers were started, and not all of them have come yet.
    fn is_gathering(&self) -> bool {
        self.child.is_some() && self.status.ranks.is_empty()
    }

    fn signal(&self, signal: libc::c_int) {
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            // SAFETY: the child has not been waited for, so the id is still its own.
            unsafe { libc::kill(pid as libc::pid_t, signal) };
        }
    }

    /// The job, and the name of the Slurm step that this start's workers are, where srun starts them.
    fn slurm_step(&self) -> Option<(String, String)> {
        let allocation = self.job.allocation.filter(|_| self.job.engine == Engine::Srun)?;
        Some((allocation.job().to_owned(), engine::slurm_step_name(self.status.generation)))
    }

    /// SIGKILL to the tasks of an srun, on all machines; not waited for, as Slurm may not answer.
    fn kill_slurm_step(&self) {
        if let Some((job, name)) = self.slurm_step() {
            let kill = move || {
                if let Err(why) = slurm::kill_job_step(&job, &name) {
                    tracing::warn!("cannot list the job's steps: {why}");
                }
            };
            if let Err(error) = std::thread::Builder::new().spawn(kill) {
                tracing::warn!("cannot end the job's step, as no thread is to be had: {error}");
            }
        }
    }

    /// An srun that has ended may have left tasks on other machines, and an mpirun that was killed ranks on this one. They hold
    /// devices and memory, and write to this directory: the next start waits until they are gone.
    fn end_what_is_left(&mut self) {
        let (over, is_over) = tokio::sync::oneshot::channel();
        self.nothing_left = Some(is_over);
        let (slurm_step, dir) = (self.slurm_step(), self.job.dir.clone());
        let end = move || {
            let ended = match slurm_step {
                Some((job, name)) => slurm::end_job_step(&job, &name, LEFT_GRACE),
                None => end_workers(&dir, LEFT_GRACE),
            };
            if let Err(why) = ended {
                tracing::warn!("what is left of the last start may overlap with the next: {why}");
            }
            let _ = over.send(());
        };
        if let Err(error) = std::thread::Builder::new().spawn(end) {
            tracing::warn!(
                "what is left of the last start may overlap with the next, as no thread is to be had: {error}"
            );
        }
    }

    /// The directory is gone, or another run's: ends the workers of this one, and nothing that is found by the directory's name.
    async fn abandon(&mut self) -> Failure {
        self.kill_slurm_step();
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            // Not asked to stop: there is no place for a checkpoint. Ranks first, so that an mpirun ends by itself.
            kill_all(&descendants(pid as libc::pid_t));
            if self.job.engine == Engine::Direct {
                self.kill_group();
            }
        }
        if self.child.is_some() && tokio::time::timeout(ABANDON_GRACE, wait(&mut self.child)).await.is_err() {
            self.kill_group();
        }
        self.display.finish();
        Failure::failed(format!(
            "{}: was removed, renamed or taken by another run while this one went on; its workers have been ended: start it again \
             in a directory that stays",
            self.job.dir.path().display()
        ))
    }

    fn kill_group(&self) {
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            // SAFETY: the child has not been waited for, so the group id is still its own.
            unsafe { libc::kill(-(pid as libc::pid_t), libc::SIGKILL) };
        }
    }

    /// SIGKILL to every rank of this machine; the next time to the process group too. An `mpirun` that is killed at once
    /// would leave its temporary files, and ranks that it cannot end any more.
    fn kill(&mut self) {
        left_memory::note(self.job.dir);
        self.kill_slurm_step();
        let first = !std::mem::replace(&mut self.killed, true);
        if first && self.job.engine == Engine::Mpirun && kill_all(&leftovers(self.job.dir)) {
            return;
        }
        self.kill_group();
        kill_all(&leftovers(self.job.dir));
    }

    /// Takes the timer that is due.
    fn due(&mut self) -> Event {
        match self.timer.take() {
            None | Some((Timer::Settle, _)) => {
                while let Ok(line) = self.lines.1.try_recv() {
                    self.keep(&line);
                }
                let more = |before| out_of_memory::kills().is_some_and(|now| now > before);
                Event::Settled {
                    said: self.said.clone(),
                    launch_failure: self.launch_failure.clone(),
                    out_of_memory: self.oom_kills.is_some_and(more),
                }
            }
            Some((timer, _)) => Event::Due(timer),
        }
    }

    /// What people see of the coordinator's news.
    fn note(&mut self, output: &Output) {
        match output {
            Output::Go { ranks, .. } => {
                left_memory::note(self.job.dir);
                self.status.going_since = unix_time();
                if self.status.state == State::Starting {
                    self.status.state = State::Running;
                }
                self.status.ranks =
                    ranks.iter().map(|hello| (hello.rank, Rank::new(hello.clone()))).collect();
            }
            Output::Progress { rank, progress } => {
                if let Some(at) = self.status.ranks.get_mut(rank) {
                    at.step = progress.step;
                    at.phase = progress.phase;
                    at.step_ms = progress.step_ms;
                    at.times = progress.times;
                    at.rss_mb = progress.rss_mb;
                }
                if *rank == 0 {
                    self.display.progress(progress);
                    self.status.eta_s = self.display.time_left(progress).map(|left| left.as_secs_f64());
                    self.status.progress = progress.clone();
                    self.export();
                }
            }
            Output::Pace { pace, .. } => {
                if let Some(at) = self.status.ranks.get_mut(&pace.rank) {
                    at.times_slower = pace.slow.then(|| pace.own_ms / pace.median_ms);
                }
            }
            // Every rank has the same; one of them is shown.
            Output::Event { rank: 0, event } => {
                if let WorkerEvent::Eval { knn_top1, .. } = event {
                    self.status.knn_top1 = Some(*knn_top1);
                }
                self.display.event(event);
            }
            Output::Refused { reason, ours: false, .. } => tracing::warn!("refused: {reason}"),
            _ => {}
        }
    }

    /// For those who read the run directory, and those who ask.
    fn write_status(&mut self) {
        self.status.write(self.job.dir);
        self.export();
    }

    fn export(&self) {
        if let Some(exported) = &self.exported {
            exported.set(&self.status);
        }
    }

    fn keep(&mut self, line: &[u8]) {
        let _ = self.output.write_all(line);
        let _ = self.output.write_all(b"\n");
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        let line = String::from_utf8_lossy(line).trim_end().to_owned();
        if let Some(error) = line.strip_prefix("error: ") {
            // Said once, although every rank may have written it.
            self.said.get_or_insert_with(|| error.to_owned());
        }
        if self.launch_failure.is_none() {
            self.launch_failure = LaunchFailure::of(&line);
        }
        if line.starts_with("warning: ") {
            for line in self.flood.pass(Instant::now(), &line) {
                self.display.warn(&line);
            }
        }
        self.tail.push_back(line);
    }

    fn record_restart(&mut self, generation: u32, culprit: &Culprit) {
        self.status.state = State::Restarting;
        self.status.restarts += 1;
        self.write_status();
        let step = self.job.dir.newest_step();
        let line = json!({
            "kind": "restart",
            "step": step,
            "epoch": step / self.job.plan.steps_per_epoch,
            "time": unix_time(),
            "world_size": self.job.workers,
            "generation": generation,
            "rank": culprit.rank,
            "reason": culprit.to_string(),
        });
        if let Err(error) = self.job.dir.append_metric(&line) {
            tracing::warn!("cannot write {}: {error}", self.job.dir.metrics().display());
        }
    }

    /// From now on the ranks of one machine are missed: a smaller world, the same samples.
    async fn leave_out(&mut self, host: &str) -> Result<(), Failure> {
        let Some(node) = self.job.allocation.and_then(|allocation| allocation.node_of(host)) else {
            tracing::warn!("{host} is none of the allocation's nodes and cannot be left out");
            return Ok(());
        };
        (self.job.layout, self.job.workers) = self.job.layout.without(node, self.job.workers);
        let line = format!(
            "{node} failed twice and is left out: the run goes on with {}",
            counted(self.job.workers.into(), "worker")
        );
        tracing::warn!("{line}");
        self.display.say(&line);
        // The coordinator's world has another size.
        self.coordinator = self
            .job
            .coordinator()
            .await
            .map_err(|error| Failure::failed(format!("cannot open a port for the workers: {error}")))?;
        self.status.workers = self.job.workers;
        Ok(())
    }

    /// The last of the run: status, report, and the one line that says how it went.
    fn end(mut self, outcome: Outcome) -> Result<i32, Failure> {
        self.show_last_lines();
        if self.job.engine != Engine::Srun {
            kill_all(&leftovers(self.job.dir));
        }
        let exit_code = outcome.exit_code;
        tracing::info!(exit_code, "over: {:?}", state_of(exit_code));
        if let (exit_code::PREEMPTED, Some(culprit)) = (exit_code, &outcome.culprit) {
            tracing::warn!("{culprit}");
            complain!("warning: {culprit}");
        }
        if exit_code == exit_code::RANK_FAILED {
            self.print_last_words(outcome.culprit.as_ref().and_then(|culprit| culprit.rank));
        }
        let failure = how_failed(&outcome, self.job.dir);
        self.write_end(exit_code, failure.clone());
        if let Some(line) = failure {
            tracing::error!("{line}");
            return Err(Failure { exit_code, line });
        }
        let dir = self.job.dir;
        let last = Metrics::read_without_steps(&dir.metrics())?;
        let step = last.last_train().map_or(0, |line| line.step);
        if exit_code == exit_code::PREEMPTED {
            say!("{}", how_stopped(step, dir.newest_step()));
        } else {
            let loss = last.last_train().and_then(|line| line.number("loss"));
            let loss = loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
            say!("done: {}{loss}; curves: {}", counted(step, "step"), dir.report().display());
        }
        Ok(exit_code)
    }

    /// What the workers wrote last, and the end of the line of progress.
    fn show_last_lines(&mut self) {
        while let Ok(line) = self.lines.1.try_recv() {
            self.keep(&line);
        }
        if let Some(line) = self.flood.left() {
            self.display.warn(&line);
        }
        self.display.finish();
    }

    /// The end, for those who read the run directory.
    fn write_end(&mut self, exit_code: i32, error: Option<String>) {
        self.status.exit_code = Some(exit_code);
        self.status.state = state_of(exit_code);
        self.status.error = error;
        self.status.write(self.job.dir);
        // Whoever stops a run waits for its end.
        if exit_code != exit_code::PREEMPTED
            && let Err(error) = report::write(self.job.dir)
        {
            complain!("warning: no report: {error}");
        }
    }

    fn print_last_words(&self, rank: Option<u32>) {
        if let Some(rank) = rank {
            let path = self.job.dir.rank_log(rank);
            let lines = logs::tail(&path, 10);
            if !lines.is_empty() {
                complain!("last lines of rank {rank} ({}):", path.display());
                for line in lines {
                    complain!("  {line}");
                }
            }
        }
        if !self.tail.is_empty() {
            complain!("last lines of the workers' output ({}):", self.job.dir.worker_output().display());
            for line in &self.tail {
                complain!("  {line}");
            }
        }
    }
}

/// Whether this process was started with `signal` ignored.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all zeros are a sigaction.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is changed; `now` outlives the call.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// The state of a run that has ended.
fn state_of(exit_code: i32) -> State {
    match exit_code {
        exit_code::DONE => State::Done,
        exit_code::PREEMPTED => State::Preempted,
        _ => State::Failed,
    }
}

/// The line of a run that failed; none of one that is done or was stopped.
fn how_failed(outcome: &Outcome, dir: &RunDir) -> Option<String> {
    let Outcome { exit_code, culprit } = outcome;
    match (*exit_code, culprit) {
        (exit_code::DONE | exit_code::PREEMPTED, _) => None,
        (exit_code::RANK_FAILED, culprit) => Some(format!(
            "{}; no restart left: look at {}, then run the same command again to continue from the last checkpoint",
            culprit.clone().unwrap_or_default(),
            dir.logs().display()
        )),
        (_, Some(culprit)) => Some(culprit.cause.clone()),
        (code, None) => {
            Some(format!("the workers ended with exit code {code}: see {}", dir.worker_output().display()))
        }
    }
}

/// A run that was asked to stop: after `step` steps, with a checkpoint of `newest` (0: none).
fn how_stopped(step: u64, newest: u64) -> String {
    match newest {
        0 if step == 0 => {
            "stopped before the first step on request; the same command starts it again".to_owned()
        }
        _ if newest >= step => format!("stopped at step {newest} on request; the same command continues it"),
        0 => format!(
            "stopped at step {step} on request, before the first checkpoint; the same command starts it again"
        ),
        _ => format!(
            "stopped at step {step} on request; the same command continues it from the checkpoint of step {newest}"
        ),
    }
}

/// Waits for the child's end; for ever when there is none.
async fn wait(child: &mut Option<Child>) -> Exit {
    let Some(child) = child else { return std::future::pending().await };
    match child.wait().await {
        Ok(status) => exit_of(status),
        // Cannot be waited for: treated as a crash.
        Err(_) => Exit::Code(exit_code::FAILED),
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(0)),
    }
}

/// The next of several signals.
async fn any(signals: &mut [(StopSignal, Signal)]) -> StopSignal {
    std::future::poll_fn(|context| {
        for (name, signal) in signals.iter_mut() {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*name);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// Cuts a stream into lines of bounded length, until its end.
async fn read_lines(mut stream: impl AsyncRead + Unpin, lines: mpsc::Sender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    let mut line = Vec::new();
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        for &byte in &buffer[..count] {
            if byte != b'\n' {
                line.push(byte);
            }
            if (byte == b'\n' || line.len() == MAX_LINE)
                && lines.send(std::mem::take(&mut line)).await.is_err()
            {
                return;
            }
        }
    }
    if !line.is_empty() {
        let _ = lines.send(line).await;
    }
}
