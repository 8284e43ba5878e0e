//! Checkpoints: training state as safetensors files and a manifest, in a folder that appears whole or not at
//! all.
//!
//! The bytes are specified in `FORMAT.md` beside this crate. This crate knows neither torch nor a network: a
//! tensor is a name, a type, a shape and bytes.
//!
//! ```text
//!   rank 0: Staging::write ─┐
//!   rank 1: Staging::write ─┼─► .tmp-step-00001000-ATTEMPT/ ──Staging::commit──► step-00001000/{*.safetensors, manifest.json}
//!   …                      ─┘                                                          │
//!   list (cheap: manifest and file lengths) ◄──────────────────────────────────────────┤
//!   newest, Checkpoint::verify, Checkpoint::load ◄─────────────────────────────────────┘  every byte against its digest,
//!                                                                                         before it is used
//! ```
//!
//! ```
//! use mentee_checkpoint::{Counts, Dtype, Meta, Tensor};
//!
//! # let folder = tempfile::tempdir().unwrap();
//! # let folder = folder.path().join("checkpoints");
//! let meta = Meta {
//!     step: 1000,
//!     epoch: 3,
//!     world_size: 2,
//!     plan_hash: "89abcdef01234567".into(),
//!     plan_toml: "[run]\nseed = 0\n".into(),
//!     data_digest: "d1".into(),
//!     mentee_version: "0.1.0".into(),
//!     counts: Counts::default(),
//! };
//! let weights: Vec<u8> = [1.0f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
//! let state = vec![Tensor::new("student.backbone.fc.bias", Dtype::F32, &[2], &weights)];
//! mentee_checkpoint::write(&folder, &meta, &[("state.safetensors".into(), state)])?;
//!
//! let found = mentee_checkpoint::newest(&folder)?.expect("just written");
//! assert_eq!(found.checkpoint.manifest.meta, meta);
//! assert_eq!(found.checkpoint.load()?["student.backbone.fc.bias"].bytes(), weights);
//! # Ok::<(), mentee_checkpoint::CheckpointError>(())
//! ```

mod disk;
mod error;
mod manifest;
mod read;
mod share;
mod tensor;
mod write;

pub use disk::{FileSystem, LocalDisk, NewFile};
pub use error::CheckpointError;
pub use manifest::{Counts, FileEntry, MANIFEST_NAME, Manifest, Meta, VERSION};
pub use read::{
    Checkpoint, Entry, Newest, clean, list, newest, open, refusal_of_images, refusal_to_write, retain,
};
pub use share::{file_name, split};
pub use tensor::{Dtype, OwnedTensor, Tensor};
pub use write::{Committed, Staging, write};

use std::path::{Path, PathBuf};

/// The folder of a step inside a run's checkpoint folder.
pub fn step_folder(checkpoints_dir: &Path, step: u64) -> PathBuf {
    checkpoints_dir.join(step_name(step))
}

fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step that a folder name stands for; only names that [`step_name`] makes.
fn parse_step_name(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_names_are_canonical() {
        for step in [0, 1000, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(parse_step_name(&step_name(step)), Some(step));
        }
        for other in [
            "step-1",
            "step-000000001",
            "step-+0000001",
            "step-",
            "step-0000001x",
            "step-99999999999999999999",
        ] {
            assert_eq!(parse_step_name(other), None, "{other}");
        }
    }
}
