//! What a device's kernel makes of directions is what the loader makes, to the last bit: the kernel runs on the processor here.

mod common;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{Memory, noise, png, views};
use mentee_config::recipe::{Definition, Interpolation, Views};
use mentee_data::directions::{Director, HEAD};
use mentee_data::held::{Held, NotHeld};
use mentee_data::{Loader, LoaderConfig, OnError, Order};

/// Compiles the kernel with what stands in for a device.
fn kernel() -> std::path::PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../torch-ext/tests/kernels/views.cpp");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("views");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut compile = Command::new(&compiler);
    compile.args(["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-o"]).arg(&program).arg(&source);
    let compiled = compile.output().unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    program
}

/// Images of all shapes, with gray, black, white and saturated pixels among the noise.
fn images() -> Arc<Memory> {
    let sides = [(32, 32), (7, 50), (61, 9), (1, 1), (40, 40), (3, 128), (90, 90), (33, 32)];
    let files = sides.into_iter().zip(0..).map(|((width, height), seed)| {
        let mut bytes = noise((width * height * 3) as usize, seed);
        let corners = [[0; 3], [255; 3], [90; 3], [255, 0, 0], [0, 0, 255], [255, 255, 0], [9, 9, 8]];
        for (pixel, corner) in bytes.chunks_exact_mut(3).step_by(3).zip(corners) {
            pixel.copy_from_slice(&corner);
        }
        png(width, height, png::ColorType::Rgb, png::BitDepth::Eight, &bytes)
    });
    of(files.collect())
}

fn of(files: Vec<Vec<u8>>) -> Arc<Memory> {
    Arc::new(Memory { labels: vec![None; files.len()], files, classes: Vec::new() })
}

fn config(source: Arc<Memory>, views: Views) -> LoaderConfig {
    LoaderConfig {
        order: Order::new(5, 8, 4),
        source,
        views,
        seed: 5,
        rank_share: 1..4,
        first_step: 3,
        last_step: 13,
        threads: 2,
        queue_steps: 2,
        on_error: OnError::Fail,
    }
}

fn held(source: &Memory) -> Held {
    Held::load(source, u64::MAX, 2, &AtomicBool::new(false)).expect("images that can be decoded")
}

#[test]
fn a_device_makes_the_views_that_the_loader_makes() {
    let kernel = kernel();
    let source = images();
    let mut said = String::new();
    for (definition, size, resize, noisy) in [
        (Definition::Byol, 37, Interpolation::Bicubic, false),
        (Definition::Torchvision, 32, Interpolation::Bilinear, false),
        (Definition::Torchvision, 45, Interpolation::Bicubic, true),
        (Definition::Byol, 24, Interpolation::Bilinear, true),
    ] {
        // Every step of the augmentation in some views, and each of them without in others.
        let usual = views(definition, size);
        let views = Views {
            definition,
            size,
            resize,
            crop_area: [0.05, 1.0],
            flip: 0.5,
            jitter: 0.8,
            brightness: 0.4,
            contrast: if noisy { 0.0 } else { 0.4 },
            saturation: 0.4,
            hue: 0.2,
            grayscale: 0.3,
            blur: [0.7, 0.4],
            blur_sigma: [0.1, 2.0],
            solarize: [0.2, 0.4],
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            ..usual
        };
        let config = config(source.clone(), views.clone());
        let Held { images, pixels } = held(&source);
        let mut director = Director::new(config.clone(), images.clone());
        let mut loader = Loader::new(config).unwrap();
        // All steps as one launch: what is told of places moves along.
        let (mut heads, mut rest, mut expected, mut steps) = (Vec::new(), Vec::new(), Vec::new(), 0);
        while let Some(batch) = loader.next().unwrap() {
            let directed = director.step(batch.step).expect("as many steps as the loader has");
            assert_eq!((directed.epoch, &directed.ids), (batch.epoch, &batch.ids));
            let count = 2 * batch.ids.len() * HEAD;
            heads.push((directed.words[..count].to_vec(), rest.len() as i32 - count as i32));
            rest.extend_from_slice(&directed.words[count..]);
            expected.extend_from_slice(&batch.views);
            steps += 1;
        }
        assert_eq!((steps, director.step(13)), (10, None));
        let all: i32 = heads.iter().map(|(head, _)| head.len() as i32).sum();
        let mut words = Vec::new();
        for (mut head, behind) in heads {
            for view in head.chunks_exact_mut(HEAD) {
                for place in [5, 6, 9, 10, 24] {
                    view[place] += behind + all;
                }
            }
            words.extend(head);
        }
        words.extend(rest);

        let mut file = Vec::new();
        let views_made = all as usize / HEAD;
        for n in [size as usize, images.widest as usize, views_made, words.len(), pixels.len(), HEAD] {
            file.extend((n as i64).to_le_bytes());
        }
        file.extend(views.mean.iter().flat_map(|&mean| (mean as f32).to_le_bytes()));
        file.extend(views.std.iter().flat_map(|&std| ((1.0 / std) as f32).to_le_bytes()));
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        file.extend(&pixels);
        file.extend(expected.iter().flat_map(|value| value.to_le_bytes()));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("views.bin");
        std::fs::write(&path, file).unwrap();
        let done = Command::new(&kernel).arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success(), "{definition:?} {size}: {text}");
        writeln!(said, "{text}").unwrap();
    }
    assert_eq!(said.matches("60 views of").count(), 4, "{said}");
}

#[test]
fn a_set_is_held_only_whole() {
    let source = images();
    let Held { images, pixels } = held(&source);
    assert_eq!(images.widest, 90);
    for (id, size) in images.sizes.iter().enumerate() {
        let image = mentee_data::decode(&source.files[id]).unwrap();
        let bytes = size.first as usize..size.first as usize + 3 * (size.width * size.height) as usize;
        assert_eq!(pixels[bytes], image.data);
    }
    let load = |source: &Memory, limit, stop| Held::load(source, limit, 2, &AtomicBool::new(stop));
    let bytes = pixels.len() as u64;
    assert_eq!(load(&source, bytes, false).unwrap().pixels.len(), pixels.len());
    let said = load(&source, bytes - 1, false).unwrap_err().to_string();
    assert_eq!(said, "its images have 0 MiB of pixels or more");
    assert!(matches!(load(&source, bytes, true), Err(NotHeld::Stopped)));

    // The one damaged image is none of those that are looked at first.
    let mut files = vec![source.files[0].clone(); 1000];
    files[555].truncate(50);
    let said = load(&of(files), u64::MAX, false).unwrap_err().to_string();
    assert_eq!(said, "memory:555: truncated PNG: the file ends before the image does");
}
