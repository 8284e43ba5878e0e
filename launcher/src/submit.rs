//! `mentee submit`: one readable batch script, kept in the run directory, in which the supervisor stands in place of the
//! shell; submitted with `sbatch`, once or as an array of variants.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mentee_config::replace::write_atomically;
use mentee_config::{Plan, Recipe, RecipeText, complain, say, show};
use mentee_data::open_training;
use serde::{Deserialize, Serialize};

use crate::engine;
use crate::failure::Failure;
use crate::ready;
use crate::rundir::RunDir;
use crate::site::Site;
use crate::slurm::{self, Record};
use crate::supervise::STOP_GRACE;

/// Seconds before the time limit at which the run is to stop, unless told otherwise.
const STOP_LEAD: u32 = 120;
/// Of these, what is left when the workers have had their time.
const LAST_SECONDS: u32 = 20;
/// Variants of one array.
const MAX_VARIANTS: usize = 1000;

/// `mentee submit`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee submit my-recipe.toml --nodes 2 --workers-per-node 8 --gpus-per-node 8 --time 12:00:00
  mentee submit my-recipe.toml --nodes 1 --workers-per-node 4 --sweep optimizer.base_lr=0.2,0.4
  mentee submit my-recipe.toml --nodes 2 --workers-per-node 8 --dry-run")]
pub struct SubmitArgs {
    /// A recipe: the path of a .toml file, or the name of a built-in one
    pub recipe: String,
    /// Machines
    #[arg(long, value_name = "N")]
    pub nodes: Option<u32>,
    /// Worker processes on each
    #[arg(long, value_name = "M")]
    pub workers_per_node: Option<u32>,
    /// Cores of each worker [default: Slurm's, which is one]
    #[arg(long, value_name = "C")]
    pub cpus_per_worker: Option<u32>,
    /// GPUs of each machine; its workers share them by their local rank
    #[arg(long, value_name = "G")]
    pub gpus_per_node: Option<u32>,
    /// Time limit, as sbatch has it: minutes, H:MM:SS, D-HH
    #[arg(long, value_name = "T")]
    pub time: Option<String>,
    /// Partition
    #[arg(long, value_name = "P")]
    pub partition: Option<String>,
    /// Account
    #[arg(long, value_name = "A")]
    pub account: Option<String>,
    /// Quality of service
    #[arg(long, value_name = "Q")]
    pub qos: Option<String>,
    /// End for good where the job would go back into the queue
    #[arg(long)]
    pub no_requeue: bool,
    /// Stop with a checkpoint so long before the time limit [default: 120]
    #[arg(long, value_name = "SECONDS")]
    pub stop_lead: Option<u32>,
    /// Where the workers reach the supervisor: the name of a network interface, as ib0 [default: by the machine's name]
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// One more option for sbatch; may be given several times
    #[arg(long = "sbatch", value_name = "OPTION", allow_hyphen_values = true)]
    pub sbatch: Vec<String>,
    /// One more option for srun; may be given several times
    #[arg(long = "srun", value_name = "OPTION", allow_hyphen_values = true)]
    pub srun: Vec<String>,
    /// Where the run lives, on all machines; a run that is there already is resumed [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// How often crashes are answered with another start inside the allocation, in all
    #[arg(long, default_value_t = 3, value_name = "K")]
    pub max_restarts: u32,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Values to try, as an array of jobs, each with a run directory of its own in the run directory; given several
    /// times: every combination
    #[arg(long = "sweep", value_name = "SECTION.KEY=V1,V2,…")]
    pub sweeps: Vec<String>,
    /// Print the script; write and submit nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `DIR/sweep.json`: the runs of an array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// Slurm's id of the array.
    pub job: String,
    /// What is set in each run; the i-th lies in folder `i`.
    pub variants: Vec<Vec<String>>,
}

impl Sweep {
    /// The file of a sweep directory.
    pub fn file(folder: &Path) -> PathBuf {
        folder.join("sweep.json")
    }

    /// Reads it; `None` when the folder holds no sweep.
    pub fn read(folder: &Path) -> Option<Sweep> {
        serde_json::from_slice(&std::fs::read(Sweep::file(folder)).ok()?).ok()
    }
}

