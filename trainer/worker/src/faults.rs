//! Faults on request, for tests of what the rest does then: `MENTEE_FAULTS`, entries separated by `;`.
//!
//! ```text
//! flip:rank=1,step=17,tensor=teacher.backbone.conv1.weight   inverts one bit after the update of that step
//! nan:rank=0,step=5                                          puts a NaN into the first gradient bucket
//! skip-bucket:rank=1,step=9,bucket=0                         leaves out one all-reduce; `bucket=last`: the last
//! slow:rank=1,step=9,times=3                                 from that step on its own work takes so many times as long
//! hang:rank=1,step=9                                         never ends that step; in the first start of a run only
//! stop:rank=1,step=9                                         stops its process as SIGSTOP does; in the first start only
//! full:rank=1,step=6                                         no room for this rank's share of the checkpoint of that step, once
//! ```

use std::time::Duration;

use mentee_cluster::identity::GENERATION;
use mentee_ssl::State;
use tch::Kind;

use crate::error::WorkerError;

/// The variable.
const VARIABLE: &str = "MENTEE_FAULTS";

/// The number that stands for the last bucket.
pub const LAST: usize = usize::MAX;

/// What goes wrong with one step's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientFault {
    /// A NaN in the first bucket.
    Nan,
    /// This bucket is not summed; [`LAST`]: the last of them.
    SkipBucket(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kinds {
    Flip { tensor: String },
    Gradient(GradientFault),
    Slow { times: u64 },
    Hang,
    Stop,
    Full,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    rank: u32,
    step: u64,
    kind: Kinds,
}

/// The faults of this rank.
#[derive(Debug, Default)]
pub struct Faults {
    own: Vec<Fault>,
    first_start: bool,
}

impl Faults {
    /// Those that the environment asks for.
    pub fn from_env(rank: u32) -> Result<Self, WorkerError> {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(Self::default()) };
        let faults = parse(&text).map_err(|why| WorkerError::Usage(format!("{VARIABLE}: {why}")))?;
        let own: Vec<Fault> = faults.into_iter().filter(|fault| fault.rank == rank).collect();
        for fault in &own {
            tracing::warn!(?fault, "will be injected");
        }
        let start = std::env::var(GENERATION).ok();
        Ok(Self { own, first_start: start.is_none_or(|start| start == "0") })
    }

    /// What goes wrong with the gradient of this step.
    pub fn of_gradient(&self, step: u64) -> Option<GradientFault> {
        self.own.iter().filter(|fault| fault.step == step).find_map(|fault| match fault.kind {
            Kinds::Gradient(kind) => Some(kind),
            _ => None,
        })
    }

    /// At the end of `step`, in which this rank has worked for `own`.
    pub fn on_pace(&self, step: u64, own: Duration) {
        for fault in &self.own {
            match fault.kind {
                Kinds::Slow { times } if fault.step <= step => {
                    std::thread::sleep(own.saturating_mul(times.saturating_sub(1) as u32));
                }
                Kinds::Hang if fault.step == step && self.first_start => loop {
                    std::thread::park();
                },
                Kinds::Stop if fault.step == step && self.first_start => {
                    let _ = signal_hook::low_level::raise(signal_hook::consts::SIGSTOP);
                }
                _ => {}
            }
        }
    }

    /// Steps whose checkpoints find no room on the disk.
    pub fn without_room(&self) -> Vec<u64> {
        self.own.iter().filter(|fault| fault.kind == Kinds::Full).map(|fault| fault.step).collect()
    }

    /// After the update of `step`.
    pub fn on_weights(&self, step: u64, state: &mut State) -> Result<(), WorkerError> {
        for fault in self.own.iter().filter(|fault| fault.step == step) {
            let Kinds::Flip { tensor } = &fault.kind else { continue };
            let (_, view) = state
                .tensors()?
                .into_iter()
                .find(|(name, _)| name == tensor)
                .ok_or_else(|| WorkerError::Usage(format!("{VARIABLE}: there is no tensor {tensor}")))?;
            let bits = match view.kind() {
                Kind::Double => Kind::Int64,
                _ => Kind::Int,
            };
            let bits = tch::no_grad(|| view.f_view_dtype(bits))?;
            let mut first = bits.f_as_strided([1i64], [1i64], None)?;
            let _ = first.f_bitwise_xor_(1i64)?;
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<Vec<Fault>, String> {
    text.split(';').map(str::trim).filter(|entry| !entry.is_empty()).map(entry).collect()
}

fn entry(text: &str) -> Result<Fault, String> {
    let (kind, rest) = text.split_once(':').ok_or_else(|| format!("`{text}` has no `:`"))?;
    let field = |name: &str| {
        rest.split(',')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| key.trim() == name))
            .map(|(_, value)| value.trim())
            .ok_or_else(|| format!("`{text}` has no {name}="))
    };
    let number = |name: &str| {
        let value = field(name)?;
        value.parse::<u64>().map_err(|error| format!("{name}={value} in `{text}`: {error}"))
    };
    let kind = match kind.trim() {
        "flip" => Kinds::Flip { tensor: field("tensor")?.to_owned() },
        "nan" => Kinds::Gradient(GradientFault::Nan),
        "skip-bucket" => Kinds::Gradient(GradientFault::SkipBucket(match field("bucket")? {
            "last" => LAST,
            _ => number("bucket")? as usize,
        })),
        "slow" => Kinds::Slow { times: number("times")? },
        "hang" => Kinds::Hang,
        "stop" => Kinds::Stop,
        "full" => Kinds::Full,
        other => return Err(format!("`{other}` is none of flip, nan, skip-bucket, slow, hang, stop, full")),
    };
    Ok(Fault { rank: number("rank")? as u32, step: number("step")?, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_entries_and_says_what_is_wrong_with_them() {
        let faults =
            parse("nan:rank=1,step=5; skip-bucket:rank=0,step=9,bucket=2; full:rank=0,step=6;").unwrap();
        assert_eq!(
            faults,
            [
                Fault { rank: 1, step: 5, kind: Kinds::Gradient(GradientFault::Nan) },
                Fault { rank: 0, step: 9, kind: Kinds::Gradient(GradientFault::SkipBucket(2)) },
                Fault { rank: 0, step: 6, kind: Kinds::Full },
            ]
        );
        assert_eq!(parse("").unwrap(), []);
        for (text, expected) in [
            ("nan", "`nan` has no `:`"),
            ("nan:rank=1", "`nan:rank=1` has no step="),
            ("melt:rank=1,step=1", "`melt` is none of flip, nan, skip-bucket, slow, hang, stop, full"),
            ("nan:rank=x,step=1", "rank=x in `nan:rank=x,step=1`: invalid digit found in string"),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }
}
