//! `mentee bench coordinator`: the real server in this process, and in a second one as many simulated workers as asked
//! for. They report as workers do, all have a share of a checkpoint to commit at once every two seconds, and at the end all are
//! stopped.
//!
//! A message carries the time it was sent at; its latency is the time until the supervisor holds it. What the workers
//! cost is not counted, but they share the processors with the server.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::time::{Duration, Instant};

use mentee_cluster::identity::{COORDINATOR, TOKEN};
use mentee_cluster::link::report_every;
use mentee_cluster::message::{PROTOCOL, ToCoordinator, ToWorker};
use mentee_cluster::wire::{self, Decoder, MAX_TO_WORKER};
use mentee_cluster::{Agreement, Hello, Output, Phase, Progress, Share, ShareFile, WorkerEvent, server};
use mentee_config::{Recipe, exit_code, show};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::failure::Failure;
use crate::limits;
use crate::rundir::unix_time;

/// Every worker commits a checkpoint so often, all at the same moment.
const COMMIT_EVERY: Duration = Duration::from_secs(2);
/// Between the start of the gang and the measurement.
const WARM_UP: Duration = Duration::from_secs(1);
/// All workers must have come, and gone, in this time.
const PATIENCE: Duration = Duration::from_secs(120);
/// Worlds of the table.
const WORLDS: [u32; 4] = [64, 256, 1024, 4096];

/// `mentee bench coordinator`.
#[derive(Debug, clap::Args)]
pub struct CoordinatorArgs {
    /// The recipe that the workers say they run
    #[arg(default_value = "byol-cifar10-small")]
    recipe: String,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Simulated workers [default: 4096 with --json, else a table of 64 to 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: Option<u32>,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Measurements; medians are reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Be the workers of the plan with this hash
    #[arg(long, hide = true, value_name = "HASH")]
    swarm: Option<String>,
}

/// What one world costs; medians of `n` rounds.
#[derive(Debug, Clone, Serialize)]
struct Report {
    workers: u32,
    /// From the sending of a message until the supervisor holds it, milliseconds.
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// Memory of the server's process.
    rss_mb: f64,
    /// Of one processor.
    cpu_share: f64,
    messages_per_s: f64,
    /// From rank 0's share of a checkpoint until the supervisor holds that it counts, milliseconds: every rank has reported its
    /// share in between, and rank 0 has been sent all of them.
    commit_ms: f64,
    /// From the start of the workers' process until every worker may go.
    gather_s: f64,
    /// From the request to stop until every worker has said it is finished.
    stop_ms: f64,
    n: u32,
}

/// `mentee bench coordinator …`.
///
/// # Errors
/// [`Failure`] when the machine does not allow so many connections, or the workers do not come.
pub fn command(args: &CoordinatorArgs) -> Result<(), Failure> {
    let worlds = match (args.workers, args.json) {
        (Some(workers), _) => vec![workers],
        (None, true) => vec![WORLDS[WORLDS.len() - 1]],
        (None, false) => WORLDS.to_vec(),
    };
    let most = worlds.iter().max().copied().unwrap_or(1);
    limits::allow_open_files(u64::from(most) + 256)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start: {error}")))?;
    if let Some(plan_hash) = &args.swarm {
        runtime
            .block_on(swarm(most, plan_hash))
            .map_err(|error| Failure::failed(format!("a worker: {error}")))?;
        return Ok(());
    }
    let plan_hash = Recipe::load(&args.recipe, &args.sets)?.hash();
    if !args.json {
        show!(
            "workers  messages/s   p50 ms   p99 ms   max ms     MiB  CPU share  commit ms  gather s  stop ms"
        );
    }
    for workers in worlds {
        let rounds = (0..args.rounds)
            .map(|_| runtime.block_on(measure(workers, &plan_hash, Duration::from_secs(args.seconds.into()))))
            .collect::<Result<Vec<Report>, Failure>>()?;
        let report = medians(&rounds);
        if args.json {
            show!("{}", serde_json::json!(report));
        } else {
            let Report { workers, p50_ms, p99_ms, max_ms, rss_mb, cpu_share, .. } = report;
            show!(
                "{workers:>7}  {:>10.0}  {p50_ms:>7.2}  {p99_ms:>7.2}  {max_ms:>7.1}  {rss_mb:>6.1}  {:>8.1} %  {:>9.1}  \
                 {:>8.2}  {:>7.0}",
                report.messages_per_s,
                100.0 * cpu_share,
                report.commit_ms,
                report.gather_s,
                report.stop_ms
            );
        }
    }
    Ok(())
}

fn medians(rounds: &[Report]) -> Report {
    let median = |of: fn(&Report) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        quantile(&mut values, 0.5)
    };
    Report {
        workers: rounds[0].workers,
        p50_ms: median(|round| round.p50_ms),
        p99_ms: median(|round| round.p99_ms),
        max_ms: median(|round| round.max_ms),
        rss_mb: median(|round| round.rss_mb),
        cpu_share: median(|round| round.cpu_share),
        messages_per_s: median(|round| round.messages_per_s),
        commit_ms: median(|round| round.commit_ms),
        gather_s: median(|round| round.gather_s),
        stop_ms: median(|round| round.stop_ms),
        n: rounds.len() as u32,
    }
}

