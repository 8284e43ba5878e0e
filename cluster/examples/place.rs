//! Prints this process's place in its job and the device it would take, one line of JSON: what a launcher's options
//! mean, without training anything. `srun --gpus-per-task=1 … place`

use mentee_cluster::identity::{discover, visible_devices};

fn main() {
    let env = |name: &str| std::env::var(name).ok();
    match discover(&env) {
        Ok(identity) => {
            let visible = visible_devices(&env);
            let device = identity.device(visible.unwrap_or(0));
            println!(
                "{}",
                serde_json::json!({
                    "rank": identity.rank,
                    "world_size": identity.world_size,
                    "local_rank": identity.local_rank,
                    "local_size": identity.local_size,
                    "launcher": identity.source,
                    "host": mentee_cluster::server::hostname(),
                    "visible_devices": visible,
                    "device": device,
                })
            );
        }
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}
