//! Training state to and from bytes: copies for checkpoints, digests for agreement.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use mentee_checkpoint::{self as checkpoint, Dtype, OwnedTensor};
use mentee_ssl::State;
use tch::{Kind, Tensor};

use crate::error::WorkerError;
use crate::online::{self, OnlineProbe};

/// The elements of a tensor in row-major order.
pub fn bytes(tensor: &Tensor) -> Result<Vec<u8>, WorkerError> {
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

/// The elements of a tensor in the order of memory: [O, I, H, W] lies there as [O, H, W, I].
fn copy_as_it_lies(tensor: &Tensor, to: &mut [u8]) -> Result<(), WorkerError> {
    if tensor.dim() == 4 {
        return Ok(tensor.f_permute([0, 2, 3, 1])?.f_copy_data_u8(to, tensor.numel())?);
    }
    Ok(tensor.f_copy_data_u8(to, tensor.numel())?)
}

fn num_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

fn dtype(kind: Kind) -> Result<Dtype, WorkerError> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::Double => Ok(Dtype::F64),
        other => Err(WorkerError::Failed(format!("a checkpoint holds f32 or f64, not {other:?}"))),
    }
}

/// What a checkpoint holds.
fn tensors(state: &State, probe: Option<&OnlineProbe>) -> Result<Vec<(String, Tensor)>, WorkerError> {
    let mut tensors = state.tensors()?;
    tensors.extend(probe.map(OnlineProbe::tensors).unwrap_or_default());
    Ok(tensors)
}

/// The tensors that one rank writes into a checkpoint, and the place of each in a copy.
#[derive(Debug)]
pub struct Share {
    parts: Vec<Part>,
    /// Bytes of the copy.
    pub len: usize,
}

#[derive(Debug)]
struct Part {
    /// Among the tensors of the state.
    index: usize,
    name: String,
    dtype: Dtype,
    /// [O, I, H, W] or less.
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Share {
    /// What is `rank`'s of the state.
    pub fn new(
        state: &State,
        probe: Option<&OnlineProbe>,
        rank: u32,
        world_size: u32,
    ) -> Result<Self, WorkerError> {
        let tensors = tensors(state, probe)?;
        let sizes: Vec<usize> = tensors.iter().map(|(_, tensor)| num_bytes(tensor)).collect();
        let ranks = checkpoint::split(&sizes, world_size);
        let (mut parts, mut len) = (Vec::new(), 0);
        for (index, (name, tensor)) in tensors.into_iter().enumerate().filter(|(n, _)| ranks[*n] == rank) {
            let shape = tensor.size().iter().map(|&dim| dim as usize).collect();
            let range = len..len + sizes[index];
            len = range.end;
            parts.push(Part { index, name, dtype: dtype(tensor.kind())?, shape, range });
        }
        Ok(Self { parts, len })
    }

    /// Copies the state as it lies in memory, which is as fast as memory is; from a device into host memory.
    pub fn copy(
        &self,
        state: &State,
        probe: Option<&OnlineProbe>,
        copy: &mut [u8],
    ) -> Result<(), WorkerError> {
        let tensors = tensors(state, probe)?;
        self.parts.iter().try_for_each(|part| {
            let (name, tensor) = &tensors[part.index];
            debug_assert_eq!(*name, part.name);
            copy_as_it_lies(tensor, &mut copy[part.range.clone()])
        })
    }

    /// The tensors of a copy, once each is brought in place from the order of memory into row-major order.
    pub fn tensors<'c>(&self, copy: &'c mut [u8]) -> Vec<checkpoint::Tensor<'c>> {
        let mut scratch = Vec::new();
        for part in &self.parts {
            if let [_, inputs, height, width] = part.shape[..]
                && height * width > 1
            {
                for filter in
                    copy[part.range.clone()].chunks_mut(inputs * height * width * part.dtype.size_bytes())
                {
                    scratch.clear();
                    scratch.extend_from_slice(filter);
                    match part.dtype.size_bytes() {
                        8 => transpose::<8>(&scratch, inputs, filter),
                        _ => transpose::<4>(&scratch, inputs, filter),
                    }
                }
            }
        }
        let copy = &*copy;
        self.parts
            .iter()
            .map(|part| {
                checkpoint::Tensor::new(&part.name, part.dtype, &part.shape, &copy[part.range.clone()])
            })
            .collect()
    }
}

