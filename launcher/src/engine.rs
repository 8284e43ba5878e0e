//! Engines: the command line and environment that start N workers as one process to supervise.
//!
//! | engine | starts | world formed by |
//! |---|---|---|
//! | `direct` | the worker itself | nothing: a world of one |
//! | `mpirun` | `mpirun -n N mentee-worker …` | MPI |
//! | `srun` | `srun --nodes=K --ntasks=N --kill-on-bad-exit=1 … mentee-worker …` | MPI through Slurm's PMI |

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mentee_cluster::CoordinatorAddress;
use mentee_cluster::identity::{self, Allocation, COORDINATOR, GENERATION, TOKEN};

use crate::child;
use crate::failure::Failure;

/// What the Slurm step of a start is called: neither another start's nor that of another run in the same allocation is
/// taken for it.
pub fn slurm_step_name(generation: u32) -> String {
    format!("mentee-workers-{}-{generation}", std::process::id())
}

/// The worker's executable.
pub const WORKER: &str = "mentee-worker";

/// How workers are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Engine {
    /// direct for one worker, mpirun for more, srun for more on several nodes of an allocation
    #[default]
    Auto,
    /// the worker itself
    Direct,
    /// one mpirun
    Mpirun,
    /// one srun, inside a Slurm allocation
    Srun,
}

/// Whose `mpirun` it is: their options differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// MPICH, Intel MPI, Cray MPICH, MVAPICH.
    Hydra,
    /// Open MPI 4 or 5.
    OpenMpi,
}

impl Flavour {
    /// From what `mpirun --version` prints.
    pub fn of(version: &str) -> Flavour {
        if version.contains("Open MPI") || version.contains("OpenRTE") || version.contains("PRRTE") {
            Flavour::OpenMpi
        } else {
            Flavour::Hydra
        }
    }
}

/// What to execute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// Executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables to set.
    pub set: Vec<(&'static str, String)>,
    /// Variables to take out first: what an outer launcher said of this process is not true of the workers.
    pub clear: Vec<&'static str>,
}

/// Where the parts are; found once a run.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The worker's executable.
    pub worker: PathBuf,
    /// `mpirun` and whose it is, for engines that need MPI.
    pub mpirun: Option<(PathBuf, Flavour)>,
    /// This process has user id 0 (Open MPI refuses to run then unless told twice).
    pub root: bool,
    /// More arguments for `mpirun` or `srun`, behind ours: they win.
    pub more: Vec<String>,
}

/// Nodes of a Slurm allocation and the workers on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Nodes that workers are started on.
    pub nodes: u32,
    /// Names of those that are left out.
    pub left_out: Vec<String>,
}

impl Layout {
    /// The layout without one more node, and how many workers there are then: those of that node are missed.
    pub fn without(&self, node: &str, workers: u32) -> (Layout, u32) {
        let mut left_out = self.left_out.clone();
        left_out.push(node.to_owned());
        let workers = workers - workers.div_ceil(self.nodes);
        (Layout { nodes: self.nodes - 1, left_out }, workers)
    }
}

/// Whether an engine starts workers on other machines too, which reach this process by the network: srun does, and mpirun within a job
/// of several nodes.
pub fn reaches_other_nodes(engine: Engine, allocation: Option<&Allocation>) -> bool {
    let several = allocation.is_some_and(|allocation| allocation.nodes.len() > 1);
    engine == Engine::Srun || engine == Engine::Mpirun && several
}

/// The engine that `auto` means here, and whether `workers` of it can be had.
///
/// # Errors
/// [`Failure`] with exit code 2.
pub fn choose(engine: Engine, workers: u32, allocation: Option<&Allocation>) -> Result<Engine, Failure> {
    let nodes = allocation.map_or(0, |allocation| allocation.nodes.len());
    match (engine, workers) {
        (_, 0) => Err(Failure::usage("--workers 0 trains nothing: give 1 or more")),
        (Engine::Srun, _) if nodes == 0 => Err(Failure::usage(
            "--engine srun starts workers in a Slurm allocation, and this is none: use `mentee submit`, or run it \
             inside `salloc`",
        )),
        (Engine::Srun, workers) if (workers as usize) < nodes => Err(Failure::usage(format!(
            "--workers {workers} leaves some of the allocation's {nodes} nodes without a worker: give at least {nodes}"
        ))),
        (Engine::Auto, 1) => Ok(Engine::Direct),
        (Engine::Auto, workers) if nodes > 1 && workers as usize >= nodes => Ok(Engine::Srun),
        (Engine::Auto, _) => Ok(Engine::Mpirun),
        (Engine::Direct, 2..) => Err(Failure::usage(format!(
            "--engine direct starts one worker, not {workers}: use --engine mpirun, or leave --engine out"
        ))),
        (engine, _) => Ok(engine),
    }
}

