//! Whatever is written is read back, bit for bit, and its digest does not depend on how it was split over
//! files.

use std::{borrow::Cow, collections::BTreeMap};

use mentee_checkpoint::{Dtype, Meta, Tensor, newest, write};
use proptest::prelude::*;
use tempfile::TempDir;

fn tensor() -> impl Strategy<Value = (Dtype, Vec<usize>, Vec<u8>)> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::I64, Dtype::U8]);
    (dtype, prop::collection::vec(0usize..5, 0..4)).prop_flat_map(|(dtype, shape)| {
        let len = shape.iter().product::<usize>() * dtype.size_bytes();
        (Just(dtype), Just(shape), prop::collection::vec(any::<u8>(), len))
    })
}

fn state() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>> {
    prop::collection::btree_map("[ -~é]{1,20}", tensor(), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back(
        state in state(),
        split in prop::collection::vec(0usize..3, 8),
        step in any::<u64>(),
        text in "\\PC{0,40}",
    ) {
        let meta = Meta {
            step,
            epoch: step / 3,
            world_size: 3,
            plan_hash: text.clone(),
            plan_toml: text.clone(),
            data_digest: text.clone(),
            mentee_version: text,
            counts: mentee_checkpoint::Counts::default(),
        };
        let tensors = |wanted: Option<usize>| -> Vec<Tensor<'_>> {
            state
                .iter()
                .zip(split.iter().cycle())
                .filter(|(_, file)| wanted.is_none_or(|wanted| **file == wanted))
                .map(|((name, (dtype, shape, bytes)), _)| Tensor {
                    name: name.clone(),
                    dtype: *dtype,
                    shape: shape.clone(),
                    bytes: Cow::Borrowed(bytes),
                })
                .collect()
        };
        let run = TempDir::new().unwrap();
        let mut digests = Vec::new();
        let split_files: Vec<_> = (0..3).map(|file| (format!("part-{file}.safetensors"), tensors(Some(file)))).collect();
        for files in [vec![("state.safetensors".to_owned(), tensors(None))], split_files] {
            write(run.path(), &meta, &files).unwrap();
            let found = newest(run.path()).unwrap().unwrap();
            prop_assert!(found.rejected.is_empty());
            prop_assert_eq!(&found.checkpoint.manifest.meta, &meta);
            let loaded = found.checkpoint.load().unwrap();
            prop_assert_eq!(loaded.len(), state.len());
            for (name, (dtype, shape, bytes)) in &state {
                let tensor = &loaded[name];
                prop_assert_eq!((tensor.dtype, &tensor.shape, tensor.bytes()), (*dtype, shape, bytes.as_slice()));
            }
            digests.push(found.checkpoint.manifest.state_digest.clone());
        }
        prop_assert_eq!(&digests[0], &digests[1]);
    }
}