/// What the script needs to know, all decided.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Script {
    name: String,
    /// The run's directory; of an array, the one that holds those of its runs.
    folder: PathBuf,
    mentee: PathBuf,
    site: Site,
    nodes: u32,
    workers_per_node: u32,
    requeue: bool,
    stop_lead: u32,
    max_restarts: u32,
    /// What is set in each run of an array; empty for a single run.
    variants: Vec<Vec<String>>,
}

impl Script {
    fn text(&self) -> String {
        let Script { site, nodes, workers_per_node, .. } = self;
        let array = !self.variants.is_empty();
        let folder = self.folder.display().to_string();
        let mut text = format!(
            "#!/bin/bash\n# {}: {nodes} node{} with {workers_per_node} worker{} each. Written by mentee {}; `sbatch {}` \
             submits it again.\n",
            one_line(&self.name),
            if *nodes == 1 { "" } else { "s" },
            if *workers_per_node == 1 { "" } else { "s" },
            env!("CARGO_PKG_VERSION"),
            self.folder.join("submit.sbatch").display()
        );
        for (index, sets) in self.variants.iter().enumerate() {
            let _ = writeln!(text, "# run {index}: {}", one_line(&sets.join(" ")));
        }
        let mut option = |option: String| {
            let _ = writeln!(text, "#SBATCH {option}");
        };
        option(format!("--job-name={}", job_name(&self.name)));
        option(format!("--nodes={nodes}"));
        option(format!("--ntasks-per-node={workers_per_node}"));
        for (name, value) in [
            ("cpus-per-task", site.cpus_per_worker.map(|count| count.to_string())),
            ("gpus-per-node", site.gpus_per_node.map(|count| count.to_string())),
            ("time", site.time.clone()),
            ("partition", site.partition.clone()),
            ("account", site.account.clone()),
            ("qos", site.qos.clone()),
        ] {
            if let Some(value) = value {
                option(format!("--{name}={}", quoted(&value)));
            }
        }
        if array {
            option(format!("--array=0-{}", self.variants.len() - 1));
        }
        option(if self.requeue { "--requeue" } else { "--no-requeue" }.to_owned());
        option(format!("--signal=B:USR1@{}", self.stop_lead));
        // `%` begins a pattern of sbatch.
        let task = if array { "/%a" } else { "" };
        option(format!(
            "--output={}",
            quoted(&format!("{}{task}/logs/slurm.log", folder.replace('%', "%%")))
        ));
        option("--open-mode=append".to_owned());
        for more in &site.sbatch {
            option(more.clone());
        }
        text.push_str(
            "\n# Slurm's warning is for the supervisor; until it listens, it must not end this shell.\ntrap '' USR1\n",
        );
        // sbatch hands on the variables of a step that it was called in.
        text.push_str(
            "# This shell is in no step, wherever it was submitted from.\nunset SLURM_STEP_ID SLURM_STEPID\n",
        );
        for line in &site.setup {
            let _ = writeln!(text, "{line}");
        }
        if array {
            let _ = writeln!(text, "run={}/$SLURM_ARRAY_TASK_ID", quoted(&folder));
        } else {
            let _ = writeln!(text, "run={}", quoted(&folder));
        }
        let _ = write!(
            text,
            "# In place of this shell, so that Slurm's signals reach it.\nexec {} run \"$run/plan.toml\" --run-dir \"$run\" \
             \\\n    --engine srun --workers {} --max-restarts {}",
            quoted(&self.mentee.display().to_string()),
            nodes * workers_per_node,
            self.max_restarts
        );
        // What the lead leaves to the end of the job itself.
        let stop_grace = u64::from(self.stop_lead.saturating_sub(LAST_SECONDS));
        if stop_grace > STOP_GRACE.as_secs() {
            let _ = write!(text, " --stop-grace {stop_grace}");
        }
        if self.requeue {
            text.push_str(" --requeue");
        }
        if let Some(interface) = &site.interface {
            let _ = write!(text, " --interface {}", quoted(interface));
        }
        // srun does not take this over from the job.
        let cpus = site.cpus_per_worker.map(|count| format!("--cpus-per-task={count}"));
        for argument in cpus.iter().chain(&site.srun) {
            let _ = write!(text, " \\\n    --engine-arg={}", quoted(argument));
        }
        text.push('\n');
        text
    }
}

