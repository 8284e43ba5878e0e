//! Who this rank is, and by what it is connected with the others.

use std::sync::Arc;
use std::time::Duration;

use mentee_cluster::{Identity, identity};
use mentee_collectives::mpi::{self, Mpi};
use mentee_collectives::shm::Shm;
use mentee_collectives::{CollectiveError, Collectives, Single};
use mentee_config::complain;

use crate::error::WorkerError;
use crate::orphan::ParentWatch;
use crate::waits::{Waits, Watched};

/// Who this rank is and the network it is part of.
pub struct World {
    pub identity: Identity,
    pub collectives: Arc<dyn Collectives>,
    /// Of the calls made through `collectives`.
    pub waits: Arc<Waits>,
    /// By what ranks exchange host memory.
    pub exchange: String,
}

/// `0` keeps ranks of one machine from exchanging data through its memory.
const SHARED_MEMORY: &str = "MENTEE_SHARED_MEMORY";

/// How long a rank that fails because of another stays before it ends all.
const CAUSE_FIRST: Duration = Duration::from_millis(300);

impl World {
    /// Finds what this rank is part of. Starts MPI only when there is more than one rank.
    pub fn find() -> Result<Self, WorkerError> {
        let identity = identity::discover(&|name| std::env::var(name).ok())?;
        let waits = Arc::new(Waits::default());
        if identity.world_size == 1 {
            let exchange = "nothing: one rank".into();
            return Ok(Self { identity, collectives: Arc::new(Single::new()), waits, exchange });
        }
        let launcher_is_there = ParentWatch::start(identity.rank);
        let mpi = Mpi::initialize(Some((identity.rank, identity.world_size)))?;
        drop(launcher_is_there); // from here on waits have deadlines
        let (group, exchange) = exchange(Arc::new(mpi))?;
        Ok(Self { identity, collectives: Arc::new(Watched::new(group, waits.clone())), waits, exchange })
    }

    /// The end of a rank that failed. When all ranks know, they part in order; when only this one does, it says why and
    /// ends the others, which would wait for it.
    pub fn leave(&self, error: WorkerError) -> WorkerError {
        let collectives = &*self.collectives;
        if collectives.world_size() > 1 && !matches!(error, WorkerError::Known { .. }) {
            complain!("error: rank {}: {error}", collectives.rank());
            if error.peers().is_some() {
                // Another rank is the cause: time for its own word, or for the end of its connection, to be heard before
                // the end of everyone.
                std::thread::sleep(CAUSE_FIRST);
            }
            collectives.abort(error.exit_code());
        }
        // The exit code tells how the run went; a network that cannot be shut down does not change that.
        let _ = collectives.finish();
        error
    }
}

/// Through the machine's memory where all ranks are on one, else by MPI; and its name.
fn exchange(mpi: Arc<Mpi>) -> Result<(Arc<dyn Collectives>, String), CollectiveError> {
    let wanted = std::env::var(SHARED_MEMORY).map_or(true, |value| value != "0");
    if mpi.all_gather(&[u8::from(wanted)])?.concat().contains(&0) {
        return Ok((mpi, format!("MPI ({SHARED_MEMORY}=0)")));
    }
    Ok(match Shm::over(mpi.clone(), mpi::patience)? {
        Ok(shm) => (Arc::new(shm), "shared memory".into()),
        Err(reason) => (mpi, format!("MPI ({reason})")),
    })
}
