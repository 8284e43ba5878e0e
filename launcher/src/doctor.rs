//! `mentee doctor`: is this machine fit to train the recipe? A line each for what a run needs: it says ok, what is worth
//! knowing, or what to do.
//!
//! ```text
//! here        recipe, data, files of the run (doctor/files.rs), the port that workers report to
//! one worker  libtorch, MPI, devices, NCCL, the size of a checkpoint
//! N workers   cores and threads of every rank, clocks of several nodes, one small all-reduce with a deadline
//! ```
//!
//! The workers (`mentee-worker doctor`) say what there is; what that means is decided here, by [`judge`].

mod files;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mentee_cluster::server::{hostname, open_port};
use mentee_config::recipe::Device;
use mentee_config::{Plan, Recipe, exit_code, show};
use mentee_data::open_training;
use serde::{Deserialize, Serialize};

use crate::child;
use crate::engine::{self, Engine, Layout};
use crate::failure::Failure;
use crate::ready;
use crate::rundir::RunDir;
use crate::slurm;

/// Clocks of several nodes that are further apart make logs merged by time misleading. Above what ranks on a loaded
/// machine add by leaving the barrier one after another; NTP keeps clocks within milliseconds.
const SKEW_SECONDS: f64 = 1.0;
/// What starting the workers may take beside their own deadline: libtorch from a slow network file system.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Connecting to a port of this machine.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);

/// `mentee doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee doctor
  mentee doctor my-recipe.toml --workers 4 --run-dir runs/try-3")]
pub struct DoctorArgs {
    /// The recipe that is to run here: the path of a .toml file, or the name of a built-in one; without it, data and the
    /// size of a checkpoint are left out
    recipe: Option<String>,
    /// Workers that try one small all-reduce
    #[arg(long, default_value_t = 2, value_name = "N")]
    workers: u32,
    /// How they are started
    #[arg(long, value_enum, default_value = "auto")]
    engine: Engine,
    /// Where the run is to live [default: runs/<name of the recipe>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// How long workers wait for one another, seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..86_400))]
    timeout: u32,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// As one JSON array
    #[arg(long)]
    json: bool,
}

/// How well a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// Training works; this is worth knowing.
    Note,
    /// Training fails, or is not safe.
    Fault,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    part: &'static str,
    level: Level,
    /// What there is.
    says: String,
    /// What to do; empty when there is nothing to do.
    remedy: String,
    /// What a run would end with for this; 0 unless it is a fault.
    exit_code: i32,
}

impl Finding {
    fn ok(part: &'static str, says: impl Into<String>) -> Finding {
        Finding {
            part,
            level: Level::Ok,
            says: says.into(),
            remedy: String::new(),
            exit_code: exit_code::DONE,
        }
    }

    fn note(part: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { level: Level::Note, remedy: remedy.into(), ..Finding::ok(part, says) }
    }

    fn fault(part: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
        let exit_code = exit_code::FAILED;
        Finding { level: Level::Fault, exit_code, remedy: remedy.into(), ..Finding::ok(part, says) }
    }

    fn of(part: &'static str, failure: &Failure) -> Finding {
        Finding { exit_code: failure.exit_code, ..Finding::fault(part, failure.line.clone(), "") }
    }

    fn line(&self) -> String {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Fault => "FAULT",
        };
        let remedy = if self.remedy.is_empty() { String::new() } else { format!(": {}", self.remedy) };
        format!("{level:<6}{:<12}{}{remedy}", self.part, self.says)
    }
}