impl Script {
    /// sbatch's variables that would win over what the script says.
    fn overridden(&self) -> Vec<&'static str> {
        let always =
            ["REQUEUE", "NO_REQUEUE", "SIGNAL", "OUTPUT", "OPEN_MODE", "JOB_NAME", "ARRAY_INX", "WAIT"]
                .into_iter();
        let gpus = self.site.gpus_per_node.map(|_| "GPUS_PER_NODE");
        let site = &self.site;
        let given = [
            ("TIMELIMIT", &site.time),
            ("PARTITION", &site.partition),
            ("ACCOUNT", &site.account),
            ("QOS", &site.qos),
        ];
        let given = given.into_iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name);
        always.chain(given).chain(gpus).collect()
    }
}

/// A job's name without what `squeue` and `scontrol` would be misread by.
fn job_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect()
}

/// Fit for a comment.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// As one word of a shell, and of an `#SBATCH` line.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.,:=@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Seconds of a time limit in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; `None` for no limit.
fn seconds(time: &str) -> Result<Option<u64>, Failure> {
    let bad = || {
        Failure::usage(format!(
            "--time {time}: give minutes, H:MM:SS or D-HH:MM:SS, as `sbatch --time` has it"
        ))
    };
    if ["infinite", "unlimited", "0"].contains(&time.to_lowercase().as_str()) {
        return Ok(None);
    }
    let (days, rest) = match time.split_once('-') {
        Some((days, rest)) => (Some(days.parse::<u64>().map_err(|_| bad())?), rest),
        None => (None, time),
    };
    let parts: Vec<u64> =
        rest.split(':').map(|part| part.parse().map_err(|_| bad())).collect::<Result<_, _>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (Some(_), &[hours]) => (hours, 0, 0),
        (Some(_), &[hours, minutes]) => (hours, minutes, 0),
        (None, &[minutes]) => (0, minutes, 0),
        (None, &[minutes, seconds]) => (0, minutes, seconds),
        (_, &[hours, minutes, seconds]) => (hours, minutes, seconds),
        _ => return Err(bad()),
    };
    [(days.unwrap_or(0), 86_400), (hours, 3600), (minutes, 60), (seconds, 1)]
        .into_iter()
        .try_fold(0u64, |total, (count, unit)| total.checked_add(count.checked_mul(unit)?))
        .map(Some)
        .ok_or_else(bad)
}

/// Cuts `section.key=v1,v2,…` at the commas outside of brackets and quotes, into one `--set` each.
fn values(sweep: &str) -> Result<Vec<String>, Failure> {
    let bad = || Failure::usage(format!("--sweep {sweep}: expected section.key=v1,v2,…"));
    let (key, list) = sweep.split_once('=').filter(|(key, _)| key.contains('.')).ok_or_else(bad)?;
    let (mut depth, mut quote, mut start) = (0i32, None, 0);
    let mut found = Vec::new();
    for (at, c) in list.char_indices().chain([(list.len(), ',')]) {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            (_, Some(_)) if at < list.len() => {}
            ('"' | '\'', None) => quote = Some(c),
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth -= 1,
            (',', None) if depth == 0 => {
                let value = list[start..at].trim();
                if value.is_empty() {
                    return Err(bad());
                }
                found.push(format!("{key}={value}"));
                start = at + 1;
            }
            _ => {}
        }
    }
    if depth != 0 || quote.is_some() { Err(bad()) } else { Ok(found) }
}

/// Every combination of the sweeps' values; the last one varies first.
fn variants(sweeps: &[String]) -> Result<Vec<Vec<String>>, Failure> {
    let mut all: Vec<Vec<String>> = vec![Vec::new()];
    for sweep in sweeps {
        let values = values(sweep)?;
        all = all
            .iter()
            .flat_map(|chosen| {
                values.iter().map(move |value| [chosen.as_slice(), std::slice::from_ref(value)].concat())
            })
            .collect();
        if all.len() > MAX_VARIANTS {
            return Err(Failure::usage(format!(
                "--sweep: more than {MAX_VARIANTS} combinations; try fewer values"
            )));
        }
    }
    Ok(if sweeps.is_empty() { Vec::new() } else { all })
}

