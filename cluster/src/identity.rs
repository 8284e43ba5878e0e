//! Who am I: rank and world size from whichever launcher started this process. The one file that knows
//! launchers' environment variables; everything else is handed an [`Identity`].
//!
//! | launcher | rank | world size | local rank | local size |
//! |---|---|---|---|---|
//! | `mentee run` | `MENTEE_RANK` | `MENTEE_WORLD_SIZE` | `MENTEE_LOCAL_RANK` | `MENTEE_LOCAL_SIZE` |
//! | torchrun | `RANK` | `WORLD_SIZE` | `LOCAL_RANK` | `LOCAL_WORLD_SIZE` |
//! | Open MPI 4, 5 | `OMPI_COMM_WORLD_RANK` | `…_SIZE` | `…_LOCAL_RANK` | `…_LOCAL_SIZE` |
//! | MPICH, Intel, Cray | `PMI_RANK` or `PMI_ID` | `PMI_SIZE` | `MPI_LOCALRANKID` or `PMI_LOCAL_RANK` | `MPI_LOCALNRANKS` or `PMI_LOCAL_SIZE` |
//! | MVAPICH2 | `MV2_COMM_WORLD_RANK` | `…_SIZE` | `…_LOCAL_RANK` | `…_LOCAL_SIZE` |
//! | srun | `SLURM_PROCID` | `SLURM_STEP_NUM_TASKS` | `SLURM_LOCALID` | `SLURM_STEP_TASKS_PER_NODE` at `SLURM_NODEID` |
//!
//! The first row that is complete wins. Slurm is asked last and only inside a step: its variables leak into batch
//! shells and into what `mpirun` starts from them, always claiming rank 0. Two launchers that disagree about
//! rank or world size are refused: one of them would otherwise train alone, silently.

mod machine;
mod slurm;

pub use machine::{affinity_advice, visible_devices};
pub use slurm::{Allocation, expand_nodes};

use crate::message::CoordinatorAddress;

/// `host:port` of the job's coordinator, set by the supervisor.
pub const COORDINATOR: &str = "MENTEE_COORDINATOR";
/// The job's token, set by the supervisor.
pub const TOKEN: &str = "MENTEE_TOKEN";
/// How many times the gang was started before, set by the supervisor.
pub const GENERATION: &str = "MENTEE_GENERATION";

/// A process's place in the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// 0-based place in the world.
    pub rank: u32,
    /// Processes in the world.
    pub world_size: u32,
    /// 0-based place among this machine's ranks.
    pub local_rank: u32,
    /// Ranks on this machine.
    pub local_size: u32,
    /// The launcher that said so, for messages.
    pub source: &'static str,
}

/// Why the environment does not say who this process is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A variable holds no whole number.
    #[error("{variable} = {value:?} is no whole number: unset it, or start this process with one launcher")]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// What it holds.
        value: String,
    },
    /// Half of a launcher's variables are there.
    #[error(
        "{source_name} set {present} but not {missing}: set MENTEE_RANK, MENTEE_WORLD_SIZE, MENTEE_LOCAL_RANK and \
         MENTEE_LOCAL_SIZE, or start the workers with `mentee run`"
    )]
    Incomplete {
        /// The launcher.
        source_name: &'static str,
        /// A variable that is set.
        present: &'static str,
        /// The one that is missing.
        missing: &'static str,
    },
    /// A rank outside its world.
    #[error("{source_name} says {what} {rank} of {size}: ranks count from 0 to {size} - 1")]
    OutOfRange {
        /// The launcher.
        source_name: &'static str,
        /// "rank" or "local rank".
        what: &'static str,
        /// The rank.
        rank: u32,
        /// The size it is not below.
        size: u32,
    },
    /// Two launchers say different things.
    #[error(
        "{first} says rank {first_rank} of {first_size} but {second} says rank {second_rank} of {second_size}: start \
         the workers with one launcher, or unset the other's variables"
    )]
    Conflict {
        /// One launcher.
        first: &'static str,
        /// Its rank.
        first_rank: u32,
        /// Its world size.
        first_size: u32,
        /// The other launcher.
        second: &'static str,
        /// Its rank.
        second_rank: u32,
        /// Its world size.
        second_size: u32,
    },
    /// Slurm's list of tasks a node cannot be read.
    #[error("{variable} = {value:?} cannot be read at node {node}: expected a form like 2(x3),1")]
    TasksPerNode {
        /// The variable.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// `SLURM_NODEID`.
        node: u32,
    },
}