/// `mentee doctor`; the exit code is 0 when training can start, else what a run would end with.
///
/// # Errors
/// [`Failure`] with exit code 2 when the command line or the recipe is wrong.
pub fn command(args: &DoctorArgs) -> Result<i32, Failure> {
    let allocation = slurm::allocation();
    let engine = engine::choose(args.engine, args.workers, allocation.as_ref())?;
    let mut recipe = args.recipe.as_ref().map(|name| Recipe::load(name, &args.sets)).transpose()?;
    if let Some(recipe) = &mut recipe {
        recipe.make_paths_absolute()?; // as in the plan that a run of it has written
    }
    if recipe.is_none() && !args.sets.is_empty() {
        return Err(Failure::usage("--set changes a recipe: name one"));
    }
    let name = recipe.as_ref().map_or("", |recipe| &recipe.run.name);
    let run_dir = args.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(name));

    // Printed as they come: the first is there at once, the last takes as long as workers need to start.
    let mut findings = Vec::new();
    let mut say = |new: Vec<Finding>| {
        for finding in new {
            if !args.json {
                show!("{}", finding.line());
            }
            findings.push(finding);
        }
    };
    let mut images = None;
    if let Some(recipe) = &recipe {
        let (finding, found) = data(recipe);
        images = found;
        say(vec![finding]);
        if images.is_some() {
            say(beside(recipe, &run_dir));
        }
    }
    let run_dir = RunDir::at(&run_dir)?;
    if recipe.is_some() || args.run_dir.is_some() {
        say(vec![run(&run_dir, recipe.as_ref())]);
    }
    let probe = files::probe(run_dir.path());
    say(files::judge(&probe));
    say(vec![port(engine::reaches_other_nodes(engine, allocation.as_ref()))]);

    let alone = facts(args, Engine::Direct, 1, &Layout { nodes: 1, left_out: Vec::new() });
    if let Ok(facts) = &alone {
        say(judge::libraries(facts, recipe.as_ref().map_or(Device::Auto, |recipe| recipe.parallel.device)));
        if let (Some(recipe), Some(free)) = (&recipe, probe.free_bytes) {
            let due = images.and_then(|images| checkpoints_due(recipe, images, run_dir.newest_step()));
            say(vec![judge::space(free, facts.checkpoint_bytes, recipe.checkpoint.keep, due)]);
        }
    }
    match alone {
        Err(finding) => say(vec![finding]),
        // A second start would tell the same.
        Ok(facts) if engine == Engine::Direct => say(judge::ranks(&facts, recipe.is_some())),
        Ok(_) => {
            let nodes = allocation.as_ref().map_or(1, |allocation| allocation.nodes.len().max(1)) as u32;
            match facts(args, engine, args.workers, &Layout { nodes, left_out: Vec::new() }) {
                Ok(facts) => say(judge::ranks(&facts, recipe.is_some())),
                Err(finding) => say(vec![finding]),
            }
        }
    }
    if args.json {
        let text = serde_json::to_string_pretty(&findings)
            .map_err(|error| Failure::failed(format!("cannot write JSON: {error}")))?;
        show!("{text}");
    }
    Ok(verdict(&findings))
}

/// The code of the first fault.
fn verdict(findings: &[Finding]) -> i32 {
    let fault = findings.iter().find(|finding| finding.level == Level::Fault);
    fault.map_or(exit_code::DONE, |finding| finding.exit_code)
}

/// How many checkpoints a run writes after step `from`: those at their steps, and the last one.
fn checkpoints_due(recipe: &Recipe, images: u64, from: u64) -> Option<u64> {
    let plan = Plan::new(recipe.clone(), images, 1).ok()?;
    let (end, by_step) = (plan.end_step(), recipe.checkpoint.every_steps);
    let by_epoch = recipe.checkpoint.every_epochs.saturating_mul(plan.steps_per_epoch);
    let (mut both, mut rest) = (by_step, by_epoch);
    while rest > 0 {
        (both, rest) = (rest, both % rest);
    }
    let both = by_step.checked_div(both).map_or(0, |parts| parts.saturating_mul(by_epoch));
    let up_to = |step: u64, of: u64| step.checked_div(of).unwrap_or(0);
    let due = |step: u64| up_to(step, by_step) + up_to(step, by_epoch) - up_to(step, both);
    let last = u64::from(from < end && due(end) == due(end.saturating_sub(1)));
    Some(due(end).saturating_sub(due(from)) + last)
}

