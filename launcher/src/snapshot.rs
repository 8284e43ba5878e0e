//! What a run directory says of its run at one moment, for those who watch: `mentee monitor`, `mentee report`.

use std::collections::BTreeMap;

use mentee_cluster::{Phase, StepTimes};
use mentee_config::Recipe;

use crate::failure::Failure;
use crate::logs::{self, Entry, Level, Reader};
use crate::metrics::Metrics;
use crate::rundir::{RunDir, unix_time};
use crate::status::Status;

/// The target of the lines in the ranks' logs that say where time went (`trainer/worker/src/times.rs`).
const TIMES: &str = "mentee_worker::times";
/// What is read of the end of each log.
const LOG_BYTES: u64 = 32 << 10;
/// Warnings and errors that are kept.
const NOTES: usize = 50;
/// A rank that needs more than so much of what the others need is waited for.
const STRAGGLES: f64 = 1.1;
/// And so much longer, ms: less is noise.
const STRAGGLES_MS: f64 = 2.0;

/// One of the things a step's time goes to, ms.
pub type Part = fn(&StepTimes) -> f64;

/// One rank.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RankRow {
    /// Its machine, when known.
    pub host: Option<String>,
    /// What it is doing, when known.
    pub phase: Option<Phase>,
    /// Steps completed.
    pub step: u64,
    /// Milliseconds a step.
    pub step_ms: Option<f64>,
    /// Where they went.
    pub times: Option<StepTimes>,
    /// Memory, MiB.
    pub rss_mb: Option<f64>,
}

/// Something worth a line.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// Seconds since 1970.
    pub time: f64,
    /// How grave it is.
    pub level: Level,
    /// One line.
    pub text: String,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The run's name.
    pub name: String,
    /// Seconds since 1970 when it was taken.
    pub now: f64,
    /// What the supervisor says; none for a run without one.
    pub status: Option<Status>,
    /// What was logged.
    pub metrics: Metrics,
    /// Steps of the whole run, when known.
    pub total_steps: Option<u64>,
    /// Epochs of the whole run, when known.
    pub epochs: Option<u64>,
    /// Below this `z_std` projections have collapsed; 0: not known, or never.
    pub collapsed_below: f64,
    /// Every rank.
    pub ranks: BTreeMap<u32, RankRow>,
    /// Warnings, errors, restarts, checkpoints and evaluations by time.
    pub notes: Vec<Note>,
}

impl Snapshot {
    /// Whether the run is going on.
    pub fn is_alive(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.state.is_alive())
    }

    /// Steps completed.
    pub fn step(&self) -> u64 {
        let logged = self.metrics.last_train().map_or(0, |line| line.step);
        // The supervisor knows of steps that are not logged, but a start that is on its way has made none.
        let reported =
            self.status.as_ref().filter(|_| self.is_alive()).map_or(0, |status| status.progress.step);
        if reported > 0 { reported } else { logged }
    }

    /// Ranks that the others wait for, worst first.
    pub fn stragglers(&self) -> Vec<Straggler> {
        stragglers(&self.ranks)
    }
}

/// A rank that the others wait for.
#[derive(Debug, Clone, PartialEq)]
pub struct Straggler {
    /// Who.
    pub rank: u32,
    /// How much it needs of what the others need.
    pub factor: f64,
    /// In what it differs most.
    pub because: &'static str,
}

impl std::fmt::Display for Straggler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} is slow: {:.1} x the others, mostly in {}", self.rank, self.factor, self.because)
    }
}