/// How MPICH's and Intel's mpirun are told that ranks are this machine's own.
const HERE: [(&str, &str); 2] = [("HYDRA_LAUNCHER", "fork"), ("I_MPI_HYDRA_BOOTSTRAP", "fork")];

/// The command line for `workers` workers with `arguments` each; without an address they have no coordinator.
pub fn command_line(
    engine: Engine,
    workers: u32,
    tools: &Tools,
    layout: &Layout,
    address: Option<&CoordinatorAddress>,
    arguments: &[OsString],
) -> CommandLine {
    let mut set: Vec<(&'static str, String)> = Vec::new();
    if let Some(address) = address {
        set.push((COORDINATOR, address.host_port.clone()));
        set.push((TOKEN, address.token.clone()));
        set.push((GENERATION, address.generation.to_string()));
    }
    let clear: Vec<&'static str> = identity::variables().collect();
    let (program, mut all): (PathBuf, Vec<OsString>) = match engine {
        Engine::Direct | Engine::Auto => {
            set.extend([
                ("MENTEE_RANK", "0".to_owned()),
                ("MENTEE_WORLD_SIZE", "1".to_owned()),
                ("MENTEE_LOCAL_RANK", "0".to_owned()),
                ("MENTEE_LOCAL_SIZE", "1".to_owned()),
            ]);
            return CommandLine { program: tools.worker.clone(), arguments: arguments.to_vec(), set, clear };
        }
        Engine::Mpirun => {
            let (mpirun, flavour) = tools.mpirun.clone().unwrap_or(("mpirun".into(), Flavour::Hydra));
            let mut all = vec!["-n".into(), workers.to_string().into()];
            match flavour {
                // Passes on the whole environment and binds nothing by itself. Where it sees variables of Slurm it starts ranks by
                // an srun of its own, which waits for ever within another's step, and in a shell of a job that is over.
                Flavour::Hydra if layout.nodes == 1 => {
                    let chosen = |(name, _): &(&str, _)| std::env::var_os(name).is_some();
                    set.extend(
                        HERE.map(|(name, how)| (name, how.to_owned())).into_iter().filter(|it| !chosen(it)),
                    );
                }
                Flavour::Hydra => {}
                Flavour::OpenMpi => {
                    // Its default binds each of two ranks to one core, where decode threads starve.
                    all.extend(["--bind-to", "none", "--oversubscribe"].map(OsString::from));
                    if tools.root {
                        all.push("--allow-run-as-root".into());
                    }
                    for (variable, _) in &set {
                        all.extend([OsString::from("-x"), variable.into()]);
                    }
                }
            }
            (mpirun, all)
        }
        Engine::Srun => {
            let nodes = layout.nodes;
            let mut all = vec![
                "--job-name".into(),
                slurm_step_name(address.map_or(0, |address| address.generation)).into(),
                format!("--nodes={nodes}").into(),
                format!("--ntasks={workers}").into(),
            ];
            if workers.is_multiple_of(nodes) {
                all.push(format!("--ntasks-per-node={}", workers / nodes).into());
            }
            if !layout.left_out.is_empty() {
                all.push(format!("--exclude={}", layout.left_out.join(",")).into());
            }
            // The coordinator's address is handed on whatever the job was submitted with.
            all.push("--export=ALL".into());
            // One task that ends ends all: the others would wait for it in a collective.
            all.push("--kill-on-bad-exit=1".into());
            // What is left of the tasks of the last start must not hold up the next.
            all.push("--overlap".into());
            if !tools.more.iter().any(|more| more.starts_with("--mpi")) {
                let pmi = match tools.mpirun {
                    Some((_, Flavour::OpenMpi)) => "--mpi=pmix",
                    _ => "--mpi=pmi2",
                };
                all.push(pmi.into());
            }
            ("srun".into(), all)
        }
    };
    all.extend(tools.more.iter().map(OsString::from));
    all.push(tools.worker.clone().into());
    all.extend_from_slice(arguments);
    CommandLine { program, arguments: all, set, clear }
}

/// Finds the worker beside this executable, else on `PATH`.
///
/// # Errors
/// [`Failure`] that says where it was looked for.
pub fn find_worker() -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(WORKER)));
    if let Some(beside) = beside.as_ref().filter(|path| path.is_file()) {
        return Ok(beside.clone());
    }
    on_path(WORKER).ok_or_else(|| {
        let place = beside.as_deref().and_then(Path::parent).unwrap_or(Path::new(".")).display().to_string();
        Failure::failed(format!(
            "{WORKER} is neither in {place} nor on PATH: build it with `cargo build --release -p {WORKER}`"
        ))
    })
}