/// What there is to train on, and how many images when they can be read.
fn data(recipe: &Recipe) -> (Finding, Option<u64>) {
    let path = &recipe.data.path;
    let source = open_training(recipe);
    let images = source.as_ref().ok().map(|source| source.len());
    let finding = match source {
        Ok(source) if source.len() < recipe.schedule.global_batch => Finding {
            exit_code: exit_code::USAGE,
            ..Finding::fault(
                "data",
                format!("{} images at {}, fewer than one global batch", source.len(), path.display()),
                "lower schedule.global_batch, or give more images",
            )
        },
        Ok(source) => Finding::ok(
            "data",
            format!("{} images at {} ({})", source.len(), path.display(), files::kind_of(path)),
        ),
        Err(error) => Finding::of("data", &Failure::from(error)),
    };
    (finding, images)
}

/// What lies beside the training images: those to be classified, and the weights that a new run starts from.
fn beside(recipe: &Recipe, run_dir: &Path) -> Vec<Finding> {
    let finding = |part: &'static str, path: &Path, result: Result<(), Failure>| match result {
        Err(failure) => Some(Finding::of(part, &failure)),
        Ok(()) if path.as_os_str().is_empty() => None,
        Ok(()) => Some(Finding::ok(part, format!("{} ({})", path.display(), files::kind_of(path)))),
    };
    let is_new = !run_dir.join("checkpoints").is_dir();
    let weights = if is_new { ready::weights(recipe) } else { Ok(()) };
    let held_out = ready::held_out(recipe);
    [finding("eval", &recipe.eval.path, held_out), finding("weights", &recipe.model.init, weights)]
        .into_iter()
        .flatten()
        .collect()
}

fn run(dir: &RunDir, recipe: Option<&Recipe>) -> Finding {
    let checked = recipe.map_or(Ok(()), |recipe| dir.check_recipe(recipe));
    match checked {
        Err(failure) => Finding::of("run", &failure),
        Ok(()) if dir.is_locked() => Finding {
            exit_code: exit_code::USAGE,
            ..Finding::fault(
                "run",
                format!("{} is in use by another mentee", dir.path().display()),
                "wait for it, stop it, or give another --run-dir",
            )
        },
        Ok(()) if dir.plan().exists() => {
            Finding::ok("run", format!("{} is resumed from step {}", dir.path().display(), dir.newest_step()))
        }
        Ok(()) => Finding::ok("run", format!("{} is new", dir.path().display())),
    }
}

/// Whether workers can reach a port that this process opens, as they would: over the loopback, or by this machine's name.
fn port(by_name: bool) -> Finding {
    if by_name {
        return port_of(&hostname(), None);
    }
    let loopback = Ipv4Addr::LOCALHOST;
    port_of(&loopback.to_string(), Some(loopback.into()))
}

/// Whether a port that this process opens on `interface`, or on every one, can be reached at `host`.
fn port_of(host: &str, interface: Option<IpAddr>) -> Finding {
    let listener = match open_port(interface) {
        Ok(listener) => listener,
        Err(error) => {
            let on = interface.map_or_else(|| "any address".to_owned(), |interface| interface.to_string());
            return Finding::fault("port", format!("cannot listen on {on}: {error}"), "allow it");
        }
    };
    let number = listener.local_addr().map_or(0, |address| address.port());
    let remedy = "give the address that workers can reach with --interface";
    let addresses: Vec<SocketAddr> = match (host, number).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return Finding::fault("port", format!("{host} has no address: {error}"), remedy),
    };
    match addresses.iter().find(|address| TcpStream::connect_timeout(address, CONNECT_PATIENCE).is_ok()) {
        Some(address) => Finding::ok("port", format!("workers reach this process at {}", address.ip())),
        None => Finding::fault("port", format!("nobody answers at {host}, port {number}"), remedy),
    }
}

/// What the workers' rank 0 prints.
#[derive(Debug, Clone, Deserialize)]
struct Facts {
    libraries: Libraries,
    devices: Devices,
    nccl: Nccl,
    checkpoint_bytes: u64,
    ranks: Vec<RankFacts>,
    all_reduce: AllReduce,
}

