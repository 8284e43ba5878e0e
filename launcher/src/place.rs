//! `mentee place`: what this process's launcher made of it, in one line; no worker, no MPI. `srun … mentee place` and
//! `mpirun … mentee place` show what their options mean before a run is trusted to them.

use mentee_cluster::identity::{affinity_advice, discover, visible_devices};
use mentee_cluster::server::hostname;
use mentee_config::show;

use crate::failure::Failure;

/// `mentee place`.
#[derive(Debug, clap::Args)]
pub struct PlaceArgs {
    /// Say whether the cores it is bound to suffice for so many threads
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// As one JSON object on one line
    #[arg(long)]
    pub json: bool,
}

/// Prints the place of this process in its job.
///
/// # Errors
/// [`Failure`] with exit code 2 when the environment contradicts itself.
pub fn command(args: &PlaceArgs) -> Result<(), Failure> {
    let env = |name: &str| std::env::var(name).ok();
    let identity = discover(&env).map_err(|error| Failure::usage(error.to_string()))?;
    let visible = visible_devices(&env);
    let device = visible.and_then(|visible| identity.device(visible));
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: sysconf only reads.
    let online = usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1);
    let advice = args.threads.and_then(|threads| affinity_advice(&identity, allowed, online, threads));
    if args.json {
        let place = serde_json::json!({
            "rank": identity.rank,
            "world_size": identity.world_size,
            "local_rank": identity.local_rank,
            "local_size": identity.local_size,
            "launcher": identity.source,
            "host": hostname(),
            "cores": allowed,
            "machine_cores": online,
            "visible_devices": env("CUDA_VISIBLE_DEVICES"),
            "device": device,
            "advice": advice,
        });
        show!("{place}");
        return Ok(());
    }
    let device = match (visible, device) {
        (None, _) => "all devices".to_owned(),
        (Some(visible), Some(device)) => {
            let list = env("CUDA_VISIBLE_DEVICES").unwrap_or_default();
            format!("device {device} of {visible} (CUDA_VISIBLE_DEVICES={list})")
        }
        (Some(_), None) => "no device".to_owned(),
    };
    let launcher = match identity.source {
        "none" => "no launcher".to_owned(),
        source => format!("by {source}"),
    };
    // One write, so that the lines of several ranks do not mix.
    let mut line = format!(
        "rank {} of {} on {}: local rank {} of {}, {allowed} of {online} cores, {device} ({launcher})",
        identity.rank,
        identity.world_size,
        hostname(),
        identity.local_rank,
        identity.local_size
    );
    if let Some(advice) = advice {
        line.push_str(&format!("\nwarning: {advice}"));
    }
    show!("{line}");
    Ok(())
}