/// Finds what `engine` needs.
///
/// # Errors
/// [`Failure`] that names what is missing.
pub fn find_tools(engine: Engine, more: &[String]) -> Result<Tools, Failure> {
    let worker = find_worker()?;
    // SAFETY: getuid has no preconditions and cannot fail.
    let root = unsafe { libc::getuid() } == 0;
    let mpirun = match engine {
        Engine::Direct | Engine::Auto => None,
        Engine::Mpirun | Engine::Srun => find_mpirun(),
    };
    if engine == Engine::Mpirun && mpirun.is_none() {
        return Err(Failure::failed(
            "no mpirun: `ci/setup` installs one into .venv, or load your site's MPI; one worker (--workers 1) needs none",
        ));
    }
    if engine == Engine::Srun && on_path("srun").is_none() {
        return Err(Failure::failed("no srun on PATH: load your site's Slurm"));
    }
    if engine == Engine::Direct && !more.is_empty() {
        return Err(Failure::usage("--engine-arg is for mpirun and srun: one worker is started by itself"));
    }
    Ok(Tools { worker, mpirun, root, more: more.to_vec() })
}

/// How long an mpirun may take to say which it is: from a slow network file system.
const VERSION_PATIENCE: Duration = Duration::from_secs(30);

/// The `mpirun` of the MPI that the worker was built with (beside its compiler wrapper), else the one on `PATH`: a
/// worker under another MPI's `mpirun` would be a world of one.
fn find_mpirun() -> Option<(PathBuf, Flavour)> {
    let built_with = option_env!("MPICC").map(|mpicc| Path::new(mpicc).with_file_name("mpirun"));
    let path = built_with.filter(|path| path.is_file()).or_else(|| on_path("mpirun"))?;
    let mut version = std::process::Command::new(&path);
    version.arg("--version");
    let said = child::ask(version, VERSION_PATIENCE).ok()?;
    Some((path, Flavour::of(&said.out)))
}