/// The value below which a share of `values` lies; NaN of none.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    let index = ((values.len() - 1) as f64 * share).round() as usize;
    *values.select_nth_unstable_by(index, f64::total_cmp).1
}

/// One round.
async fn measure(workers: u32, plan_hash: &str, time: Duration) -> Result<Report, Failure> {
    let cannot = |what: &str, error: std::io::Error| Failure::failed(format!("cannot {what}: {error}"));
    let agreement = Agreement {
        token: server::fresh_token().map_err(|error| cannot("make a token", error))?,
        world_size: workers,
        plan_hash: Some(plan_hash.to_owned()),
        version: "bench".into(),
        stall: PATIENCE,
    };
    let mut coordinator = server::start(IpAddr::V4(Ipv4Addr::LOCALHOST), agreement)
        .await
        .map_err(|error| cannot("open a port", error))?;
    let program = std::env::current_exe().map_err(|error| cannot("find this program", error))?;
    let mut child = tokio::process::Command::new(program)
        .args(["bench", "coordinator", "--swarm", plan_hash, "--workers", &workers.to_string()])
        .env(COORDINATOR, &coordinator.address.host_port)
        .env(TOKEN, &coordinator.address.token)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| cannot("start the simulated workers", error))?;
    let deadline = tokio::time::Instant::now() + PATIENCE + time;
    let started = Instant::now();
    let (mut gather_s, mut latencies, mut commits) = (f64::NAN, Vec::new(), Vec::new());
    // Wall clock and processor time at the start of the measurement.
    let mut since: Option<(Instant, Duration)> = None;
    let mut until: Option<(Duration, Duration)> = None;
    let mut stop_asked: Option<Instant> = None;
    let mut moment = tokio::time::Instant::now() + PATIENCE;
    loop {
        let output = tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => {
                return Err(Failure::failed(format!("the {workers} simulated workers did not finish in time")));
            }
            () = tokio::time::sleep_until(moment), if stop_asked.is_none() => {
                match since {
                    None => {
                        since = Some((Instant::now(), limits::processor_time()));
                        moment = tokio::time::Instant::now() + time;
                    }
                    Some((wall, cpu)) => {
                        until = Some((wall.elapsed(), limits::processor_time().saturating_sub(cpu)));
                        stop_asked = Some(Instant::now());
                        coordinator.request_stop("the measurement is over");
                    }
                }
                continue;
            }
            output = coordinator.events.recv() => output,
        };
        let sent = match output {
            None => return Err(Failure::failed("the coordinator ended")),
            Some(Output::Go { .. }) => {
                gather_s = started.elapsed().as_secs_f64();
                moment = tokio::time::Instant::now() + WARM_UP;
                continue;
            }
            Some(Output::AllFinished { .. }) => break,
            Some(Output::Progress { progress, .. }) => progress.loss,
            Some(Output::Event { event: WorkerEvent::Checkpoint { digest, .. }, .. }) => {
                if let Some(sent) =
                    digest.parse::<f64>().ok().filter(|_| since.is_some() && stop_asked.is_none())
                {
                    commits.push((unix_time() - sent) * 1e3);
                }
                continue;
            }
            Some(Output::Event { event: WorkerEvent::Finished { .. }, .. }) => None,
            Some(other) => return Err(Failure::failed(format!("a simulated worker: {other:?}"))),
        };
        if let Some(sent) = sent.filter(|_| since.is_some() && stop_asked.is_none()) {
            latencies.push((unix_time() - sent) * 1e3);
        }
    }
    let stop_ms = stop_asked.map_or(f64::NAN, |asked| asked.elapsed().as_secs_f64() * 1e3);
    let rss_mb = limits::memory_mib();
    let _ = child.wait().await;
    let (wall, cpu) = until.unwrap_or((Duration::MAX, Duration::ZERO));
    Ok(Report {
        workers,
        p50_ms: quantile(&mut latencies, 0.5),
        p99_ms: quantile(&mut latencies, 0.99),
        max_ms: quantile(&mut latencies, 1.0),
        rss_mb,
        cpu_share: cpu.as_secs_f64() / wall.as_secs_f64(),
        messages_per_s: latencies.len() as f64 / wall.as_secs_f64(),
        commit_ms: quantile(&mut commits, 0.5),
        gather_s,
        stop_ms,
        n: 1,
    })
}

