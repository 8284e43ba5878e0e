//! `model.init`: a backbone to start from, as `mentee export` or torchvision wrote it.

use std::collections::BTreeMap;
use std::path::Path;

use mentee_config::Recipe;
use mentee_ssl::State;
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::error::WorkerError;

/// The backbone that a recipe starts from, where it names one.
pub fn of_recipe(state: &mut State, recipe: &Recipe) -> Result<(), WorkerError> {
    let path = &recipe.model.init;
    if path.as_os_str().is_empty() { Ok(()) } else { backbone(state, path) }
}

/// Takes student's and teacher's backbone from a safetensors file with torchvision's names. Every weight and statistic
/// must be there, in its shape; of what else is there only a classifier (`fc.…`) and counts of batches are passed over.
fn backbone(state: &mut State, path: &Path) -> Result<(), WorkerError> {
    let failed = |problem: String| WorkerError::Import { path: path.to_owned(), problem };
    let bytes = std::fs::read(path).map_err(|error| match mentee_config::is_passing(&error) {
        true => WorkerError::io("read", path)(error),
        false => failed(format!("cannot be read: {error}")),
    })?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| failed(format!("is no safetensors file: {error}")))?;
    let mut tensors: BTreeMap<String, Tensor> =
        state.tensors()?.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    for (name, own) in &mut tensors {
        let name =
            ["student.backbone.", "teacher.backbone."].iter().find_map(|prefix| name.strip_prefix(prefix));
        let Some(name) = name else { continue };
        let found = file.tensor(name).map_err(|_| failed(format!("tensor `{name}` is missing")))?;
        let shape: Vec<i64> = found.shape().iter().map(|&dim| dim as i64).collect();
        if shape != own.size() {
            let problem = format!("tensor `{name}` is {shape:?}, {:?} in this recipe's backbone", own.size());
            return Err(failed(problem));
        }
        let kind = match found.dtype() {
            Dtype::F64 => Kind::Double,
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => return Err(failed(format!("tensor `{name}` is of {other:?}; it must be of floats"))),
        };
        *own = Tensor::f_from_data_size(found.data(), &shape, kind)?.f_to_kind(own.kind())?;
    }
    let known = |name: &&str| {
        tensors.contains_key(&format!("student.backbone.{name}"))
            || name.starts_with("fc.")
            || name.ends_with(".num_batches_tracked")
    };
    if let Some(name) = file.names().into_iter().find(|name| !known(name)) {
        return Err(failed(format!("tensor `{name}` is no part of this recipe's backbone")));
    }
    state.load(&tensors)?;
    tracing::info!(path = %path.display(), "the backbone starts from a file");
    Ok(())
}