/// Finds an executable on `PATH`.
pub fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.metadata().is_ok_and(|file| file.is_file() && file.mode() & 0o111 != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(engine: Engine, workers: u32, flavour: Flavour, root: bool) -> String {
        let layout = Layout { nodes: 2, left_out: Vec::new() };
        line_of(engine, workers, flavour, root, &layout, &[])
    }

    fn line_of(
        engine: Engine,
        workers: u32,
        flavour: Flavour,
        root: bool,
        layout: &Layout,
        more: &[&str],
    ) -> String {
        let more = more.iter().map(|&word| word.to_owned()).collect();
        let tools =
            Tools { worker: "/bin/w".into(), mpirun: Some(("/mpi/mpirun".into(), flavour)), root, more };
        let address = CoordinatorAddress { host_port: "h:1".into(), token: "t".into(), generation: 2 };
        let command = command_line(
            engine,
            workers,
            &tools,
            layout,
            Some(&address),
            &["p.toml".into(), "--run-dir".into(), "r".into()],
        );
        assert!(command.set.contains(&(COORDINATOR, "h:1".to_owned())));
        assert!(command.set.contains(&(TOKEN, "t".to_owned())));
        assert!(command.set.contains(&(GENERATION, "2".to_owned())));
        assert!(command.clear.contains(&"PMI_RANK") && command.clear.contains(&"OMPI_COMM_WORLD_SIZE"));
        assert_eq!(command.set.iter().any(|(name, _)| *name == "MENTEE_RANK"), engine == Engine::Direct);
        let words = std::iter::once(command.program.into_os_string()).chain(command.arguments);
        let line = words.map(|word| word.into_string().expect("UTF-8")).collect::<Vec<_>>().join(" ");
        line.replace(&slurm_step_name(2), "STEP")
    }

    #[test]
    fn command_lines() {
        let table = [
            ((Engine::Direct, 1, Flavour::Hydra, false), "/bin/w p.toml --run-dir r"),
            ((Engine::Mpirun, 4, Flavour::Hydra, true), "/mpi/mpirun -n 4 /bin/w p.toml --run-dir r"),
            (
                (Engine::Mpirun, 2, Flavour::OpenMpi, false),
                "/mpi/mpirun -n 2 --bind-to none --oversubscribe -x MENTEE_COORDINATOR -x MENTEE_TOKEN \
                 -x MENTEE_GENERATION /bin/w p.toml --run-dir r",
            ),
            (
                (Engine::Mpirun, 2, Flavour::OpenMpi, true),
                "/mpi/mpirun -n 2 --bind-to none --oversubscribe --allow-run-as-root -x MENTEE_COORDINATOR \
                 -x MENTEE_TOKEN -x MENTEE_GENERATION /bin/w p.toml --run-dir r",
            ),
            (
                (Engine::Srun, 8, Flavour::Hydra, false),
                "srun --job-name STEP --nodes=2 --ntasks=8 --ntasks-per-node=4 --export=ALL --kill-on-bad-exit=1 \
                 --overlap --mpi=pmi2 /bin/w p.toml --run-dir r",
            ),
            (
                (Engine::Srun, 8, Flavour::OpenMpi, false),
                "srun --job-name STEP --nodes=2 --ntasks=8 --ntasks-per-node=4 --export=ALL --kill-on-bad-exit=1 \
                 --overlap --mpi=pmix /bin/w p.toml --run-dir r",
            ),
        ];
        for ((engine, workers, flavour, root), expected) in table {
            assert_eq!(line(engine, workers, flavour, root), expected);
        }
    }

    #[test]
    fn ranks_of_one_machine_are_its_mpiruns_own() {
        let mpirun = Some(("/mpi/mpirun".into(), Flavour::Hydra));
        let tools = Tools { worker: "/bin/w".into(), mpirun, root: false, more: Vec::new() };
        for (nodes, own) in [(1, true), (2, false)] {
            let layout = Layout { nodes, left_out: Vec::new() };
            let command = command_line(Engine::Mpirun, 2, &tools, &layout, None, &[]);
            assert_eq!(command.set.contains(&("HYDRA_LAUNCHER", "fork".to_owned())), own, "{nodes} nodes");
        }
    }

    #[test]
    fn srun_on_what_is_left_of_an_allocation() {
        let whole = Layout { nodes: 3, left_out: Vec::new() };
        let (layout, workers) = whole.without("n2", 6);
        assert_eq!((layout.nodes, workers), (2, 4));
        let more = ["--mpi=pmix_v4", "--cpus-per-task=2"];
        assert_eq!(
            line_of(Engine::Srun, workers, Flavour::Hydra, false, &layout, &more),
            "srun --job-name STEP --nodes=2 --ntasks=4 --ntasks-per-node=2 --exclude=n2 \
             --export=ALL --kill-on-bad-exit=1 --overlap --mpi=pmix_v4 --cpus-per-task=2 /bin/w p.toml --run-dir r"
        );
        // Uneven: 3, 2, 2 workers; without a node there are at least as many as fit the others.
        let (layout, workers) = whole.without("n1", 7);
        assert_eq!((layout.nodes, workers), (2, 4));
        assert!(!line_of(Engine::Srun, 5, Flavour::Hydra, false, &layout, &[]).contains("per-node"));
    }

    #[test]
    fn auto_is_the_simplest_engine_that_works() {
        let allocation = |nodes: usize| Allocation {
            job_id: "1".into(),
            array_task: None,
            nodes: (0..nodes).map(|node| format!("n{node}")).collect(),
            restarts: 0,
        };
        let (one, two) = (allocation(1), allocation(2));
        let table = [
            (Engine::Auto, 1, None, Ok(Engine::Direct)),
            (Engine::Auto, 2, None, Ok(Engine::Mpirun)),
            (Engine::Auto, 1, Some(&two), Ok(Engine::Direct)),
            (Engine::Auto, 4, Some(&one), Ok(Engine::Mpirun)),
            (Engine::Auto, 4, Some(&two), Ok(Engine::Srun)),
            (Engine::Mpirun, 1, None, Ok(Engine::Mpirun)),
            (Engine::Mpirun, 4, Some(&two), Ok(Engine::Mpirun)),
            (Engine::Direct, 2, None, Err("one worker, not 2")),
            (Engine::Auto, 0, None, Err("--workers 0")),
            (Engine::Srun, 4, None, Err("mentee submit")),
            (Engine::Srun, 1, Some(&two), Err("2 nodes without a worker")),
            (Engine::Srun, 1, Some(&one), Ok(Engine::Srun)),
        ];
        for (engine, workers, allocation, expected) in table {
            match (choose(engine, workers, allocation), expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(chosen, expected, "{engine:?} {workers}"),
                (Err(failure), Err(part)) => {
                    assert_eq!(failure.exit_code, 2);
                    assert!(failure.line.contains(part), "{}", failure.line);
                }
                (chosen, _) => panic!("{engine:?} {workers} {allocation:?}: {chosen:?}"),
            }
        }
    }

    #[test]
    fn flavours_by_their_own_words() {
        let table = [
            ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/", Flavour::OpenMpi),
            ("mpirun (Open MPI) 5.0.11", Flavour::OpenMpi),
            ("HYDRA build details:\n    Version:                                 5.0.2", Flavour::Hydra),
            ("Intel(R) MPI Library for Linux* OS, Version 2021.13", Flavour::Hydra),
        ];
        for (version, flavour) in table {
            assert_eq!(Flavour::of(version), flavour, "{version}");
        }
    }
}
