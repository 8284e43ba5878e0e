//! Training state to and from checkpoints.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mentee_checkpoint::{self as checkpoint, Checkpoint, Dtype, Meta};
use mentee_ssl::State;
use tch::{Kind, Tensor};

use crate::error::WorkerError;
use crate::online::{self, OnlineProbe};

/// The folder of a run's checkpoints.
pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The elements of a tensor in row-major order.
pub fn bytes(tensor: &Tensor) -> Result<Vec<u8>, WorkerError> {
    let dense = tensor.f_contiguous()?;
    let mut bytes = vec![0u8; dense.numel() * dense.kind().elt_size_in_bytes()];
    dense.f_copy_data_u8(&mut bytes, dense.numel())?;
    Ok(bytes)
}

fn dtype(kind: Kind) -> Result<Dtype, WorkerError> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::Double => Ok(Dtype::F64),
        other => Err(WorkerError::Failed(format!("a checkpoint holds f32 or f64, not {other:?}"))),
    }
}

/// The state as a checkpoint holds it: every tensor dense, [O, I, H, W].
fn tensors(
    state: &State,
    probe: Option<&OnlineProbe>,
) -> Result<Vec<checkpoint::Tensor<'static>>, WorkerError> {
    let of_probe = probe.map(OnlineProbe::tensors).unwrap_or_default();
    state
        .tensors()?
        .into_iter()
        .chain(of_probe)
        .map(|(name, tensor)| {
            Ok(checkpoint::Tensor {
                name,
                dtype: dtype(tensor.kind())?,
                shape: tensor.size().iter().map(|&dim| dim as usize).collect(),
                bytes: Cow::Owned(bytes(&tensor)?),
            })
        })
        .collect()
}

/// Bytes of one tensor's digest.
pub const DIGEST_LEN: usize = 16;

/// A digest of every tensor of the state.
pub fn tensor_digests(state: &State) -> Result<Vec<(String, [u8; DIGEST_LEN])>, WorkerError> {
    state
        .tensors()?
        .into_iter()
        .map(|(name, tensor)| {
            let whole = blake3::hash(&bytes(&tensor)?);
            Ok((name, std::array::from_fn(|i| whole.as_bytes()[i])))
        })
        .collect()
}

/// Digest of the whole state, for agreement between ranks.
pub fn digest(state: &State) -> Result<String, WorkerError> {
    let mut hasher = blake3::Hasher::new();
    for (name, digest) in tensor_digests(state)? {
        hasher.update(name.as_bytes());
        hasher.update(&digest);
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// Writes the state, drops checkpoints beyond `keep`, and returns the folder and the digest of all state.
pub fn write(
    run_dir: &Path,
    state: &State,
    probe: Option<&OnlineProbe>,
    meta: &Meta,
    keep: u64,
) -> Result<(PathBuf, String), WorkerError> {
    let folder = folder(run_dir);
    std::fs::create_dir_all(&folder).map_err(WorkerError::io("create", &folder))?;
    let files = [("state.safetensors".to_owned(), tensors(state, probe)?)];
    let path = checkpoint::write(&folder, meta, &files)?;
    let digest = checkpoint::open(&path)?.manifest.state_digest;
    checkpoint::retain(&folder, keep)?;
    Ok((path, digest))
}

/// Takes the state from a checkpoint, and the online probe where there is one; nothing is changed when the state does not
/// fit.
pub fn load(
    state: &mut State,
    probe: Option<&mut OnlineProbe>,
    checkpoint: &Checkpoint,
) -> Result<(), WorkerError> {
    let (mut tensors, mut of_probe) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in checkpoint.load()? {
        let kind = match tensor.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::I64 => Kind::Int64,
            Dtype::U8 => Kind::Uint8,
        };
        let shape: Vec<i64> = tensor.shape.iter().map(|&dim| dim as i64).collect();
        let part = if name.starts_with(online::PREFIX) { &mut of_probe } else { &mut tensors };
        part.insert(name, Tensor::f_from_data_size(tensor.bytes(), &shape, kind)?);
    }
    let path = checkpoint.folder.clone();
    state.load(&tensors).map_err(|source| WorkerError::CheckpointContent { path, source })?;
    probe.map_or(Ok(()), |probe| probe.load(&of_probe))
}
