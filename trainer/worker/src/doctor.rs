//! `mentee-worker doctor`: what only a process with libtorch and MPI can say of this machine. `mentee doctor` asks it, and
//! judges.
//!
//! Every rank takes part in one small all-reduce; rank 0 prints one JSON object, [`Facts`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mentee_cluster::server::hostname;
use mentee_collectives::nccl::{Found, Library};
use mentee_collectives::{Buffer, Collectives, mpi};
use mentee_config::{Recipe, exit_code, show};
use mentee_torch_ext::{cuda, file_of_libtorch, version_of_libtorch};
use serde::{Deserialize, Serialize};

use crate::device::beside_libtorch;
use crate::error::WorkerError;
use crate::world::World;
use crate::{affinity, agree};

/// Elements of the all-reduce: 1 MiB of f32.
const ELEMENTS: usize = 1 << 18;

/// `mentee-worker doctor`
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// The recipe that is to run here
    #[arg(default_value = "byol-cifar10-small")]
    recipe: String,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// How long ranks wait for one another, seconds
    #[arg(long, default_value_t = 30.0, value_name = "S")]
    timeout: f64,
}

/// What rank 0 prints.
#[derive(Serialize)]
struct Facts {
    libraries: Libraries,
    devices: Devices,
    nccl: Nccl,
    /// Of the whole state, as one checkpoint holds it.
    checkpoint_bytes: u64,
    ranks: Vec<RankFacts>,
    all_reduce: AllReduce,
}

#[derive(Serialize)]
struct Libraries {
    libtorch: Option<String>,
    libtorch_file: Option<PathBuf>,
    mpi: bool,
}

/// The devices that libtorch can use, or why there are none.
#[derive(Serialize)]
struct Devices {
    count: u32,
    driver: bool,
    problem: Option<String>,
}

/// The NCCL that a group on devices would take.
#[derive(Serialize)]
struct Nccl {
    version: Option<String>,
    file: Option<PathBuf>,
    found: Option<String>,
    /// Whether it is the copy that libtorch has loaded or would load.
    same_as_libtorch: Option<bool>,
    problem: Option<String>,
}

/// What one rank says of itself.
#[derive(Serialize, Deserialize)]
struct RankFacts {
    rank: u32,
    host: String,
    cores: usize,
    device: Option<u32>,
    /// What to do when its cores do not suffice for its threads.
    advice: Option<String>,
    /// Its clock right after a barrier, seconds since 1970.
    clock: f64,
}

#[derive(Serialize)]
struct AllReduce {
    ranks: u32,
    bytes: usize,
    seconds: f64,
    /// By what ranks exchange host memory.
    exchange: String,
}

/// Prints [`Facts`].
pub fn command(args: &DoctorArgs) -> Result<i32, WorkerError> {
    let world = World::find()?;
    examine(args, &world).map_err(|error| world.leave(error))
}

fn examine(args: &DoctorArgs, world: &World) -> Result<i32, WorkerError> {
    let collectives = &*world.collectives;
    let deadline = Duration::try_from_secs_f64(args.timeout)
        .map_err(|_| WorkerError::Usage(format!("--timeout {}: give seconds", args.timeout)))?;
    mpi::set_patience(deadline);
    let recipe = agree::together(collectives, Recipe::load(&args.recipe, &args.sets).map_err(Into::into))?;

    let devices = devices();
    let parallel = &recipe.parallel;
    let failed = WorkerError::from;
    let all_reduce = all_reduce(collectives, &world.exchange)?;
    collectives.barrier().map_err(failed)?;
    let own = RankFacts {
        rank: world.identity.rank,
        host: hostname(),
        cores: affinity::cores(collectives)?,
        device: world.identity.device(devices.count),
        advice: affinity::advice(&world.identity, parallel.threads, parallel.decode_threads),
        clock: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64()),
    };
    let own = serde_json::to_vec(&own).map_err(json_failed)?;
    let all = collectives.all_gather(&own).map_err(failed)?;
    if world.identity.rank == 0 {
        let ranks = all.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>();
        let facts = Facts {
            libraries: Libraries {
                libtorch: version_of_libtorch(),
                libtorch_file: file_of_libtorch(),
                mpi: mpi::BUILT_IN,
            },
            nccl: nccl(file_of_libtorch().as_deref()),
            devices,
            checkpoint_bytes: checkpoint_bytes(&recipe)?,
            ranks: ranks.map_err(json_failed)?,
            all_reduce,
        };
        show!("{}", serde_json::to_string(&facts).map_err(json_failed)?);
    }
    collectives.finish().map_err(failed)?;
    Ok(exit_code::DONE)
}

