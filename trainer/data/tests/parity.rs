//! Against fixtures that Pillow, torchvision and a NumPy transcription of DeepMind's definitions made
//! (`fixtures/make.py`): pixels of JPEG files, crop boxes, resize, every colour operation, blur, solarize, a composed view.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::views;
use mentee_config::recipe::{Definition, Interpolation};
use mentee_data::augment::{Augmenter, ColourOp, CropBox, Scratch, ViewDraw, ViewKey};
use mentee_data::decode::{Decoder, PlanarImage, Reading};
use mentee_data::{Encoding, RgbImage, decode};
use proptest::prelude::*;

const SIZE: u32 = 40;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The arrays of `parity.safetensors`; bytes as they are.
fn arrays() -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(fixtures().join("parity.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let data = &bytes[8 + length..];
    header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, entry)| {
            let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
            let part = &data[at(0)..at(1)];
            let values = match entry["dtype"].as_str().unwrap() {
                "U8" => part.iter().map(|&byte| f64::from(byte)).collect(),
                _ => part
                    .chunks_exact(4)
                    .map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap())))
                    .collect(),
            };
            (name.clone(), values)
        })
        .collect()
}

fn image(values: &[f64], width: u32, height: u32) -> RgbImage {
    RgbImage { width, height, data: values.iter().map(|&x| x as u8).collect() }
}

fn plain() -> ViewDraw {
    ViewDraw {
        crop: CropBox { x: 0, y: 0, width: SIZE, height: SIZE },
        flip: false,
        jitter: Vec::new(),
        grayscale: false,
        blur: None,
        solarize: false,
    }
}

/// The largest difference; the fixture may hold the first rows only.
fn difference(found: &[f32], expected: &[f64], scale: f64) -> f64 {
    assert!(!expected.is_empty() && expected.len() <= found.len());
    found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b * scale).abs()).fold(0.0, f64::max)
}

#[test]
fn every_operation() {
    let arrays = arrays();
    let source = image(&arrays["image"], SIZE, SIZE);
    let make = |definition, draw: &ViewDraw| {
        let augmenter = Augmenter::new(&views(definition, SIZE));
        let mut out = vec![f32::NAN; augmenter.view_len()];
        augmenter.apply(&mut Scratch::default(), &source, draw, &mut out);
        out
    };
    let mut checked = 0;
    for (name, expected) in &arrays {
        let words: Vec<&str> = name.split(' ').collect();
        let value = words.get(2).and_then(|word| word.parse::<f64>().ok());
        let mut draw = plain();
        match (words[1..].first().copied(), value) {
            (Some("brightness"), Some(v)) => draw.jitter = vec![ColourOp::Brightness(v as f32)],
            (Some("contrast"), Some(v)) => draw.jitter = vec![ColourOp::Contrast(v as f32)],
            (Some("saturation"), Some(v)) => draw.jitter = vec![ColourOp::Saturation(v as f32)],
            (Some("hue"), Some(v)) => draw.jitter = vec![ColourOp::Hue(v as f32)],
            (Some("blur"), Some(v)) => draw.blur = Some(v),
            (Some("gray"), None) => draw.grayscale = true,
            (Some("solarize"), None) => draw.solarize = true,
            _ => continue,
        }
        // torchvision computes in f64 here. Its gray has other decimals on tensors than on PIL images, which are what
        // training uses: up to 1e-4. PIL rounds to 8 bits after each of its steps; it has 256 hues, and cuts a rotation
        // to a whole number of them (0.1 to 25 of 255).
        let (definition, scale, tolerance) = match (words[0], words[1]) {
            ("byol", _) => (Definition::Byol, 1.0, 2e-6),
            ("torchvision", "contrast" | "saturation") => (Definition::Torchvision, 1.0, 1e-4),
            ("torchvision", _) => (Definition::Torchvision, 1.0, 2e-6),
            ("pil", "hue") => (Definition::Torchvision, 1.0 / 255.0, 12.0 / 255.0),
            ("pil", _) => (Definition::Torchvision, 1.0 / 255.0, 1.01 / 255.0),
            other => panic!("{other:?}"),
        };
        let found = difference(&make(definition, &draw), expected, scale);
        println!("{name:<28} {found:.2e} (tolerance {tolerance:.0e})");
        assert!(found <= tolerance, "{name}: {found}");
        checked += 1;
    }
    assert_eq!(checked, 35, "operations in the fixture");
}

