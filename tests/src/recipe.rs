//! A recipe that trains in seconds, and images for it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Training images of [`write_images`].
pub const NUM_TRAIN: usize = 64;
/// Test images of [`write_images`].
pub const NUM_TEST: usize = 40;

/// BYOL on 64 images of 16 pixels, 16 a step: 4 steps an epoch. ResNet-20 in f64 with one thread, so that the only freedom
/// left between two worlds is the order of sums.
#[derive(Debug, Clone)]
pub struct TinyRecipe(BTreeMap<String, BTreeMap<String, String>>);

impl TinyRecipe {
    /// The recipe for images in `data`.
    pub fn new(data: &Path) -> Self {
        let mut recipe = Self(BTreeMap::new());
        let path = data.to_str().expect("a path in UTF-8");
        for (key, value) in [
            ("run.name", "\"tiny\""),
            ("run.seed", "7"),
            ("data.path", &format!("{path:?}")),
            ("views.preset", "\"byol-cifar\""),
            ("views.size", "16"),
            ("model.backbone", "\"resnet20\""),
            ("model.stem", "\"cifar\""),
            ("method.name", "\"byol\""),
            ("method.projector_hidden", "64"),
            ("method.projector_out", "32"),
            ("method.predictor_hidden", "64"),
            ("optimizer.name", "\"sgd\""),
            ("optimizer.base_lr", "0.8"),
            ("optimizer.weight_decay", "0.0001"),
            ("schedule.epochs", "4"),
            ("schedule.global_batch", "16"),
            ("schedule.warmup_epochs", "0.0"),
            ("schedule.max_steps", "8"),
            ("parallel.precision", "\"f64\""),
            ("parallel.threads", "1"),
            ("parallel.decode_threads", "1"),
            ("checkpoint.every_epochs", "0"),
            ("checkpoint.every_steps", "3"),
            ("checkpoint.keep", "100"),
            ("eval.knn_every_epochs", "0"),
        ] {
            recipe = recipe.set(key, value);
        }
        recipe
    }

    /// Sets `section.key` to a TOML value as it is written in a file.
    pub fn set(mut self, key: &str, value: &str) -> Self {
        let (section, name) = key.split_once('.').expect("section.key");
        self.0.entry(section.into()).or_default().insert(name.into(), value.into());
        self
    }

    /// Writes it to a file and returns that.
    pub fn write(&self, path: PathBuf) -> PathBuf {
        let mut text = String::new();
        for (section, keys) in &self.0 {
            let _ = writeln!(text, "[{section}]");
            for (name, value) in keys {
                let _ = writeln!(text, "{name} = {value}");
            }
        }
        fs::write(&path, text).expect("the recipe can be written");
        path
    }
}

/// RGB of one image of the set, 32 x 32, rows of interleaved pixels: a disc whose size and colour depend on `class` (0 to 3) and
/// `index`, over a gradient.
pub fn image(class: u8, index: usize) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(3072);
    let radius = 5 + 2 * i32::from(class);
    let (cx, cy) = (10 + (index * 7 % 13) as i32, 10 + (index * 5 % 11) as i32);
    for y in 0..32i32 {
        for x in 0..32i32 {
            let inside = (x - cx).pow(2) + (y - cy).pow(2) <= radius.pow(2);
            for channel in 0..3i32 {
                let ground = (x * (3 + channel) + y * (1 + index as i32 % 5)) & 0x7f;
                let disc = 128 + (index as i32 * 37 + channel * 61) % 128;
                pixels.push((if inside { disc } else { ground }) as u8);
            }
        }
    }
    pixels
}

/// Writes [`NUM_TRAIN`] and [`NUM_TEST`] labelled images in CIFAR-10's binary format.
pub fn write_images(dir: &Path) {
    write_many_images(dir, NUM_TRAIN);
}

/// The same with so many training images.
pub fn write_many_images(dir: &Path, num_train: usize) {
    fs::create_dir_all(dir).expect("the folder for images");
    for (file, first, count) in [("data_batch_1.bin", 0, num_train), ("test_batch.bin", num_train, NUM_TEST)]
    {
        let mut bytes = Vec::with_capacity(count * 3073);
        for index in first..first + count {
            let class = (index % 4) as u8;
            let pixels = image(class, index);
            bytes.push(class);
            for channel in 0..3 {
                bytes.extend(pixels.iter().skip(channel).step_by(3));
            }
        }
        fs::write(dir.join(file), bytes).expect("the images can be written");
    }
}