/// One row of the table: alternatives for each column, first found counts.
struct Row {
    name: &'static str,
    rank: &'static [&'static str],
    world_size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
    /// A lone rank or size means nothing: the names are used by others too.
    generic: bool,
}

const TABLE: &[Row] = &[
    Row {
        name: "mentee",
        rank: &["MENTEE_RANK"],
        world_size: &["MENTEE_WORLD_SIZE"],
        local_rank: &["MENTEE_LOCAL_RANK"],
        local_size: &["MENTEE_LOCAL_SIZE"],
        generic: false,
    },
    Row {
        name: "torchrun",
        rank: &["RANK"],
        world_size: &["WORLD_SIZE"],
        local_rank: &["LOCAL_RANK"],
        local_size: &["LOCAL_WORLD_SIZE"],
        generic: true,
    },
    Row {
        name: "Open MPI",
        rank: &["OMPI_COMM_WORLD_RANK"],
        world_size: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        generic: false,
    },
    Row {
        name: "PMI (MPICH, Intel or Cray MPI)",
        // PMI_ID stands in for PMI_RANK under `mpiexec -pmi-port`.
        rank: &["PMI_RANK", "PMI_ID"],
        world_size: &["PMI_SIZE"],
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
        local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
        generic: false,
    },
    Row {
        name: "MVAPICH2",
        rank: &["MV2_COMM_WORLD_RANK"],
        world_size: &["MV2_COMM_WORLD_SIZE"],
        local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
        local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
        generic: false,
    },
];

/// A way to look a variable up, normally `&|name| std::env::var(name).ok()`.
pub type Env<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Finds this process's place in the job from `env` (normally `&|name| std::env::var(name).ok()`).
///
/// No launcher's variables at all: a world of one, named "none".
///
/// # Errors
/// [`IdentityError`] when variables are half there, unreadable, or contradict each other.
pub fn discover(env: &Env) -> Result<Identity, IdentityError> {
    let slurm = slurm::step(env)?;
    let mut found: Option<Identity> = None;
    for row in TABLE {
        let Some(identity) = read_row(row, env, slurm.as_ref())? else { continue };
        match &found {
            None => found = Some(identity),
            Some(first) => agree(first, &identity)?,
        }
    }
    let Some(found) = found else {
        return Ok(slurm.unwrap_or(Identity {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_size: 1,
            source: "none",
        }));
    };
    // Under `mpirun` in an allocation, Slurm speaks of the step that started mpirun's daemons: other numbers are
    // normal. But N tasks of srun which each believe to be alone are N trainings of the same run.
    if let Some(slurm) = slurm
        && found.world_size == 1
        && slurm.world_size > 1
        && found.source != TABLE[0].name
    {
        agree(&found, &slurm)?;
    }
    Ok(found)
}

/// Every variable that may say who a process is; a supervisor takes them out of its workers' environment before it
/// sets its own.
pub fn variables() -> impl Iterator<Item = &'static str> {
    TABLE
        .iter()
        .flat_map(|row| [row.rank, row.world_size, row.local_rank, row.local_size])
        .flatten()
        .copied()
        .chain(["PMI_FD", "PMI_PORT", "PMIX_RANK", "PMIX_NAMESPACE"])
}

