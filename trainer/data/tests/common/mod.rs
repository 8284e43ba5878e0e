//! What the tests share: settings, images in memory, encoders.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::sync::Arc;

use mentee_config::recipe::{Definition, Interpolation, ViewPreset, Views};
use mentee_data::{DataError, Encoding, Source};

/// BYOL's settings at `size` pixels, without normalisation: views are RGB in [0, 1].
pub fn views(definition: Definition, size: u32) -> Views {
    Views {
        preset: ViewPreset::Byol,
        definition,
        size,
        resize: Interpolation::Bicubic,
        crop_area: [0.08, 1.0],
        crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
        flip: 0.5,
        jitter: 0.8,
        brightness: 0.4,
        contrast: 0.4,
        saturation: 0.2,
        hue: 0.1,
        grayscale: 0.2,
        blur: [1.0, 0.1],
        blur_sigma: [0.1, 2.0],
        solarize: [0.0, 0.2],
        mean: [0.0; 3],
        std: [1.0; 3],
    }
}

/// Bytes that look like noise, the same every time.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

pub fn png(width: u32, height: u32, color: png::ColorType, depth: png::BitDepth, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == png::ColorType::Indexed {
        encoder.set_palette(vec![10, 20, 30, 200, 100, 50]);
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(data).unwrap();
    writer.finish().unwrap();
    bytes
}

pub fn rgb_png(width: u32, height: u32, seed: u64) -> Vec<u8> {
    let data = noise((width * height * 3) as usize, seed);
    png(width, height, png::ColorType::Rgb, png::BitDepth::Eight, &data)
}

/// A smooth picture as JPEG.
pub fn jpeg(width: u16, height: u16, progressive: bool, color: jpeg_encoder::ColorType) -> Vec<u8> {
    let channels = match color {
        jpeg_encoder::ColorType::Luma => 1,
        jpeg_encoder::ColorType::Cmyk => 4,
        _ => 3,
    };
    let data: Vec<u8> = (0..usize::from(height))
        .flat_map(|y| {
            (0..usize::from(width))
                .flat_map(move |x| (0..channels).map(move |c| (40 + 3 * x + 2 * y + 20 * c).min(230) as u8))
        })
        .collect();
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 95);
    encoder.set_progressive(progressive);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_1_1);
    encoder.encode(&data, width, height, color).unwrap();
    bytes
}

/// Files in memory.
pub struct Memory {
    pub files: Vec<Vec<u8>>,
    pub labels: Vec<Option<u32>>,
    pub classes: Vec<String>,
}

impl Memory {
    /// `n` small PNG files of differing sizes in three classes.
    pub fn noise(n: u64) -> Arc<Self> {
        Arc::new(Self {
            files: (0..n).map(|i| rgb_png(8 + (i % 5) as u32, 12 - (i % 7) as u32, i + 1)).collect(),
            labels: (0..n).map(|i| Some((i % 3) as u32)).collect(),
            classes: ["a", "b", "c"].map(str::to_owned).to_vec(),
        })
    }
}

impl Source for Memory {
    fn len(&self) -> u64 {
        self.files.len() as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        buffer.clear();
        buffer.extend_from_slice(&self.files[index as usize]);
        Ok(Encoding::File)
    }

    fn label(&self, index: u64) -> Option<u32> {
        self.labels[index as usize]
    }

    fn key(&self, index: u64) -> String {
        format!("memory:{index}")
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn digest(&self) -> String {
        "memory".to_owned()
    }

    fn stored(&self) -> (u64, u64) {
        (self.files.iter().map(|file| file.len() as u64).sum(), self.len())
    }
}