/// Compares what each rank needs itself with the median of the others. All ranks take equally long for a step, since they
/// wait for each other: the slow one waits least.
pub fn stragglers(ranks: &BTreeMap<u32, RankRow>) -> Vec<Straggler> {
    let times: Vec<(u32, StepTimes)> =
        ranks.iter().filter_map(|(&rank, row)| Some((rank, row.times?))).collect();
    let parts: [(&'static str, Part); 4] = [
        ("waiting for data", |times| times.data_wait_ms),
        ("forward", |times| times.forward_ms),
        ("backward", |times| times.backward_ms),
        ("update", |times| times.update_ms),
    ];
    let others = |rank: u32, part: &dyn Fn(&StepTimes) -> f64| {
        let mut values: Vec<f64> =
            times.iter().filter(|(other, _)| *other != rank).map(|(_, times)| part(times)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let mut found: Vec<Straggler> = times
        .iter()
        .filter_map(|&(rank, own)| {
            let usual = others(rank, &StepTimes::own_ms)?;
            let factor = own.own_ms() / usual.max(1e-3);
            if factor < STRAGGLES || own.own_ms() - usual < STRAGGLES_MS {
                return None;
            }
            let excess = |part: fn(&StepTimes) -> f64| part(&own) - others(rank, &part).unwrap_or(0.0);
            let because = parts.iter().max_by(|a, b| excess(a.1).total_cmp(&excess(b.1)))?.0;
            Some(Straggler { rank, factor, because })
        })
        .collect();
    found.sort_by(|a, b| b.factor.total_cmp(&a.factor));
    found
}

/// Looks at a run again and again; reads nothing but its directory.
#[derive(Debug)]
pub struct Watch {
    run: RunDir,
    reader: Reader,
    from_logs: BTreeMap<u32, RankRow>,
    noted: Vec<Note>,
    /// As soon as there is one.
    recipe: Option<Recipe>,
    snapshot: Snapshot,
}

impl Watch {
    /// Of a run that exists.
    pub fn new(run: RunDir) -> Watch {
        let name = run.path().file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
        let snapshot = Snapshot { name, ..Snapshot::default() };
        Watch {
            run,
            reader: Reader::of_the_end(LOG_BYTES),
            from_logs: BTreeMap::new(),
            noted: Vec::new(),
            recipe: None,
            snapshot,
        }
    }

    /// The run as it stands now.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn look(&mut self) -> Result<&Snapshot, Failure> {
        let snapshot = &mut self.snapshot;
        snapshot.now = unix_time();
        snapshot.status = Status::read(&self.run);
        snapshot.metrics.read_on(&self.run.metrics())?;
        for entry in self.reader.more(&self.run, false)? {
            if entry.target == TIMES {
                if let Some((rank, total_steps, row)) = row_of(&entry) {
                    snapshot.total_steps = total_steps.or(snapshot.total_steps);
                    self.from_logs.insert(rank, row);
                }
            } else if let Some(note) = note_of(&entry) {
                self.noted.push(note);
            }
        }
        let surplus = self.noted.len().saturating_sub(NOTES);
        self.noted.drain(..surplus);

        snapshot.ranks.clone_from(&self.from_logs);
        if let Some(status) = &snapshot.status {
            snapshot.name.clone_from(&status.name);
            if status.progress.total_steps > 0 {
                snapshot.total_steps = Some(status.progress.total_steps);
                snapshot.epochs = Some(status.progress.epochs);
            }
            let world = status.workers;
            if self.recipe.is_none() {
                self.recipe = Recipe::from_plan(&self.run.plan()).ok();
            }
            snapshot.collapsed_below =
                self.recipe.as_ref().map_or(0.0, |recipe| recipe.collapsed_below(world));
            snapshot.ranks.retain(|&rank, _| rank < world);
            for (&rank, at) in &status.ranks {
                let row = snapshot.ranks.entry(rank).or_default();
                row.host = Some(at.host.clone());
                row.phase = Some(at.phase);
                // Not the greater one: after a restart the logs still speak of steps that are made again.
                row.step = at.step;
                // What the logs say last is the newest when the run is over, and what there is when it has just begun.
                if at.times.is_some() {
                    (row.step_ms, row.times, row.rss_mb) = (at.step_ms, at.times, at.rss_mb);
                }
            }
        }
        snapshot.notes = self.noted.clone();
        // The supervisor's log says once more why it started the ranks again, and why the run failed.
        let restarts = snapshot.metrics.restarts().iter().filter_map(|line| line.text("reason"));
        let failure = snapshot.status.as_ref().and_then(|status| status.error.as_deref());
        let told: Vec<&str> = restarts.chain(failure).filter(|reason| !reason.is_empty()).collect();
        snapshot.notes.retain(|note| {
            let of_supervisor = note.text.strip_prefix("launcher: ");
            !of_supervisor.is_some_and(|text| told.iter().any(|reason| text.starts_with(reason)))
        });
        snapshot.notes.extend(milestones(&snapshot.metrics));
        snapshot.notes.sort_by(|a, b| a.time.total_cmp(&b.time));
        Ok(snapshot)
    }
}

/// Restarts, checkpoints and evaluations.
fn milestones(metrics: &Metrics) -> Vec<Note> {
    let time = |line: &crate::metrics::Line| line.number("time");
    let restarts = metrics.restarts().iter().filter_map(|line| {
        let reason = line.text("reason").unwrap_or("unknown");
        Some(Note {
            time: time(line)?,
            level: Level::Warn,
            text: format!("restart from step {}: {reason}", line.step),
        })
    });
    let checkpoints = metrics.checkpoints().next_back().into_iter().filter_map(|line| {
        let took = line.number("write_ms").map_or(String::new(), |ms| format!(" ({ms:.0} ms)"));
        let text = format!("checkpoint of step {}{took}", line.step);
        Some(Note { time: time(line)?, level: Level::Info, text })
    });
    let evals = metrics.eval_to_show(u64::MAX).into_iter().filter_map(|line| {
        let top1 = line.number("knn_top1")?;
        let text = format!("kNN top-1 at step {}{}: {top1:.1} %", line.step, line.on());
        Some(Note { time: time(line)?, level: Level::Info, text })
    });
    restarts.chain(checkpoints).chain(evals).collect()
}

fn note_of(entry: &Entry) -> Option<Note> {
    let level = entry.level.filter(|&level| level >= Level::Warn)?;
    let time = logs::unix_seconds(&entry.time)?;
    Some(Note { time, level, text: format!("{}: {}", entry.who, entry.text()) })
}

/// Rank, steps of the whole run, and the row that a line about times makes.
fn row_of(entry: &Entry) -> Option<(u32, Option<u64>, RankRow)> {
    let rank = entry.who.strip_prefix("rank ")?.parse().ok()?;
    let number = |key| entry.number(key);
    let row = RankRow {
        host: None,
        phase: None,
        step: number("step")? as u64,
        step_ms: number("step_ms"),
        times: times_of(entry),
        rss_mb: number("rss_mb"),
    };
    Some((rank, number("total_steps").map(|steps| steps as u64), row))
}

fn times_of(entry: &Entry) -> Option<StepTimes> {
    Some(StepTimes {
        data_wait_ms: entry.number("data_wait_ms")?,
        forward_ms: entry.number("forward_ms")?,
        backward_ms: entry.number("backward_ms")?,
        comm_ms: entry.number("comm_ms")?,
        update_ms: entry.number("update_ms")?,
    })
}

/// Where each rank's time went over a whole run, from the ranks' logs: means over all steps that these speak of.
///
/// # Errors
/// When a log cannot be read.
pub fn times_by_rank(run: &RunDir) -> Result<BTreeMap<u32, StepTimes>, Failure> {
    let mut sums: BTreeMap<u32, (f64, StepTimes)> = BTreeMap::new();
    logs::each(
        run,
        TIMES,
        |file| file.rank.is_some(),
        |entry| {
            let (Some((rank, ..)), Some(steps), Some(times)) =
                (row_of(&entry), entry.number("steps"), times_of(&entry))
            else {
                return;
            };
            if entry.target != TIMES {
                return;
            }
            let (all, sum) = sums.entry(rank).or_default();
            *all += steps;
            sum.data_wait_ms += steps * times.data_wait_ms;
            sum.forward_ms += steps * times.forward_ms;
            sum.backward_ms += steps * times.backward_ms;
            sum.comm_ms += steps * times.comm_ms;
            sum.update_ms += steps * times.update_ms;
        },
    )?;
    let mean = |(steps, sum): (f64, StepTimes)| StepTimes {
        data_wait_ms: sum.data_wait_ms / steps.max(1.0),
        forward_ms: sum.forward_ms / steps.max(1.0),
        backward_ms: sum.backward_ms / steps.max(1.0),
        comm_ms: sum.comm_ms / steps.max(1.0),
        update_ms: sum.update_ms / steps.max(1.0),
    };
    Ok(sums.into_iter().map(|(rank, sum)| (rank, mean(sum))).collect())
}

#[cfg(test)]
mod tests {
    use mentee_cluster::Hello;

    use super::*;
    use crate::status::Rank;

    fn row(data_wait_ms: f64, forward_ms: f64, comm_ms: f64) -> RankRow {
        let times = StepTimes { data_wait_ms, forward_ms, comm_ms, ..StepTimes::default() };
        RankRow { times: Some(times), ..RankRow::default() }
    }

    #[test]
    fn the_rank_that_waits_least_is_the_slow_one() {
        let mut ranks: BTreeMap<u32, RankRow> = (0..4).map(|rank| (rank, row(1.0, 50.0, 40.0))).collect();
        assert_eq!(stragglers(&ranks), []);
        ranks.insert(2, row(41.0, 50.0, 0.0));
        let found = stragglers(&ranks);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].to_string(), "rank 2 is slow: 1.8 x the others, mostly in waiting for data");
        let pair: BTreeMap<u32, RankRow> = [(0, row(0.0, 90.0, 5.0)), (1, row(0.0, 60.0, 35.0))].into();
        assert_eq!(stragglers(&pair).iter().map(|found| found.rank).collect::<Vec<_>>(), [0]);
        let tiny: BTreeMap<u32, RankRow> = [(0, row(0.0, 2.0, 0.0)), (1, row(0.0, 1.0, 1.0))].into();
        assert_eq!(stragglers(&tiny), [], "a millisecond is noise");
        assert_eq!(stragglers(&[(0, row(5.0, 5.0, 0.0))].into()), [], "nobody to compare with");
    }

    #[test]
    fn a_run_without_a_supervisor_is_told_from_its_logs() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = RunDir::at(folder.path()).expect("a path");
        std::fs::create_dir(run.logs()).expect("made");
        for (rank, comm) in [(0, 10.0), (1, 20.0)] {
            let lines: String = [(10, comm), (30, 3.0 * comm)]
                .iter()
                .map(|(step, comm)| {
                    format!(
                        "{{\"timestamp\":\"2026-01-02T03:04:{step}Z\",\"level\":\"DEBUG\",\"message\":\"where time went\",\
                         \"target\":\"{TIMES}\",\"step\":{step},\"total_steps\":90,\"steps\":{},\"step_ms\":70.5,\
                         \"data_wait_ms\":1.0,\"forward_ms\":2.0,\"backward_ms\":3.0,\"comm_ms\":{comm},\
                         \"update_ms\":4.0,\"rss_mb\":100.0}}\n",
                        step % 20
                    )
                })
                .collect();
            let warning = "{\"timestamp\":\"2026-01-02T03:05:00Z\",\"level\":\"WARN\",\"message\":\"hot\"}\n";
            std::fs::write(run.rank_log(rank), lines + warning).expect("written");
        }
        let mut watch = Watch::new(run.clone());
        let seen = watch.look().expect("a snapshot");
        assert_eq!((seen.total_steps, seen.ranks.len(), seen.is_alive()), (Some(90), 2, false));
        assert_eq!((seen.ranks[&1].step, seen.ranks[&1].step_ms), (30, Some(70.5)));
        assert_eq!(seen.ranks[&1].times.expect("times").comm_ms, 60.0);
        assert_eq!(
            seen.notes.iter().map(|note| note.text.as_str()).collect::<Vec<_>>(),
            ["rank 0: hot", "rank 1: hot"]
        );
        // A supervisor that has started it again from an older checkpoint knows better than the logs.
        let mut status = Status::new("run", 2);
        let hello = Hello {
            rank: 1,
            world_size: 2,
            host: "here".into(),
            pid: 1,
            plan_hash: "p".into(),
            data_digest: "d".into(),
            version: "0".into(),
        };
        status.ranks.insert(1, Rank { step: 12, ..Rank::new(hello) });
        status.write(&run);
        let seen = watch.look().expect("a snapshot");
        assert_eq!((seen.ranks[&0].step, seen.ranks[&1].step), (30, 12));
        // Why it started the ranks again, and why it gave up, is told once.
        let warnings: String = ["lost; restart 1 of 3", "gone", "something else"]
            .map(|text| {
                format!(
                    "{{\"timestamp\":\"2026-01-02T03:06:00Z\",\"level\":\"WARN\",\"message\":\"{text}\"}}\n"
                )
            })
            .concat();
        std::fs::write(run.logs().join("launcher.jsonl"), warnings).expect("written");
        std::fs::write(
            run.metrics(),
            "{\"kind\":\"restart\",\"step\":9,\"time\":1767323160,\"reason\":\"lost\"}\n",
        )
        .expect("written");
        status.error = Some("gone".into());
        status.write(&run);
        let seen = watch.look().expect("a snapshot");
        let texts: Vec<&str> = seen.notes.iter().map(|note| note.text.as_str()).collect();
        assert_eq!(texts[2..], ["launcher: something else", "restart from step 9: lost"]);
        let by_rank = times_by_rank(&run).expect("times");
        assert_eq!(by_rank[&0].comm_ms, 20.0, "ten steps of 10 ms and ten of 30 ms");
    }
}