#[derive(Debug, Clone, Deserialize)]
struct Libraries {
    libtorch: Option<String>,
    libtorch_file: Option<PathBuf>,
    mpi: bool,
}

#[derive(Debug, Clone, Deserialize)]
struct Devices {
    count: u32,
    driver: bool,
    problem: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Nccl {
    version: Option<String>,
    file: Option<PathBuf>,
    found: Option<String>,
    same_as_libtorch: Option<bool>,
    problem: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct RankFacts {
    rank: u32,
    host: String,
    cores: usize,
    advice: Option<String>,
    clock: f64,
}

#[derive(Debug, Clone, Deserialize)]
struct AllReduce {
    ranks: u32,
    bytes: u64,
    seconds: f64,
    /// By what they exchange host memory, in training too.
    exchange: String,
}

/// Starts workers and hears what they say; the error is a line of its own.
fn facts(args: &DoctorArgs, engine: Engine, workers: u32, layout: &Layout) -> Result<Facts, Finding> {
    let part = if workers == 1 { "worker" } else { "all-reduce" };
    let tools = engine::find_tools(engine, &[]).map_err(|failure| Finding::of(part, &failure))?;
    let mut arguments: Vec<OsString> = vec!["doctor".into()];
    arguments.extend(args.recipe.iter().map(OsString::from));
    arguments.extend(args.sets.iter().flat_map(|set| ["--set".into(), OsString::from(set)]));
    arguments.extend(["--timeout".into(), args.timeout.to_string().into()]);
    let line = engine::command_line(engine, workers, &tools, layout, None, &arguments);
    let mut command = Command::new(&line.program);
    for name in &line.clear {
        command.env_remove(name);
    }
    command.args(&line.arguments).envs(line.set);
    let patience = Duration::from_secs(args.timeout.into()) + START_PATIENCE;
    let what = line.program.display().to_string();
    let said = child::ask(command, patience)
        .map_err(|error| Finding::fault(part, format!("{what}: {error}"), ""))?;
    if said.timed_out {
        let says =
            format!("{workers} workers did not finish one small all-reduce in {} s", patience.as_secs());
        let remedy = "see whether they reach one another: firewall, network interface (MPI's own settings), mpirun of \
                      another MPI";
        return Err(Finding::fault(part, says, remedy));
    }
    let facts = said.out.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    match facts {
        Some(facts) if said.code == Some(0) => Ok(facts),
        _ => {
            let mut words = said.err.lines().map(str::trim).filter(|line| !line.is_empty());
            let first = words.clone().find(|line| line.starts_with("error: ")).or(words.next_back());
            let first = first.unwrap_or("it said nothing").trim_start_matches("error: ").to_owned();
            let code = said.code.filter(|code| *code != 0).unwrap_or(exit_code::FAILED);
            Err(Finding { exit_code: code, ..Finding::fault(part, format!("{what}: {first}"), "") })
        }
    }
}

/// What the workers' facts mean.
mod judge {
    use mentee_config::exit_code;
    use mentee_config::recipe::Device;

    use super::{Facts, Finding, SKEW_SECONDS};

    pub fn libraries(facts: &Facts, wanted: Device) -> Vec<Finding> {
        let libraries = &facts.libraries;
        let file =
            libraries.libtorch_file.as_ref().map_or(String::new(), |file| format!(", {}", file.display()));
        let torch = match libraries.libtorch.as_deref() {
            Some(version) if version.starts_with("2.11.") => {
                Finding::ok("libtorch", format!("{version}{file}"))
            }
            version => Finding::fault(
                "libtorch",
                format!("{}{file}", version.unwrap_or("of an unknown version")),
                "mentee is built for 2.11: run ci/setup, or point LD_LIBRARY_PATH at one",
            ),
        };
        let mpi = match libraries.mpi {
            true => Finding::ok("MPI", "built in"),
            false => Finding::note("MPI", "not built in", "for several workers build with the feature mpi"),
        };
        vec![torch, mpi, devices(facts, wanted), nccl(facts, wanted)]
    }

    /// As ranks choose one (`device.rs` of the worker).
    fn devices(facts: &Facts, wanted: Device) -> Finding {
        let devices = &facts.devices;
        let problem = devices.problem.clone().unwrap_or_else(|| "no device".to_owned());
        let look = if devices.driver { "see nvidia-smi and CUDA_VISIBLE_DEVICES" } else { "" };
        match (wanted, devices.count) {
            (Device::Cpu, _) => {
                Finding::ok("devices", "trains on processors, as parallel.device = \"cpu\" says")
            }
            (Device::Cuda, 0) => Finding {
                exit_code: exit_code::USAGE,
                ..Finding::fault(
                    "devices",
                    format!("{problem}, but parallel.device = \"cuda\""),
                    if devices.driver { look } else { "set it to \"auto\" or \"cpu\"" },
                )
            },
            (Device::Auto, 0) => Finding::note("devices", format!("{problem}; trains on processors"), look),
            (_, n) => Finding::ok("devices", format!("{n} that libtorch can use")),
        }
    }

    fn nccl(facts: &Facts, wanted: Device) -> Finding {
        let nccl = &facts.nccl;
        let file = nccl.file.as_ref().map_or(String::new(), |file| file.display().to_string());
        let needed = facts.devices.count > 0 && wanted != Device::Cpu;
        match (&nccl.version, &nccl.problem) {
            (Some(version), _) => {
                let found = nccl.found.as_deref().unwrap_or("found");
                let says = format!("{version}, {file} ({found})");
                if nccl.same_as_libtorch == Some(true) {
                    Finding::ok("NCCL", format!("{says}, the one libtorch uses"))
                } else {
                    let remedy =
                        "two in one process fight over devices: unset MENTEE_NCCL, or let it name libtorch's";
                    Finding::note("NCCL", format!("{says}, not the one libtorch uses"), remedy)
                }
            }
            (None, Some(problem)) if needed => Finding::note("NCCL", problem.clone(), ""),
            (None, _) => Finding::note("NCCL", "none, and nothing here that needs it", ""),
        }
    }

    /// A new checkpoint is complete before the oldest goes; of `keep` = 0 none goes, and `due` come, where that is known.
    pub fn space(free: u64, checkpoint: u64, keep: u64, due: Option<u64>) -> Finding {
        let (count, stay) = match (keep, due) {
            (0, Some(due)) => (due, format!("all {due} to come stay")),
            (0, None) => (2, "all stay".to_owned()),
            (keep, _) => (keep.saturating_add(1), format!("{keep} stay")),
        };
        let wanted = checkpoint.saturating_mul(count);
        let says = format!("{} free, a checkpoint has {}, {stay}", readable(free), readable(checkpoint));
        if free < checkpoint.saturating_mul(2) {
            let remedy = "free some, or give another --run-dir";
            return Finding::fault("space", says, remedy);
        }
        if free < wanted {
            let remedy = match keep {
                0 => "free some, or let checkpoint.keep say how many stay",
                _ => "free some, or lower checkpoint.keep",
            };
            return Finding::note("space", says, remedy);
        }
        Finding::ok("space", says)
    }

    pub fn ranks(facts: &Facts, threads_are_known: bool) -> Vec<Finding> {
        let mut findings = Vec::new();
        let advised = facts.ranks.iter().find_map(|rank| rank.advice.clone());
        let cores = facts.ranks.iter().map(|rank| rank.cores).min().unwrap_or(0);
        findings.push(match advised {
            Some(advice) => Finding::note("cores", advice, ""),
            None if threads_are_known => {
                Finding::ok("cores", format!("{cores} a worker, enough for its threads"))
            }
            None => Finding::ok("cores", format!("{cores} a worker")),
        });
        findings.push(clocks(facts));
        let sum = &facts.all_reduce;
        findings.push(if sum.ranks == 1 {
            Finding::ok("all-reduce", "one worker has nobody to exchange with")
        } else {
            Finding::ok(
                "all-reduce",
                format!(
                    "{} over {} workers in {:.1} ms, right; gradients go by {}",
                    readable(sum.bytes),
                    sum.ranks,
                    sum.seconds * 1e3,
                    sum.exchange
                ),
            )
        });
        findings
    }

    fn clocks(facts: &Facts) -> Finding {
        let mut hosts: Vec<&str> = facts.ranks.iter().map(|rank| rank.host.as_str()).collect();
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.len() < 2 {
            return Finding::ok("clocks", "one node");
        }
        let by_clock = |a: &&super::RankFacts, b: &&super::RankFacts| a.clock.total_cmp(&b.clock);
        let (Some(first), Some(last)) =
            (facts.ranks.iter().min_by(by_clock), facts.ranks.iter().max_by(by_clock))
        else {
            return Finding::ok("clocks", "no rank");
        };
        let skew = last.clock - first.clock;
        if skew < SKEW_SECONDS {
            return Finding::ok("clocks", format!("{} nodes within {skew:.2} s", hosts.len()));
        }
        Finding::note(
            "clocks",
            format!(
                "rank {} on {} is {skew:.1} s ahead of rank {} on {}",
                last.rank, last.host, first.rank, first.host
            ),
            "logs merged by time mislead: synchronise the nodes' clocks (NTP)",
        )
    }

    pub fn readable(bytes: u64) -> String {
        match bytes {
            0..1024 => format!("{bytes} bytes"),
            1024..1_048_576 => format!("{:.0} KiB", bytes as f64 / 1024.0),
            1_048_576..1_073_741_824 => format!("{:.0} MiB", bytes as f64 / 1_048_576.0),
            _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let rank = |rank: u32| RankFacts { rank, host: "a".into(), cores: 4, advice: None, clock: 100.0 };
        Facts {
            libraries: Libraries { libtorch: Some("2.11.0".into()), libtorch_file: None, mpi: true },
            devices: Devices { count: 0, driver: false, problem: Some("no NVIDIA driver".into()) },
            nccl: Nccl { version: None, file: None, found: None, same_as_libtorch: None, problem: None },
            checkpoint_bytes: 1 << 20,
            ranks: vec![rank(0), rank(1)],
            all_reduce: AllReduce {
                ranks: 2,
                bytes: 1 << 20,
                seconds: 0.002,
                exchange: "shared memory".into(),
            },
        }
    }

    fn lines(findings: &[Finding]) -> Vec<String> {
        findings.iter().map(Finding::line).collect()
    }

    #[test]
    fn what_is_well_says_ok() {
        assert_eq!(
            lines(&judge::libraries(&facts(), Device::Auto)),
            [
                "ok    libtorch    2.11.0",
                "ok    MPI         built in",
                "note  devices     no NVIDIA driver; trains on processors",
                "note  NCCL        none, and nothing here that needs it",
            ]
        );
        assert_eq!(
            lines(&judge::ranks(&facts(), true)),
            [
                "ok    cores       4 a worker, enough for its threads",
                "ok    clocks      one node",
                "ok    all-reduce  1 MiB over 2 workers in 2.0 ms, right; gradients go by shared memory",
            ]
        );
    }

    #[test]
    fn what_is_not_says_what_to_do() {
        let mut other = facts();
        other.libraries.libtorch = Some("2.12.1".into());
        other.devices = Devices { count: 0, driver: true, problem: None };
        other.nccl.version = Some("2.28.9".into());
        other.nccl.same_as_libtorch = Some(false);
        other.ranks[1].host = "b".into();
        other.ranks[1].clock = 131.5;
        other.ranks[0].advice = Some("rank 0 is bound to 1 core".into());
        let found = judge::libraries(&other, Device::Cuda);
        let levels: Vec<Level> = found.iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Fault, Level::Ok, Level::Fault, Level::Note]);
        let said = lines(&judge::ranks(&other, true));
        assert_eq!(said[0], "note  cores       rank 0 is bound to 1 core");
        assert!(
            said[1].starts_with("note  clocks      rank 1 on b is 31.5 s ahead of rank 0 on a: "),
            "{said:?}"
        );
    }

    #[test]
    fn only_a_recipe_that_wants_a_device_has_none_as_a_fault() {
        let devices = |wanted, devices| {
            let found = judge::libraries(&Facts { devices, ..facts() }, wanted);
            found.into_iter().find(|finding| finding.part == "devices").expect("a line")
        };
        let none = |driver| Devices { count: 0, driver, problem: None };
        for driver in [false, true] {
            let fault = devices(Device::Cuda, none(driver));
            assert_eq!((fault.level, fault.exit_code), (Level::Fault, exit_code::USAGE));
            assert!(!fault.remedy.is_empty(), "{}", fault.line());
            assert_eq!(devices(Device::Auto, none(driver)).level, Level::Note);
            assert_eq!(devices(Device::Cpu, none(driver)).level, Level::Ok);
        }
        let two = || Devices { count: 2, driver: true, problem: None };
        assert_eq!(devices(Device::Auto, two()).line(), "ok    devices     2 that libtorch can use");
        assert_eq!(devices(Device::Cuda, two()).level, Level::Ok);
        assert!(devices(Device::Cpu, two()).line().contains("trains on processors"));
    }

    #[test]
    fn checkpoints_that_are_due_are_counted() {
        let due = |sets: &[&str], from| {
            let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
            let recipe = Recipe::load("byol-cifar10-small", &sets).expect("a recipe");
            checkpoints_due(&recipe, 1280, from).expect("a plan")
        };
        // 5 epochs of 10 steps.
        assert_eq!(due(&[], 0), 5);
        assert_eq!(due(&[], 20), 3);
        assert_eq!(due(&["checkpoint.every_epochs=2"], 0), 3);
        assert_eq!(due(&["checkpoint.every_epochs=0"], 0), 1);
        assert_eq!(due(&["checkpoint.every_steps=4"], 0), 15);
    }

    #[test]
    fn space_counts_one_checkpoint_more_than_stay() {
        let level = |free| judge::space(free, 100, 3, Some(50)).level;
        assert_eq!(
            [level(400), level(399), level(200), level(199)],
            [Level::Ok, Level::Note, Level::Note, Level::Fault]
        );
        assert_eq!(
            judge::space(10 << 30, 140 << 20, 3, None).line(),
            "ok    space       10.0 GiB free, a checkpoint has 140 MiB, 3 stay"
        );
        // All stay.
        assert_eq!(
            judge::space(10 << 30, 140 << 20, 0, Some(100)).line(),
            "note  space       10.0 GiB free, a checkpoint has 140 MiB, all 100 to come stay: free some, or let \
             checkpoint.keep say how many stay"
        );
        assert_eq!(judge::space(14 << 30, 140 << 20, 0, Some(100)).level, Level::Ok);
        assert!(judge::space(10 << 30, 140 << 20, 0, None).line().ends_with("140 MiB, all stay"));
    }

    #[test]
    fn the_first_fault_decides() {
        let data = Finding { exit_code: exit_code::DATA, ..Finding::fault("data", "", "") };
        let note = Finding::note("devices", "none", "");
        assert_eq!(verdict(&[note.clone(), data, Finding::fault("port", "", "")]), exit_code::DATA);
        assert_eq!(verdict(&[note]), exit_code::DONE);
    }

    #[test]
    fn a_port_of_this_machine_can_be_reached() {
        assert_eq!(port(false).line(), "ok    port        workers reach this process at 127.0.0.1");
        let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        for host in ["127.0.0.1", if has_v6 { "::1" } else { "127.0.0.1" }] {
            let line = format!("ok    port        workers reach this process at {host}");
            assert_eq!(port_of(host, None).line(), line, "whatever the machine's name means");
        }
    }
}