/// The command line over the site's defaults.
fn merged(args: &SubmitArgs, site: Site) -> Site {
    let or = |mine: &Option<String>, theirs: Option<String>| mine.clone().or(theirs);
    Site {
        account: or(&args.account, site.account),
        partition: or(&args.partition, site.partition),
        qos: or(&args.qos, site.qos),
        time: or(&args.time, site.time),
        nodes: args.nodes.or(site.nodes),
        workers_per_node: args.workers_per_node.or(site.workers_per_node),
        cpus_per_worker: args.cpus_per_worker.or(site.cpus_per_worker),
        gpus_per_node: args.gpus_per_node.or(site.gpus_per_node),
        stop_lead: args.stop_lead.or(site.stop_lead),
        interface: or(&args.interface, site.interface),
        setup: site.setup,
        sbatch: [site.sbatch, args.sbatch.clone()].concat(),
        srun: [site.srun, args.srun.clone()].concat(),
    }
}

/// The resolved recipe of one run, with paths that mean the same on every machine.
fn resolve(text: &RecipeText, args: &SubmitArgs, more: &[String]) -> Result<Recipe, Failure> {
    let mut recipe = text.resolve(&[args.sets.as_slice(), more].concat())?;
    recipe.make_paths_absolute()?;
    Ok(recipe)
}

/// Whether so many workers can run it, as far as can be told here.
fn check(recipe: &Recipe, workers: u32) -> Result<(), Failure> {
    // What it reads may be on the compute nodes alone; where it can be seen, it is checked before the job waits for hours.
    if recipe.data.path.exists() {
        Plan::new(recipe.clone(), open_training(recipe)?.len(), workers)?;
    }
    if recipe.eval.path.exists() {
        ready::held_out(recipe)?;
    }
    if recipe.model.init.exists() {
        ready::weights(recipe)?;
    }
    Ok(())
}

/// `mentee submit`.
///
/// # Errors
/// [`Failure`]; nothing has been submitted then.
pub fn command(args: &SubmitArgs) -> Result<(), Failure> {
    let (site, from) = Site::load()?;
    let site = merged(args, site);
    let positive = |name: &str, value: Option<u32>| match value {
        Some(0) | None => {
            Err(Failure::usage(format!("--{name}: give 1 or more, or a default in the site's file")))
        }
        Some(value) => Ok(value),
    };
    let nodes = positive("nodes", site.nodes)?;
    let workers_per_node = positive("workers-per-node", site.workers_per_node)?;
    let workers = nodes.checked_mul(workers_per_node).ok_or_else(|| {
        Failure::usage(format!("--nodes {nodes} times --workers-per-node {workers_per_node}: too many"))
    })?;
    let stop_lead = site.stop_lead.unwrap_or(STOP_LEAD);
    if let Some(time) = &site.time
        && let Some(limit) = seconds(time)?
        && limit < 2 * u64::from(stop_lead)
    {
        return Err(Failure::usage(format!(
            "--time {time} leaves no time to train when the run stops {stop_lead} s before its end: raise it, or lower \
             --stop-lead"
        )));
    }
    let variants = variants(&args.sweeps)?;
    let text = RecipeText::read(&args.recipe)?;
    let base = resolve(&text, args, &[])?;
    let folder = args.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&base.run.name));
    let dir = RunDir::at(&folder)?;
    let folder = dir.path().to_owned();
    if folder.to_string_lossy().contains(['\n', '\\']) {
        return Err(Failure::usage(format!(
            "--run-dir {}: Slurm has no way to write a path with a line break or a backslash: give another",
            folder.display()
        )));
    }
    refuse_other_kind(&dir, !variants.is_empty())?;
    // The runs, and whether they can be what is asked for: before anything is written.
    let mut runs = Vec::new();
    if variants.is_empty() {
        runs.push((dir.clone(), base.clone()));
    }
    for (index, sets) in variants.iter().enumerate() {
        runs.push((RunDir::at(&folder.join(index.to_string()))?, resolve(&text, args, sets)?));
    }
    for (run, recipe) in &runs {
        run.check_recipe(recipe)?;
        check(recipe, workers)?;
    }
    let mentee = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot tell the path of this program: {error}")))?;
    engine::find_worker()?;
    let script = Script {
        name: base.run.name.clone(),
        folder,
        mentee,
        site,
        nodes,
        workers_per_node,
        requeue: !args.no_requeue,
        stop_lead,
        max_restarts: args.max_restarts,
        variants,
    };
    if args.dry_run {
        show!("{}", script.text().trim_end());
        if let Some(from) = from {
            complain!("site defaults: {}", from.display());
        }
        return Ok(());
    }
    let mut jobs = slurm::Jobs::default();
    for (run, _) in &runs {
        refuse_second(run, &mut jobs)?;
    }
    let new: Vec<PathBuf> = runs.iter().map(|(run, _)| run.plan()).filter(|plan| !plan.exists()).collect();
    for (run, recipe) in &runs {
        std::fs::create_dir_all(run.logs()).map_err(|error| Failure::io("create", &run.logs(), &error))?;
        write_atomically(&run.plan(), recipe.to_toml().as_bytes())
            .map_err(|error| Failure::io("write", &run.plan(), &error))?;
    }
    write_atomically(&dir.script(), script.text().as_bytes())
        .map_err(|error| Failure::io("write", &dir.script(), &error))?;
    submit(&script, &dir, &runs, &new)
}

