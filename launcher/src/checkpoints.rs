//! `mentee checkpoints`: what a run could be resumed from, and whether every byte of it is sound.

use std::path::Path;

use mentee_checkpoint as checkpoint;
use mentee_config::{exit_code, say, show};
use serde_json::json;

use crate::failure::Failure;
use crate::printable::{printable, printable_json};
use crate::rundir::RunDir;
use crate::shard::human_bytes;

/// `mentee checkpoints RUN [--verify] [--json]`.
///
/// # Errors
/// [`Failure`] with exit code 4 when one of them is unusable.
pub fn command(path: &Path, verify: bool, as_json: bool) -> Result<(), Failure> {
    let run = RunDir::existing(path)?;
    let mut entries = checkpoint::list(&run.checkpoints())?;
    entries.sort_by_key(|entry| entry.step);
    let mut unusable = 0;
    let mut objects = Vec::new();
    // Who asks whether they are sound gets the answer in the exit code, whoever reads the lines.
    let tell = |line: String| if verify { say!("{line}") } else { show!("{line}") };
    for entry in &entries {
        let checked = match &entry.state {
            Err(error) => Err(error.to_string()),
            Ok(manifest) if !verify => Ok(manifest),
            Ok(manifest) => checkpoint::open(&entry.path)
                .and_then(|found| found.verify())
                .map(|()| manifest)
                .map_err(|error| error.to_string()),
        };
        unusable += u32::from(checked.is_err());
        match &checked {
            Ok(manifest) if as_json => objects.push(json!({
                "step": entry.step,
                "path": entry.path,
                "usable": true,
                "verified": verify,
                "epoch": manifest.meta.epoch,
                "world_size": manifest.meta.world_size,
                "bytes": manifest.files.iter().map(|file| file.bytes).sum::<u64>(),
                "state_digest": manifest.state_digest,
                "plan_hash": manifest.meta.plan_hash,
                "data_digest": manifest.meta.data_digest,
                "mentee_version": manifest.meta.mentee_version,
            })),
            Err(error) if as_json => objects.push(json!({
                "step": entry.step,
                "path": entry.path,
                "usable": false,
                "error": error,
            })),
            Ok(manifest) => tell(format!(
                "step {:>8}  epoch {:>4}  world size {:>3}  {:>10}  digest {}{}",
                entry.step,
                manifest.meta.epoch,
                manifest.meta.world_size,
                human_bytes(manifest.files.iter().map(|file| file.bytes).sum()),
                printable(&manifest.state_digest),
                if verify { "  verified" } else { "" }
            )),
            Err(error) => tell(format!("step {:>8}  unusable: {}", entry.step, printable(error))),
        }
    }
    if as_json {
        tell(printable_json(&format!("{:#}", json!(objects))));
    } else if entries.is_empty() {
        tell(printable(&format!("no checkpoint in {}", run.checkpoints().display())));
    }
    if unusable > 0 {
        return Err(Failure {
            exit_code: exit_code::CHECKPOINT,
            line: printable(&format!(
                "{unusable} of {} checkpoints in {} cannot be used; a run resumes from the newest that can",
                entries.len(),
                run.checkpoints().display()
            )),
        });
    }
    Ok(())
}