fn json_failed(error: serde_json::Error) -> WorkerError {
    WorkerError::Failed(format!("a rank's account of itself: {error}"))
}

fn devices() -> Devices {
    match cuda::open() {
        Ok(count) => Devices { count, driver: true, problem: None },
        Err(error) => {
            Devices { count: 0, driver: error != cuda::NoCuda::NoDriver, problem: Some(error.to_string()) }
        }
    }
}

/// Looks for NCCL as a group would; uses it for nothing.
fn nccl(libtorch: Option<&Path>) -> Nccl {
    let beside = beside_libtorch(libtorch);
    match Library::open(&beside) {
        Ok(library) => Nccl {
            version: Some(library.version().to_string()),
            file: Some(library.path().to_owned()),
            found: Some(library.found().to_string()),
            same_as_libtorch: Some(is_libtorchs(&library, &beside)),
            problem: None,
        },
        Err(error) => Nccl {
            version: None,
            file: None,
            found: None,
            same_as_libtorch: None,
            problem: Some(error.to_string()),
        },
    }
}

fn is_libtorchs(library: &Library, beside: &[PathBuf]) -> bool {
    let folder = library.path().parent().and_then(|folder| folder.canonicalize().ok());
    library.found() == Found::InProcess
        || folder.is_some_and(|own| beside.iter().any(|place| place.canonicalize().is_ok_and(|it| it == own)))
}

/// Sums known numbers over the ranks, and looks at every one of the sums.
fn all_reduce(collectives: &dyn Collectives, exchange: &str) -> Result<AllReduce, WorkerError> {
    let (rank, ranks) = (collectives.rank(), collectives.world_size());
    let mut values: Vec<f32> = (0..ELEMENTS).map(|index| (index % 1000) as f32 + rank as f32).collect();
    let began = Instant::now();
    collectives.all_reduce_sum(Buffer::F32(&mut values))?;
    let seconds = began.elapsed().as_secs_f64();
    let of_ranks = (0..ranks).sum::<u32>() as f32;
    let expected = |index: usize| (index % 1000) as f32 * ranks as f32 + of_ranks;
    match values.iter().enumerate().find(|(index, value)| **value != expected(*index)) {
        None => {
            Ok(AllReduce { ranks, bytes: size_of_val(&values[..]), seconds, exchange: exchange.to_owned() })
        }
        Some((index, value)) => Err(WorkerError::Failed(format!(
            "the all-reduce over {ranks} ranks gave {value} at {index} where {} is right: something between the ranks \
             is broken",
            expected(index)
        ))),
    }
}

fn checkpoint_bytes(recipe: &Recipe) -> Result<u64, WorkerError> {
    let (_, state) = mentee_ssl::state::new(recipe)?;
    let tensors = state.tensors()?;
    let bytes = tensors.iter().map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes());
    Ok(bytes.sum::<usize>() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mentee_collectives::{Single, threads};

    #[test]
    fn sums_are_looked_at() {
        for ranks in [1, 3] {
            let done = threads::run(ranks, Duration::from_secs(60), |group| {
                all_reduce(&group, "").map(|it| it.ranks).map_err(|error| error.to_string())
            });
            assert_eq!(done, vec![Ok(ranks); ranks as usize]);
        }
        assert_eq!(all_reduce(&Single::new(), "").expect("a sum of one").bytes, 1 << 20);
    }
}
