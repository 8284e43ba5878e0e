//! Measures the all-reduce over MPI, as `ci/bench_allreduce.c` measures MPI's own: the same arguments, the same
//! lines of JSON on rank 0.
//!
//! `mpirun -n N all_reduce SECONDS BYTES...`: about SECONDS for each size.

use std::{env, error::Error};

use mentee_collectives::{Collectives, bench, mpi::Mpi};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let (seconds, sizes) = args.split_first().ok_or("usage: all_reduce SECONDS BYTES...")?;
    let seconds: f64 = seconds.parse()?;
    let sizes = sizes.iter().map(|bytes| bytes.parse()).collect::<Result<Vec<u64>, _>>()?;
    let group = Mpi::initialize(None)?;
    for size in sizes {
        let rows = bench::all_reduce(&group, &[size], seconds)?;
        if group.rank() == 0 {
            rows.iter().for_each(|row| println!("{}", row.to_json()));
        }
    }
    group.finish()?;
    Ok(())
}
