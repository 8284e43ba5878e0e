//! What Slurm's variables say of a step, of an allocation, and of its nodes.

use super::{Env, Identity, IdentityError, checked, get, number};

/// The name of Slurm's row, for messages.
pub(super) const SRUN: &str = "srun";

/// Step ids of Slurm that are no `srun` step: extern, batch and interactive (`SLURM_BATCH_SCRIPT` and its neighbours
/// in slurm.h, newer versions export them).
const NO_STEP: &[&str] = &["4294967290", "4294967291", "4294967292", "batch", "extern", "interactive"];

/// No cluster is larger; a list that unfolds into more is a mistake.
const MAX_NODES: usize = 1 << 20;

/// A job's nodes, as seen from its batch script or from a shell of `salloc`: a place to start workers from, and no
/// rank itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// `SLURM_JOB_ID`; of an array's task, its own.
    pub job_id: String,
    /// Of an array's task, its place there, as `12_3`.
    pub array_task: Option<String>,
    /// Names of its nodes, in Slurm's order.
    pub nodes: Vec<String>,
    /// How often Slurm has put the job back into the queue and started it again.
    pub restarts: u32,
}

impl Allocation {
    /// The allocation that this process may start workers in; `None` outside of one, and inside of a step.
    pub fn from_env(env: &Env) -> Option<Allocation> {
        if in_step(env) {
            return None;
        }
        let nodes = get(env, "SLURM_JOB_NODELIST").or_else(|| get(env, "SLURM_NODELIST"))?;
        Some(Allocation {
            job_id: get(env, "SLURM_JOB_ID").or_else(|| get(env, "SLURM_JOBID"))?,
            array_task: get(env, "SLURM_ARRAY_JOB_ID")
                .and_then(|job| Some(format!("{job}_{}", get(env, "SLURM_ARRAY_TASK_ID")?))),
            nodes: expand_nodes(&nodes)?,
            restarts: get(env, "SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0),
        })
    }

    /// What Slurm's commands call this job and no other: an array's name, which one of its tasks has as its id, means all of them.
    pub fn job(&self) -> &str {
        self.array_task.as_deref().unwrap_or(&self.job_id)
    }

    /// The node that a machine's own name belongs to: nodes go by the first label of a name, or by all of it.
    pub fn node_of(&self, host: &str) -> Option<&str> {
        let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
        let exact = self.nodes.iter().find(|node| *node == host);
        exact.or_else(|| self.nodes.iter().find(|node| short(node) == short(host))).map(String::as_str)
    }
}

fn in_step(env: &Env) -> bool {
    get(env, "SLURM_STEP_ID").is_some_and(|id| !NO_STEP.contains(&id.as_str()))
}

/// This task's place in its step; `None` outside of one.
pub(super) fn step(env: &Env) -> Result<Option<Identity>, IdentityError> {
    if !in_step(env) {
        return Ok(None);
    }
    let missing =
        |missing| IdentityError::Incomplete { source_name: SRUN, present: "SLURM_STEP_ID", missing };
    let (_, rank) = number(env, &["SLURM_PROCID"])?.ok_or(missing("SLURM_PROCID"))?;
    let (_, world_size) =
        number(env, &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"])?.ok_or(missing("SLURM_STEP_NUM_TASKS"))?;
    let (_, local_rank) = number(env, &["SLURM_LOCALID"])?.ok_or(missing("SLURM_LOCALID"))?;
    let node = number(env, &["SLURM_NODEID"])?.map_or(0, |(_, node)| node);
    let local_size = match ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]
        .into_iter()
        .find_map(|variable| Some((variable, get(env, variable)?)))
    {
        Some((variable, value)) => {
            tasks_on_node(&value, node).ok_or(IdentityError::TasksPerNode { variable, value, node })?
        }
        None if world_size == 1 => 1,
        None => return Err(missing("SLURM_STEP_TASKS_PER_NODE")),
    };
    checked(Identity { rank, world_size, local_rank, local_size, source: SRUN }).map(Some)
}

/// Slurm's run-length list, `2(x3),1` = 2, 2, 2, 1 tasks on nodes 0 to 3; never `tasks / nodes`, layouts are uneven.
fn tasks_on_node(list: &str, node: u32) -> Option<u32> {
    let mut first = 0u64;
    for part in list.split(',') {
        let (tasks, repeat) = match part.split_once("(x") {
            Some((tasks, rest)) => (tasks, rest.strip_suffix(')')?.parse::<u64>().ok()?),
            None => (part, 1),
        };
        if u64::from(node) < first + repeat {
            return tasks.trim().parse().ok();
        }
        first += repeat;
    }
    None
}

/// Unfolds Slurm's compressed form: `n[1-2,05-06],login,r[1-2]n[1-2]` = n1, n2, n05, n06, login, r1n1, r1n2, r2n1,
/// r2n2. `None` for what is no such list, and for more than a million names.
pub fn expand_nodes(list: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut depth = 0u32;
    let mut start = 0;
    let list = list.trim();
    for (at, c) in list.char_indices().chain([(list.len(), ',')]) {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                let name = list[start..at].trim();
                if name.is_empty() {
                    return None;
                }
                expand_name(name, &mut names)?;
                start = at + 1;
            }
            _ => {}
        }
    }
    (depth == 0).then_some(names)
}

/// One name with any number of bracketed ranges.
fn expand_name(name: &str, names: &mut Vec<String>) -> Option<()> {
    let Some(open) = name.find('[') else {
        if name.contains(']') || names.len() == MAX_NODES {
            return None;
        }
        names.push(name.to_owned());
        return Some(());
    };
    let close = open + name[open..].find(']')?;
    let (head, ranges, tail) = (&name[..open], &name[open + 1..close], &name[close + 1..]);
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(first) || !digits(last) {
            return None;
        }
        // Leading zeros are part of the names.
        let width = first.len();
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        if last < first || last - first >= MAX_NODES as u64 {
            return None;
        }
        for number in first..=last {
            expand_name(&format!("{head}{number:0width$}{tail}"), names)?;
        }
    }
    Some(())
}
