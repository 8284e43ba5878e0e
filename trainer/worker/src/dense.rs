//! Tensors in a safetensors file, for other programs.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::error::WorkerError;
use crate::snapshot;

/// Writes dense tensors, [O, I, H, W], under their names.
pub fn write(path: &Path, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<(), WorkerError> {
    let mut stored: BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, tensor) in tensors {
        let dtype = match tensor.kind() {
            tch::Kind::Double => safetensors::Dtype::F64,
            tch::Kind::Float => safetensors::Dtype::F32,
            tch::Kind::Int64 => safetensors::Dtype::I64,
            other => {
                return Err(WorkerError::Failed(format!(
                    "{name}: such a file holds f32, f64 or i64, not {other:?}"
                )));
            }
        };
        let shape = tensor.size().iter().map(|&dim| dim as usize).collect();
        stored.insert(name, (dtype, shape, snapshot::bytes(&tensor)?));
    }
    let views = stored
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            Ok((name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let failed = |error| WorkerError::Failed(format!("failed to write {}: {error}", path.display()));
    safetensors::serialize_to_file(views.map_err(failed)?, None, path).map_err(failed)
}
