//! A rank's part of its machine: which device it takes, and whether its cores suffice for its threads.

use super::{Env, Identity};

impl Identity {
    /// The device this rank takes among `visible` ones: its local rank, modulo their number. A launcher that hands each
    /// rank its own devices shows it one, which has index 0; one that hands a node's devices to all of its ranks shows
    /// all. `None` when there is no device.
    pub fn device(&self, visible: u32) -> Option<u32> {
        (visible > 0).then(|| self.local_rank % visible)
    }
}

/// Devices that `CUDA_VISIBLE_DEVICES` leaves; `None` when it is not set, that is all of the machine's. As CUDA reads
/// it, the list ends at the first entry that names no device: `-1`, or anything else but an index or an identifier.
pub fn visible_devices(env: &Env) -> Option<u32> {
    let list = env("CUDA_VISIBLE_DEVICES")?;
    let names_one = |entry: &&str| {
        entry.bytes().all(|byte| byte.is_ascii_digit()) && !entry.is_empty()
            || entry.starts_with("GPU-")
            || entry.starts_with("MIG-")
    };
    Some(list.split(',').map(str::trim).take_while(names_one).count() as u32)
}

/// What to say when a rank was bound to fewer cores than its threads need; `None` when all is well.
///
/// `allowed` and `online` are the cores this process may run on and those of the machine, `threads` what it is to run at
/// once. Without the remedy a bound rank is slow and says nothing: decoding waits for the core that computes.
pub fn affinity_advice(identity: &Identity, allowed: usize, online: usize, threads: usize) -> Option<String> {
    if allowed >= threads || allowed >= online {
        return None;
    }
    let remedy = match identity.source {
        "Open MPI" => "start it with `mpirun --bind-to none`".to_owned(),
        "srun" => format!("give it more with `srun --cpus-per-task={threads}`, or `--cpu-bind=none`"),
        source if source.starts_with("PMI") => {
            "start it with `mpirun -bind-to none` (Intel MPI: I_MPI_PIN=off)".to_owned()
        }
        "MVAPICH2" => "set MV2_ENABLE_AFFINITY=0".to_owned(),
        _ => "widen it (see `taskset -p`)".to_owned(),
    };
    let plural = if allowed == 1 { "" } else { "s" };
    Some(format!(
        "rank {} is bound to {allowed} core{plural} of {online} but runs {threads} threads, which will wait for each \
         other: {remedy}, or set parallel.threads and parallel.decode_threads to what there is",
        identity.rank
    ))
}