#[test]
fn a_composed_view() {
    let arrays = arrays();
    let source = image(&arrays["image"], SIZE, SIZE);
    let mut settings = views(Definition::Byol, SIZE);
    (settings.mean, settings.std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let augmenter = Augmenter::new(&settings);
    let draw = ViewDraw {
        flip: true,
        jitter: vec![
            ColourOp::Hue(0.07),
            ColourOp::Contrast(1.4),
            ColourOp::Brightness(0.1),
            ColourOp::Saturation(0.8),
        ],
        blur: Some(1.3),
        solarize: true,
        ..plain()
    };
    let mut out = vec![f32::NAN; augmenter.view_len()];
    augmenter.apply(&mut Scratch::default(), &source, &draw, &mut out);
    // Solarizing jumps at 0.5: where the blur comes within rounding of it the two may fall to different sides.
    let expected = &arrays["byol composed"];
    let far = out.iter().zip(expected).filter(|(a, b)| (f64::from(**a) - **b).abs() > 2e-5).count();
    println!("composed: {far} of {} values differ by more than 2e-5", out.len());
    assert!(far <= 2, "{far}");
}

#[test]
fn resize_is_pillows_but_for_the_order_of_passes() {
    let arrays = arrays();
    let source = image(&arrays["wide"], 90, 61);
    for at in 0..3 {
        let sides = &arrays[&format!("box {at}")];
        let crop = CropBox {
            x: sides[0] as u32,
            y: sides[1] as u32,
            width: sides[2] as u32,
            height: sides[3] as u32,
        };
        for (name, how) in [("bicubic", Interpolation::Bicubic), ("bilinear", Interpolation::Bilinear)] {
            let mut settings = views(Definition::Byol, SIZE);
            settings.resize = how;
            let augmenter = Augmenter::new(&settings);
            let mut out = vec![f32::NAN; augmenter.view_len()];
            augmenter.apply(&mut Scratch::default(), &source, &ViewDraw { crop, ..plain() }, &mut out);
            let expected = &arrays[&format!("pil {name} {at}")];
            let largest = difference(&out, expected, 1.0 / 255.0) * 255.0;
            let mean = out.iter().zip(expected).map(|(a, b)| (f64::from(*a) * 255.0 - b).abs()).sum::<f64>()
                / out.len() as f64;
            println!("{name} {at}: largest {largest:.2}, mean {mean:.3} of 255");
            // Pillow rounds and clips after its horizontal pass, this after its vertical one: that shows where a cubic
            // overshoots, beside the corners of the picture.
            let limit = if how == Interpolation::Bicubic { 8.01 } else { 1.01 };
            assert!(largest <= limit && mean < 0.3, "{name} {at}: {largest} {mean}");
        }
    }
}

#[test]
fn crop_boxes() {
    let arrays = arrays();
    for (name, definition) in [("byol", Definition::Byol), ("torchvision", Definition::Torchvision)] {
        let augmenter = Augmenter::new(&views(definition, SIZE));
        let rows = &arrays[&format!("{name} crops")];
        assert_eq!(rows.len(), 24 * 7 * 7);
        for row in rows.chunks_exact(7) {
            let [sample, width, height, x, y, w, h] = std::array::from_fn(|i| row[i] as u32);
            let key = ViewKey { seed: 5, epoch: 3, sample: u64::from(sample), view: (sample % 2) as u8 };
            let crop = augmenter.draw(width, height, key).crop;
            // TensorFlow has no crop without pixels; DeepMind's code would fail there.
            let expected = CropBox { x, y, width: w.max(1), height: h.max(1) };
            if w == 0 || h == 0 {
                assert_eq!((crop.width, crop.height), (expected.width, expected.height));
            } else {
                assert_eq!(crop, expected, "{name} {sample} {width}x{height}");
            }
        }
    }
}

fn crc32(bytes: &[u8]) -> u64 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    u64::from(crc.sum())
}

#[test]
fn jpeg_pixels_are_libjpeg_turbos() {
    are_as_listed("jpeg", 42);
}

/// TIFF, BMP, PPM and PGM; of 16 bits the high byte.
#[test]
fn other_files_are_pillows_pixels() {
    are_as_listed("files", 54);
}

