//! A worker's memory does not grow over steps.

use std::fs;

use system_tests::process::{start, worker};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::run_dir::metrics;
use system_tests::{machine, temp_dir};

/// What a leak of one batch a step would exceed, and the allocator's own wandering does not. (`trainer/ssl/tests/memory.rs` sees
/// smaller ones of the step itself.)
const SLACK_KIB: u64 = 6 * 1024;
const STEPS: usize = 240;

/// Resident memory of a process, KiB; None once it is gone.
fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.parse().ok()
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

#[test]
fn resident_memory_stays_where_it_is() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("parallel.precision", "\"f32\"")
        .set("schedule.epochs", "100")
        .set("schedule.max_steps", &STEPS.to_string())
        .set("checkpoint.every_steps", "20")
        .set("checkpoint.keep", "2")
        .write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    let mut command = worker();
    command.arg(&recipe).arg("--run-dir").arg(&run_dir);
    let mut running = start(command);
    let mut samples: Vec<(usize, u64)> = Vec::new();
    while !running.has_ended() {
        let steps = metrics(&run_dir).len();
        if let Some(kib) = resident_kib(running.pid()).filter(|_| steps > 0) {
            samples.push((steps, kib));
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    running.finish().expect(0);

    let between = |from: usize, to: usize| {
        let part: Vec<u64> =
            samples.iter().filter(|(step, _)| (from..to).contains(step)).map(|(_, kib)| *kib).collect();
        assert!(part.len() >= 5, "only {} samples between steps {from} and {to}", part.len());
        median(part)
    };
    // The first third warms up: pools, queues, the allocator.
    let (middle, end) = (between(STEPS / 3, 2 * STEPS / 3), between(2 * STEPS / 3, STEPS));
    println!("{middle} KiB in the middle third, {end} KiB in the last, {} samples", samples.len());
    assert!(end <= middle + SLACK_KIB, "{middle} KiB grew to {end} KiB over {} steps", STEPS / 3);
}