/// [N, inputs] to [inputs, N], elements of `SIZE` bytes.
fn transpose<const SIZE: usize>(from: &[u8], inputs: usize, to: &mut [u8]) {
    let (from, _) = from.as_chunks::<SIZE>();
    let (to, _) = to.as_chunks_mut::<SIZE>();
    let pixels = from.len() / inputs;
    for (pixel, elements) in from.chunks_exact(inputs).enumerate() {
        for (input, element) in elements.iter().enumerate() {
            to[input * pixels + pixel] = *element;
        }
    }
}

/// Bytes of one tensor's digest.
pub const DIGEST_LEN: usize = 16;

/// A digest of every tensor of the state: the same on ranks that hold the same.
pub fn tensor_digests(state: &State) -> Result<Vec<(String, [u8; DIGEST_LEN])>, WorkerError> {
    let tensors = state.tensors()?;
    let mut scratch = vec![0; tensors.iter().map(|(_, tensor)| num_bytes(tensor)).max().unwrap_or(0)];
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let bytes = &mut scratch[..num_bytes(&tensor)];
            copy_as_it_lies(&tensor, bytes)?;
            let whole = blake3::hash(bytes);
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

/// Takes the state from what the checkpoint in `folder` holds, and the online probe where there is one; nothing is changed when
/// the state does not fit.
pub fn load(
    state: &mut State,
    probe: Option<&mut OnlineProbe>,
    folder: &Path,
    held: BTreeMap<String, OwnedTensor>,
) -> Result<(), WorkerError> {
    let (mut tensors, mut of_probe) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in held {
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
    let path = folder.to_owned();
    state.load(&tensors).map_err(|source| WorkerError::CheckpointContent { path, source })?;
    probe.map_or(Ok(()), |probe| probe.load(&of_probe))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mentee_config::Recipe;
    use mentee_data::{DataError, Encoding, Source};

    use super::*;

    /// Images with labels, which nobody looks at.
    struct Labels;

    impl Source for Labels {
        fn len(&self) -> u64 {
            10
        }
        fn read_into(&self, _: u64, _: &mut Vec<u8>) -> Result<Encoding, DataError> {
            unreachable!()
        }
        fn label(&self, index: u64) -> Option<u32> {
            Some(index as u32)
        }
        fn key(&self, _: u64) -> String {
            String::new()
        }
        fn classes(&self) -> &[String] {
            &[]
        }
        fn digest(&self) -> String {
            String::new()
        }
        fn stored(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    #[test]
    fn shares_hold_every_tensor_once_in_row_major_order() {
        for precision in ["f32", "f64"] {
            let sets = [
                "model.backbone=\"resnet20\"".into(),
                "eval.online_probe=true".into(),
                format!("parallel.precision=\"{precision}\""),
            ];
            let recipe = Recipe::load("byol-cifar10-small", &sets).unwrap();
            let (_, state) = mentee_ssl::state::new(&recipe).unwrap();
            let probe = OnlineProbe::of_run(&recipe, Arc::new(Labels), 64).unwrap().unwrap();
            let expected: BTreeMap<String, Vec<u8>> = tensors(&state, Some(&probe))
                .unwrap()
                .into_iter()
                .map(|(name, tensor)| (name, bytes(&tensor).unwrap()))
                .collect();
            assert!(expected.keys().any(|name| name.starts_with("momentum.")));
            assert!(expected.keys().any(|name| name.starts_with(online::PREFIX)));
            assert!(expected.keys().any(|name| name.ends_with("running_var")));
            for world_size in [1, 3] {
                let mut found = BTreeMap::new();
                for rank in 0..world_size {
                    let share = Share::new(&state, Some(&probe), rank, world_size).unwrap();
                    let mut copy = vec![0; share.len];
                    share.copy(&state, Some(&probe), &mut copy).unwrap();
                    for tensor in share.tensors(&mut copy) {
                        assert!(found.insert(tensor.name, tensor.bytes.into_owned()).is_none());
                    }
                }
                assert!(found == expected, "{precision}, {world_size} ranks");
            }
        }
    }
}