/// All workers of a world; ends when each has been stopped.
async fn swarm(workers: u32, plan_hash: &str) -> std::io::Result<()> {
    let variable =
        |name| std::env::var(name).map_err(|_| std::io::Error::other(format!("{name} is not set")));
    let (address, token) = (variable(COORDINATOR)?, variable(TOKEN)?);
    let began = tokio::time::Instant::now();
    let tasks: Vec<_> = (0..workers)
        .map(|rank| {
            let hello = Hello {
                rank,
                world_size: workers,
                host: "here".into(),
                pid: rank,
                plan_hash: plan_hash.to_owned(),
                data_digest: "bench".into(),
                version: "bench".into(),
            };
            tokio::spawn(worker(hello, address.clone(), token.clone(), began))
        })
        .collect();
    for task in tasks {
        task.await.map_err(std::io::Error::other)??;
    }
    Ok(())
}

async fn worker(
    hello: Hello,
    address: String,
    token: String,
    began: tokio::time::Instant,
) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (rank, workers) = (hello.rank, hello.world_size);
    send(&mut stream, &ToCoordinator::Hello { protocol: PROTOCOL, token, generation: 0, hello }).await?;
    let mut decoder = Decoder::new(MAX_TO_WORKER);
    let mut buffer = [0; 4096];
    // When this rank's latest share was sent.
    let mut shared = 0.0;
    let every = report_every(workers);
    // Workers report at moments of their own.
    let mut report =
        tokio::time::interval_at(began + every.mul_f64(f64::from(rank) / f64::from(workers)), every);
    report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut commit = tokio::time::interval_at(began + COMMIT_EVERY, COMMIT_EVERY);
    commit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let (mut goes, mut step) = (false, 0);
    loop {
        match decoder.next::<ToWorker>().map_err(std::io::Error::other)? {
            Some(ToWorker::Go { .. }) => goes = true,
            Some(ToWorker::Stop { .. }) => {
                let event = WorkerEvent::Finished { exit_code: exit_code::PREEMPTED };
                send(&mut stream, &ToCoordinator::Event { event }).await?;
                return stream.shutdown().await;
            }
            Some(ToWorker::Commit { step, files }) => {
                let (path, digest) =
                    (format!("checkpoints/step-{step:08}, {} files", files.len()), shared.to_string());
                let event = WorkerEvent::Checkpoint { step, path, digest };
                send(&mut stream, &ToCoordinator::Event { event }).await?;
            }
            Some(other) => return Err(std::io::Error::other(format!("{other:?}"))),
            None => {}
        }
        tokio::select! {
            count = stream.read(&mut buffer) => match count? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => decoder.push(&buffer[..count]),
            },
            _ = report.tick(), if goes => {
                step += 1;
                let progress = Progress {
                    step,
                    total_steps: 1_000_000,
                    epochs: 100,
                    phase: Phase::Forward,
                    loss: Some(unix_time()),
                    z_std: Some(0.987_654),
                    images_per_s: Some(1234.5),
                    step_ms: Some(98.765),
                    own_ms: 80.123 * step as f64,
                    ..Progress::default()
                };
                send(&mut stream, &ToCoordinator::Progress { progress }).await?;
            }
            at = commit.tick(), if goes => {
                let name = format!("state-{rank:05}-of-{workers:05}.safetensors");
                let file = ShareFile { name, bytes: 100_000, blake3: "0".repeat(64) };
                // The same on every rank, whatever moment it comes to it.
                let step = (at - began).as_millis() as u64 / COMMIT_EVERY.as_millis() as u64;
                shared = unix_time();
                let share = Share::Written { file: Some(file) };
                send(&mut stream, &ToCoordinator::Share { step, share }).await?;
            }
        }
    }
}

async fn send(stream: &mut TcpStream, message: &ToCoordinator) -> std::io::Result<()> {
    stream.write_all(&wire::encode(message).map_err(std::io::Error::other)?).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let mut values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.5), 50.0);
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        assert_eq!(quantile(&mut values, 1.0), 100.0);
        assert!(quantile(&mut [], 0.5).is_nan());
    }
}