/// One folder, one script: a run and a sweep would submit each other's again.
fn refuse_other_kind(dir: &RunDir, is_sweep: bool) -> Result<(), Failure> {
    let (holds, asked) = match is_sweep {
        false if Sweep::file(dir.path()).exists() => ("a sweep", "a single run"),
        true if dir.plan().exists() => ("a single run", "a sweep"),
        _ => return Ok(()),
    };
    Err(Failure::usage(format!(
        "{} holds {holds}, and {asked} was asked for: give another --run-dir",
        dir.path().display()
    )))
}

/// The job's number in what `sbatch --parsable` said: `ID`, or `ID;CLUSTER`, which a site's wrapper may write lines around.
fn submitted(said: &str) -> Option<String> {
    let number = |line: &str| {
        let id = line.trim().split(';').next().unwrap_or_default();
        (!id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit())).then(|| id.to_owned())
    };
    said.lines().rev().find_map(number)
}

/// One job a run directory.
fn refuse_second(run: &RunDir, jobs: &mut slurm::Jobs) -> Result<(), Failure> {
    if let Some(record) = Record::read(run)
        && let Ok(Some(job)) = jobs.query(&record.job)
        && job.is_active()
    {
        return Err(Failure::usage(format!(
            "job {} already works in {} ({job}): `scancel {}` ends it, or give another --run-dir",
            record.job,
            run.path().display(),
            record.job
        )));
    }
    if run.is_locked() {
        return Err(Failure::usage(format!(
            "{} is in use by another mentee: wait for it, stop it, or give another --run-dir",
            run.path().display()
        )));
    }
    Ok(())
}

