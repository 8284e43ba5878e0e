//! Measures the all-reduce of ranks that MPI started, as training uses it, as `ci/bench_allreduce.c` measures MPI's own: the same arguments, the same
//! lines of JSON on rank 0.
//!
//! `mpirun -n N all_reduce SECONDS BYTES...`: about SECONDS for each size.

use std::{env, error::Error, sync::Arc};

use mentee_collectives::{
    Collectives, bench,
    mpi::{self, Mpi},
    shm::Shm,
};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let (seconds, sizes) = args.split_first().ok_or("usage: all_reduce SECONDS BYTES...")?;
    let seconds: f64 = seconds.parse()?;
    let sizes = sizes.iter().map(|bytes| bytes.parse()).collect::<Result<Vec<u64>, _>>()?;
    let mpi = Arc::new(Mpi::initialize(None)?);
    let group: Arc<dyn Collectives> = match Shm::over(mpi.clone(), mpi::patience)? {
        Ok(shm) if env::var_os("MENTEE_SHARED_MEMORY").is_none_or(|value| value != "0") => Arc::new(shm),
        _ => mpi,
    };
    for size in sizes {
        let rows = bench::all_reduce(&*group, &[size], seconds)?;
        if group.rank() == 0 {
            rows.iter().for_each(|row| println!("{}", row.to_json()));
        }
    }
    group.finish()?;
    Ok(())
}