impl CoordinatorAddress {
    /// Where the supervisor said its coordinator listens; `None` in a process that was started bare.
    pub fn from_env(env: &Env) -> Option<CoordinatorAddress> {
        Some(CoordinatorAddress {
            host_port: get(env, COORDINATOR)?,
            token: get(env, TOKEN)?,
            generation: get(env, GENERATION).and_then(|text| text.parse().ok()).unwrap_or(0),
        })
    }
}

fn agree(first: &Identity, second: &Identity) -> Result<(), IdentityError> {
    if (first.rank, first.world_size) == (second.rank, second.world_size) {
        return Ok(());
    }
    Err(IdentityError::Conflict {
        first: first.source,
        first_rank: first.rank,
        first_size: first.world_size,
        second: second.source,
        second_rank: second.rank,
        second_size: second.world_size,
    })
}

fn read_row(row: &Row, env: &Env, slurm: Option<&Identity>) -> Result<Option<Identity>, IdentityError> {
    // Before they are read: alone they may be somebody else's, and no numbers.
    let is_set = |names: &[&str]| names.iter().any(|name| get(env, name).is_some());
    if row.generic && !(is_set(row.rank) && is_set(row.world_size)) {
        return Ok(None);
    }
    let rank = number(env, row.rank)?;
    let world_size = number(env, row.world_size)?;
    let (rank, world_size) = match (rank, world_size) {
        (Some((_, rank)), Some((_, size))) => (rank, size),
        (None, None) => return Ok(None),
        (Some((present, _)), None) => return Err(incomplete(row, present, row.world_size[0])),
        (None, Some((present, _))) => return Err(incomplete(row, present, row.rank[0])),
    };
    if rank >= world_size {
        return Err(IdentityError::OutOfRange {
            source_name: row.name,
            what: "rank",
            rank,
            size: world_size,
        });
    }
    let local_rank = number(env, row.local_rank)?.map(|(_, value)| value);
    let local_size = number(env, row.local_size)?.map(|(_, value)| value);
    let (local_rank, local_size) = match (local_rank, local_size) {
        (Some(rank), Some(size)) => (rank, size),
        _ if world_size == 1 => (0, 1),
        // `srun --mpi=pmi2` gives PMI_RANK and PMI_SIZE, and leaves the local part to Slurm's own variables.
        _ => match slurm.filter(|slurm| (slurm.rank, slurm.world_size) == (rank, world_size)) {
            Some(slurm) => (slurm.local_rank, slurm.local_size),
            None => {
                let missing = if local_rank.is_none() { row.local_rank[0] } else { row.local_size[0] };
                return Err(incomplete(row, row.rank[0], missing));
            }
        },
    };
    checked(Identity { rank, world_size, local_rank, local_size, source: row.name }).map(Some)
}

fn checked(identity: Identity) -> Result<Identity, IdentityError> {
    let out_of_range =
        |what, rank, size| IdentityError::OutOfRange { source_name: identity.source, what, rank, size };
    if identity.rank >= identity.world_size {
        return Err(out_of_range("rank", identity.rank, identity.world_size));
    }
    if identity.local_rank >= identity.local_size {
        return Err(out_of_range("local rank", identity.local_rank, identity.local_size));
    }
    Ok(identity)
}

fn incomplete(row: &Row, present: &'static str, missing: &'static str) -> IdentityError {
    IdentityError::Incomplete { source_name: row.name, present, missing }
}

fn number(env: &Env, names: &[&'static str]) -> Result<Option<(&'static str, u32)>, IdentityError> {
    for &variable in names {
        if let Some(value) = get(env, variable) {
            return match value.trim().parse() {
                Ok(number) => Ok(Some((variable, number))),
                Err(_) => Err(IdentityError::NotANumber { variable, value }),
            };
        }
    }
    Ok(None)
}

/// A variable set to nothing counts as not set.
fn get(env: &Env, name: &str) -> Option<String> {
    env(name).filter(|value| !value.trim().is_empty())
}