/// `new`: plans that were not there before.
fn submit(script: &Script, dir: &RunDir, runs: &[(RunDir, Recipe)], new: &[PathBuf]) -> Result<(), Failure> {
    let path = dir.script();
    let script_path = path.display().to_string();
    let asked = slurm::submission(&["--parsable", &script_path], &script.overridden());
    let said = asked.map_err(|why| match why {
        slurm::NoAnswer::Refused(why) => {
            // The next try may be of another recipe.
            new.iter().for_each(|plan| drop(std::fs::remove_file(plan)));
            Failure::failed(format!("{why}; nothing was submitted, the script is {}", path.display()))
        }
        late @ slurm::NoAnswer::Late { .. } => Failure::failed(format!(
            "{late}; whether the job was submitted is not known: look at squeue --name={}, the script is {}",
            job_name(&script.name),
            path.display()
        )),
    })?;
    let job = submitted(&said).ok_or_else(|| {
        Failure::failed(format!(
            "sbatch said {:?} and no job's number; whether the job was submitted is not known: look at squeue --name={}, \
             the script is {}",
            one_line(said.trim()),
            job_name(&script.name),
            path.display()
        ))
    })?;
    let status = format!("mentee status {}", dir.path().display());
    // A second submission would find no trace of it.
    let noted = |written: Result<(), Failure>| {
        written.map_err(|failure| Failure {
            line: format!(
                "job {job} was submitted, and its number could not be kept ({}): make room, `scancel {job}`, and submit again",
                failure.line
            ),
            ..failure
        })
    };
    if script.variants.is_empty() {
        noted(Record::new(job.clone(), path).write(dir))?;
        say!("job {job}: {} on {} nodes; `{status}` follows it", script.name, script.nodes);
        return Ok(());
    }
    let sweep = Sweep { job: job.clone(), variants: script.variants.clone() };
    let text = serde_json::to_vec_pretty(&sweep).expect("a sweep is JSON");
    let file = Sweep::file(dir.path());
    noted(write_atomically(&file, &text).map_err(|error| Failure::io("write", &file, &error)))?;
    for (index, (run, _)) in runs.iter().enumerate() {
        noted(Record::new(format!("{job}_{index}"), path.clone()).write(run))?;
    }
    say!(
        "job {job}: {} runs of {} on {} nodes each; `{status}` follows them",
        runs.len(),
        script.name,
        script.nodes
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script() -> Script {
        Script {
            name: "byol small".into(),
            folder: "/data/my runs/one%".into(),
            mentee: "/opt/mentee/bin/mentee".into(),
            site: Site::default(),
            nodes: 2,
            workers_per_node: 4,
            requeue: true,
            stop_lead: 120,
            max_restarts: 3,
            variants: Vec::new(),
        }
    }

    #[test]
    fn the_script_of_one_run() {
        let mut script = script();
        script.site = Site {
            account: Some("vision".into()),
            partition: Some("gpu".into()),
            qos: Some("long".into()),
            time: Some("12:00:00".into()),
            cpus_per_worker: Some(8),
            gpus_per_node: Some(4),
            interface: Some("ib0".into()),
            setup: vec!["module load gcc".into()],
            sbatch: vec!["--constraint=icelake".into()],
            srun: vec!["--cpu-bind=cores".into()],
            ..Site::default()
        };
        let expected = "\
#!/bin/bash
# byol small: 2 nodes with 4 workers each. Written by mentee VERSION; `sbatch /data/my runs/one%/submit.sbatch` submits it again.
#SBATCH --job-name=byol-small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --partition=gpu
#SBATCH --account=vision
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output='/data/my runs/one%%/logs/slurm.log'
#SBATCH --open-mode=append
#SBATCH --constraint=icelake

# Slurm's warning is for the supervisor; until it listens, it must not end this shell.
trap '' USR1
# This shell is in no step, wherever it was submitted from.
unset SLURM_STEP_ID SLURM_STEPID
module load gcc
run='/data/my runs/one%'
# In place of this shell, so that Slurm's signals reach it.
exec /opt/mentee/bin/mentee run \"$run/plan.toml\" --run-dir \"$run\" \\
    --engine srun --workers 8 --max-restarts 3 --stop-grace 100 --requeue --interface ib0 \\
    --engine-arg=--cpus-per-task=8 \\
    --engine-arg=--cpu-bind=cores
";
        assert_eq!(script.text(), expected.replace("VERSION", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn the_script_of_an_array() {
        let mut script = script();
        script.requeue = false;
        script.variants = variants(&["optimizer.base_lr=0.1,0.2".into()]).expect("two");
        let text = script.text();
        for part in [
            "# run 1: optimizer.base_lr=0.2\n",
            "#SBATCH --array=0-1\n",
            "#SBATCH --no-requeue\n",
            "#SBATCH --output='/data/my runs/one%%/%a/logs/slurm.log'\n",
            "run='/data/my runs/one%'/$SLURM_ARRAY_TASK_ID\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(text.ends_with("--engine srun --workers 8 --max-restarts 3 --stop-grace 100\n"), "{text}");
    }

    #[test]
    fn sweeps_are_every_combination() {
        let sweeps = ["optimizer.base_lr=0.1,0.2".into(), "views.crop_area=[0.2, 1.0],[0.3,1.0]".into()];
        assert_eq!(
            variants(&sweeps).expect("four"),
            [
                ["optimizer.base_lr=0.1", "views.crop_area=[0.2, 1.0]"],
                ["optimizer.base_lr=0.1", "views.crop_area=[0.3,1.0]"],
                ["optimizer.base_lr=0.2", "views.crop_area=[0.2, 1.0]"],
                ["optimizer.base_lr=0.2", "views.crop_area=[0.3,1.0]"],
            ]
        );
        assert_eq!(values("run.name=\"a,b\",'c'").expect("two"), ["run.name=\"a,b\"", "run.name='c'"]);
        for bad in ["optimizer.base_lr", "base_lr=1,2", "a.b=", "a.b=1,,2", "a.b=[1,2", "a.b=\"1,2"] {
            assert_eq!(values(bad).expect_err(bad).exit_code, 2);
        }
        assert_eq!(variants(&[]).expect("none"), [[""; 0]; 0]);
        let many = format!("a.b={}", ["1"; 40].join(","));
        assert!(variants(&[many.clone(), many]).is_err());
    }

    #[test]
    fn slurms_times_are_read() {
        let table = [
            ("90", Some(5400)),
            ("90:30", Some(5430)),
            ("1:02:03", Some(3723)),
            ("2-0", Some(172_800)),
            ("1-02:03", Some(93_780)),
            ("1-02:03:04", Some(93_784)),
            ("UNLIMITED", None),
            ("0", None),
        ];
        for (time, expected) in table {
            assert_eq!(seconds(time).expect(time), expected, "{time}");
        }
        for bad in ["307445734561825861", "99999999999999999-00", "", "1h", "1:2:3:4", "1-", "-1"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_folder_holds_a_run_or_a_sweep() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = RunDir::at(folder.path()).expect("a folder");
        assert!(refuse_other_kind(&dir, true).is_ok() && refuse_other_kind(&dir, false).is_ok());
        std::fs::write(dir.plan(), "").expect("written");
        assert!(refuse_other_kind(&dir, false).is_ok());
        let line = refuse_other_kind(&dir, true).expect_err("a run").line;
        assert!(
            line.ends_with("holds a single run, and a sweep was asked for: give another --run-dir"),
            "{line}"
        );
        std::fs::remove_file(dir.plan()).expect("removed");
        std::fs::write(Sweep::file(dir.path()), "{}").expect("written");
        assert!(refuse_other_kind(&dir, true).is_ok());
        assert!(refuse_other_kind(&dir, false).expect_err("a sweep").line.contains("holds a sweep"));
    }

    #[test]
    fn the_jobs_number_is_found_in_what_sbatch_says() {
        for (said, job) in [
            ("12\n", Some("12")),
            ("12;cluster\n", Some("12")),
            ("Welcome to cluster 7\n160\n", Some("160")),
            ("160\nHave a nice day\n", Some("160")),
            ("", None),
            ("Submitted\n", None),
        ] {
            assert_eq!(submitted(said).as_deref(), job, "{said}");
        }
    }

    #[test]
    fn what_the_command_line_says_wins_over_sbatchs_variables() {
        let mut script = script();
        assert!(!script.overridden().contains(&"PARTITION") && script.overridden().contains(&"NO_REQUEUE"));
        script.site.partition = Some("gpu".into());
        assert!(script.overridden().contains(&"PARTITION") && !script.overridden().contains(&"ACCOUNT"));
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quoted("/a/b-c_d.e=1"), "/a/b-c_d.e=1");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted("runs/[ab]"), "'runs/[ab]'", "a shell would take the name of a file for it");
        assert_eq!(quoted(""), "''");
        assert_eq!(one_line("a\nb"), "a b");
        assert_eq!(job_name("a b/JobState=X"), "a-b-JobState-X");
    }
}