/// What becomes RGB by a range of values or a choice of bands, and by nothing else.
#[test]
fn deep_files_are_taken_as_told() {
    let text = std::fs::read_to_string(fixtures().join("deep.json")).unwrap();
    let files: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(files.len(), 11);
    for (name, expected) in &files {
        let bytes = std::fs::read(fixtures().join("deep").join(name)).unwrap();
        let reading = Reading {
            range: serde_json::from_value(expected["range"].clone()).unwrap(),
            bands: serde_json::from_value(expected["bands"].clone()).unwrap(),
        };
        let mut image = RgbImage::default();
        Decoder::new(reading)
            .decode(Encoding::File, &bytes, &mut image)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((image.width, image.height), (37, 29), "{name}");
        assert_eq!(crc32(&image.data), expected["crc32"], "{name}");
        let untold = decode(&bytes).map(|image| crc32(&image.data));
        assert_ne!(untold, Ok(crc32(&image.data)), "{name}");
    }
}

/// Decodes the `count` files of a folder that the JSON file beside it lists with sizes and checksums.
fn are_as_listed(folder: &str, count: usize) {
    let text = std::fs::read_to_string(fixtures().join(folder).with_extension("json")).unwrap();
    let files: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_str(&text).unwrap();
    assert_eq!(files.len(), count);
    for (name, expected) in &files {
        let bytes = std::fs::read(fixtures().join(folder).join(name)).unwrap();
        let image = decode(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            (u64::from(image.width), u64::from(image.height), crc32(&image.data)),
            (expected["width"], expected["height"], expected["crc32"]),
            "{name}"
        );
    }
}

/// A region has the pixels of the whole, with every sampling, restart interval and orientation.
#[test]
fn a_part_is_the_part_of_the_whole() {
    let mut names: Vec<_> = std::fs::read_dir(fixtures().join("jpeg"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("37x29") || path.to_string_lossy().contains("16x16"))
        .collect();
    names.sort();
    let mut decoder = Decoder::default();
    let (mut planes, mut part) = (PlanarImage::default(), RgbImage::default());
    for path in names {
        let bytes = std::fs::read(&path).unwrap();
        let whole = decode(&bytes).unwrap();
        for case in 0..80u32 {
            let pick = |k: u32, n: u32| common::noise(1, u64::from(case * 7 + k) + 1)[0] as u32 % n;
            let (x, y) = (pick(1, whole.width), pick(2, whole.height));
            let (width, height) = (1 + pick(3, whole.width - x), 1 + pick(4, whole.height - y));
            let region = CropBox { x, y, width, height };
            decoder.open(Encoding::File, &bytes).unwrap().part(region, &mut planes).unwrap();
            planes.to_rgb(&mut part);
            let expected: Vec<u8> = (y..y + height)
                .flat_map(|y| {
                    let at = ((y * whole.width + x) * 3) as usize;
                    whole.data[at..at + 3 * width as usize].to_vec()
                })
                .collect();
            assert_eq!(part.data, expected, "{} {region:?}", path.display());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    /// Both views made from the part that their crops share are those made from the whole image.
    #[test]
    fn views_of_the_shared_part(seed: u64, sample in 0u64..1000, torchvision: bool, file in 0usize..6) {
        let names = ["37x29-420", "37x29-444-rows", "37x29-422", "37x29-440", "37x29-420-progressive", "37x29-exif6"];
        let bytes = std::fs::read(fixtures().join("jpeg").join(format!("{}.jpg", names[file]))).unwrap();
        let whole = decode(&bytes).unwrap();
        let definition = if torchvision { Definition::Torchvision } else { Definition::Byol };
        let augmenter = Augmenter::new(&views(definition, 24));
        let draws = [0, 1].map(|view| augmenter.draw(whole.width, whole.height, ViewKey { seed, epoch: 1, sample, view }));
        let mut planes = PlanarImage::default();
        let union = draws[0].crop.union(draws[1].crop);
        Decoder::default().open(Encoding::File, &bytes).unwrap().part(union, &mut planes).unwrap();
        for draw in &draws {
            let (mut a, mut b) = (vec![0.0; augmenter.view_len()], vec![1.0; augmenter.view_len()]);
            augmenter.apply(&mut Scratch::default(), &whole, draw, &mut a);
            augmenter.apply_part(&mut Scratch::default(), &planes, draw, &mut b);
            prop_assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}
