//! Tensors as this crate sees them, and the digest of a whole state.

use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

/// The element types of training state. Multi-byte elements are little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4-byte floats.
    F32,
    /// 8-byte floats.
    F64,
    /// 2-byte brain floats.
    Bf16,
    /// 8-byte signed integers.
    I64,
    /// Bytes.
    U8,
}

impl Dtype {
    /// The bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// The name in the file, as safetensors spells it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
            Dtype::Bf16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::U8 => "U8",
        }
    }

    pub(crate) fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F64 => safetensors::Dtype::F64,
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::I64 => safetensors::Dtype::I64,
            Dtype::U8 => safetensors::Dtype::U8,
        }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        [Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::I64, Dtype::U8]
            .into_iter()
            .find(|known| known.to_safetensors() == dtype)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor to be written. It borrows its bytes where it can: writing makes no copy of the state.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Unique in the whole checkpoint, for example `student.backbone.conv1.weight`.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements in row-major order, little endian.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// A tensor over borrowed bytes. Whether they fit the shape is checked on writing.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Self {
        Tensor { name: name.into(), dtype, shape: shape.to_vec(), bytes: Cow::Borrowed(bytes) }
    }

    /// Whether the number of bytes is that of the shape.
    pub(crate) fn fits(&self) -> bool {
        let elements = self.shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
        elements.and_then(|elements| elements.checked_mul(self.dtype.size_bytes())) == Some(self.bytes.len())
    }
}

/// A tensor that was read and verified. The tensors of one file share its memory.
#[derive(Clone)]
pub struct OwnedTensor {
    /// The element type.
    pub dtype: Dtype,
    /// The extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    pub(crate) file: Arc<Vec<u8>>,
    pub(crate) range: Range<usize>,
}

impl OwnedTensor {
    /// The elements in row-major order, little endian. Not necessarily aligned for their type.
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

impl PartialEq for OwnedTensor {
    fn eq(&self, other: &Self) -> bool {
        (self.dtype, &self.shape, self.bytes()) == (other.dtype, &other.shape, other.bytes())
    }
}

impl fmt::Debug for OwnedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedTensor({} {:?}, {} bytes)", self.dtype, self.shape, self.range.len())
    }
}

/// Under this key of a safetensors file's `__metadata__` stand the digests of its tensors, 64 hexadecimal digits each, in
/// the order of their data.
pub(crate) const DIGESTS_KEY: &str = "blake3";

/// Names of tensors: printable, of a sane length, and not the key that safetensors reserves.
pub(crate) fn is_tensor_name(name: &str) -> bool {
    (1..=512).contains(&name.len()) && !name.contains(char::is_control) && name != "__metadata__"
}

/// The digest of a whole state, see FORMAT.md, "State digest". Independent of order and of the split into
/// files.
#[derive(Default)]
pub(crate) struct StateDigest {
    tensors: Vec<(String, Dtype, Vec<usize>, blake3::Hash)>,
}

impl StateDigest {
    /// `digest`: of the tensor's bytes.
    pub(crate) fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize], digest: blake3::Hash) {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec(), digest));
    }

    pub(crate) fn finish(mut self) -> String {
        self.tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let mut digest = blake3::Hasher::new();
        digest.update(b"mentee-state-1\0");
        let text = |digest: &mut blake3::Hasher, text: &str| {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        };
        for (name, dtype, shape, content) in &self.tensors {
            text(&mut digest, name);
            text(&mut digest, dtype.name());
            digest.update(&(shape.len() as u64).to_le_bytes());
            for extent in shape {
                digest.update(&(*extent as u64).to_le_bytes());
            }
            digest.update(content.as_bytes());
        }
        digest.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_that_overflows_does_not_fit() {
        let fits = |shape: &[usize], len| Tensor::new("t", Dtype::F64, shape, &vec![0; len]).fits();
        assert!(fits(&[], 8));
        assert!(fits(&[0, 5], 0));
        assert!(fits(&[2, 3], 48));
        assert!(!fits(&[2, 3], 47));
        assert!(!fits(&[usize::MAX, 2], 16));
        assert!(!fits(&[usize::MAX / 4], 16));
    }

    #[test]
    fn the_state_digest_sees_everything_but_the_order() {
        let digest = |tensors: &[(&str, Dtype, &[usize], &[u8])]| {
            let mut digest = StateDigest::default();
            tensors
                .iter()
                .for_each(|(name, dtype, shape, bytes)| digest.add(name, *dtype, shape, blake3::hash(bytes)));
            digest.finish()
        };
        let a = ("a", Dtype::U8, [2usize].as_slice(), [1u8, 2].as_slice());
        let b = ("b", Dtype::I64, [1usize].as_slice(), [0u8; 8].as_slice());
        let whole = digest(&[a, b]);
        assert_eq!(whole, digest(&[b, a]));
        for other in [
            digest(&[a]),
            digest(&[a, ("c", b.1, b.2, b.3)]),
            digest(&[a, (b.0, Dtype::F64, b.2, b.3)]),
            digest(&[a, (b.0, b.1, &[], b.3)]),
            digest(&[(a.0, a.1, a.2, &[1, 3]), b]),
        ] {
            assert_ne!(whole, other);
        }
    }
}
