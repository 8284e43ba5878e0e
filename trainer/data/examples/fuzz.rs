//! Feeds damaged files to everything that reads files: `fuzz TARGET [EXECUTIONS] [SEED]`, TARGET one of jpeg, image, tiff, tar, index.
//!
//! Starts from small valid files and the hostile ones of the tests, changes, cuts, repeats and splices bytes, and counts what is
//! accepted and refused. A panic or an execution of more than five seconds ends it and leaves the file in `fuzz-TARGET.bin`.
//! Deterministic: the same seed does the same.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use mentee_config::recipe::DataFormat;
use mentee_data::decode::{CropBox, Decoder, PlanarImage, Reading};
use mentee_data::rng::{Sequence, Stream};
use mentee_data::{Encoding, open};

/// A file as the fuzzer's target takes it; whether it was accepted.
type Target = Box<dyn FnMut(&[u8]) -> bool>;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let target = arguments.get(1).map_or("jpeg", String::as_str);
    let number =
        |at: usize, default: u64| arguments.get(at).map_or(default, |text| text.parse().expect("a number"));
    let (executions, seed) = (number(2, 1_000_000), number(3, 1));
    let fixtures = |folder: &str, ending: &str| -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder);
        let mut paths: Vec<_> = std::fs::read_dir(&folder)
            .expect("fixtures")
            .map(|entry| entry.expect("readable").path())
            .filter(|path| path.to_string_lossy().contains(ending))
            .collect();
        paths.sort();
        paths.into_iter().map(|path| std::fs::read(path).expect("readable")).collect()
    };
    let (mut seeds, mut run): (Vec<Vec<u8>>, Target) = match target {
        "jpeg" => (fixtures("jpeg", ".jpg"), Box::new(image())),
        "image" => {
            ([other_images(), fixtures("files", ".bmp"), fixtures("files", ".p")].concat(), Box::new(image()))
        }
        "tiff" => (fixtures("files", ".tif"), Box::new(image())),
        "tar" => (tars(), Box::new(in_folder("00000.tar"))),
        "index" => (indices(), Box::new(in_folder("index.json"))),
        other => panic!("no target {other}: one of jpeg, image, tiff, tar, index"),
    };
    for file in &seeds {
        run(file);
    }
    let started = Instant::now();
    let (mut accepted, mut slowest) = (0u64, Duration::ZERO);
    std::panic::set_hook(Box::new(|_| {}));
    for execution in 0..executions {
        let mut draws = Sequence::new(Stream::new(seed, execution >> 32, execution, 0));
        let file = mutated(&seeds, &mut draws);
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&file)));
        let took = began.elapsed();
        slowest = slowest.max(took);
        if outcome.is_err() || took > Duration::from_secs(5) {
            let name = format!("fuzz-{target}.bin");
            std::fs::write(&name, &file).expect("writable");
            println!("execution {execution}: {outcome:?} after {took:?}: see {name}");
            std::process::exit(1);
        }
        if outcome.is_ok_and(|ok| ok) {
            accepted += 1;
            // What is still a file is worth changing further.
            if seeds.len() < 500 && draws.below(50) == 0 {
                seeds.push(file);
            }
        }
    }
    println!(
        "{target}: {executions} executions in {:.0} s, {accepted} accepted, the rest refused; no crash, no hang; slowest {slowest:?}",
        started.elapsed().as_secs_f64()
    );
}

/// Decodes a part, with and without a range and bands; a large image only by its header, since it is slow for an honest reason.
fn image() -> impl FnMut(&[u8]) -> bool {
    let mut plain = part_of(Decoder::default());
    let reading = Reading { range: Some([-10.0, 900.5]), bands: Some([3, 1, 2]) };
    let mut told = part_of(Decoder::new(reading));
    move |file| plain(file) | told(file)
}

fn part_of(mut decoder: Decoder) -> impl FnMut(&[u8]) -> bool {
    let mut planes = PlanarImage::default();
    move |file| {
        let Ok(opened) = decoder.open(Encoding::File, file) else { return false };
        let (width, height) = (opened.width, opened.height);
        let side = if u64::from(width) * u64::from(height) > 1 << 16 { 16 } else { u32::MAX };
        let part = CropBox {
            x: width / 3,
            y: height / 3,
            width: (width - width / 3).min(side),
            height: (height - height / 3).min(side),
        };
        opened.part(part, &mut planes).is_ok()
    }
}

/// Opens a folder in memory whose other files are valid, and reads all of its samples.
fn in_folder(name: &'static str) -> impl FnMut(&[u8]) -> bool {
    let base =
        if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm").to_owned() } else { std::env::temp_dir() };
    let dir = base.join(format!("mentee-fuzz-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("writable");
    if name == "index.json" {
        std::fs::write(dir.join("00000.tar"), &tars()[0]).expect("writable");
    }
    let mut buffer = Vec::new();
    move |file| {
        std::fs::write(dir.join(name), file).expect("writable");
        let Ok(source) = open(&dir, DataFormat::Tar) else { return false };
        for index in 0..source.len().min(64) {
            let _ = (source.key(index), source.label(index));
            let _ = source.read_into(index, &mut buffer);
        }
        let _ = (source.digest(), source.shards(), source.classes().len());
        true
    }
}

fn other_images() -> Vec<Vec<u8>> {
    let pixels: Vec<u8> = (0..12 * 9 * 4).map(|i| (i * 37 % 251) as u8).collect();
    let mut files = Vec::new();
    for (color, channels) in
        [(png::ColorType::Rgb, 3), (png::ColorType::Rgba, 4), (png::ColorType::Grayscale, 1)]
    {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 12, 9);
        encoder.set_color(color);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().expect("valid");
        writer.write_image_data(&pixels[..12 * 9 * channels]).expect("valid");
        writer.finish().expect("valid");
        files.push(bytes);
    }
    for color in [image_webp::ColorType::Rgb8, image_webp::ColorType::Rgba8] {
        let mut bytes = Vec::new();
        let channels = if color == image_webp::ColorType::Rgb8 { 3 } else { 4 };
        image_webp::WebPEncoder::new(&mut bytes)
            .encode(&pixels[..12 * 9 * channels], 12, 9, color)
            .expect("valid");
        files.push(bytes);
    }
    files.push([b"P6\n12 9\n255\n", &pixels[..12 * 9 * 3]].concat());
    files
}

fn header(name: &[u8], size: &[u8], kind: u8) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name);
    header[100..107].copy_from_slice(b"0000644");
    header[124..124 + size.len()].copy_from_slice(size);
    header[148..156].fill(b' ');
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn member(name: &[u8], size: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, size, kind);
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Tar files: good ones, and each kind of hostile header.
fn tars() -> Vec<Vec<u8>> {
    let good = [
        member(b"00000000.jpg", b"00000000004", b'0', b"\xFF\xD8\xFF\xD9"),
        member(b"00000000.cls", b"00000000001", b'0', b"3"),
        member(b"a/b.png", b"00000000003", b'0', b"abc"),
        vec![0; 1024],
    ]
    .concat();
    let hostile: [Vec<u8>; 9] = [
        member(b"../../etc/passwd.jpg", b"00000000003", b'0', b"abc"),
        member(b"/etc/passwd.jpg", b"00000000003", b'0', b"abc"),
        member(b"link.jpg", b"00000000000", b'2', b""),
        member(b"huge.jpg", b"77777777777", b'0', b"abc"),
        member(b"huge.jpg", b"\x80\0\0\0\x7F\xFF\xFF\xFF\xFF\xFF\xFF\xFF", b'0', b"abc"),
        member(b"negative.jpg", b"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", b'0', b"abc"),
        [
            member(b"././@LongLink", b"00000000170", b'L', &[b'x'; 120]),
            member(b"short.jpg", b"00000000003", b'0', b"abc"),
        ]
        .concat(),
        [
            member(b"pax", b"00000000030", b'x', b"12 size=99\n12 path=a.b\n"),
            member(b"short.jpg", b"00000000003", b'0', b"abc"),
        ]
        .concat(),
        member(b"x.cls", b"00000000020", b'0', b"99999999999999999999"),
    ];
    hostile
        .into_iter()
        .map(|bytes| [bytes, good.clone()].concat())
        .chain([good.clone()])
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect()
}

fn indices() -> Vec<Vec<u8>> {
    let bytes = tars()[0].len();
    let index = |offsets: &str, lengths: &str, labels: &str| {
        format!(
            r#"{{"format":"mentee-shards","version":1,"classes":["a","b"],"shards":[{{"file":"00000.tar","bytes":{bytes},"blake3":"00","offsets":[{offsets}],"lengths":[{lengths}],"labels":[{labels}]}}]}}"#
        )
        .into_bytes()
    };
    vec![
        index("512,2560", "4,3", "3,null"),
        index("18446744073709551615", "4294967295", "4294967295"),
        index("", "", ""),
        index("0,0,0,0", "1,1,1,1", "0,0,0,0"),
    ]
}

/// One of the files, changed in one to eight places.
fn mutated(seeds: &[Vec<u8>], draws: &mut Sequence) -> Vec<u8> {
    let mut file = seeds[draws.below(seeds.len() as u64) as usize].clone();
    for _ in 0..1 + draws.below(8) {
        if file.is_empty() {
            break;
        }
        let at = draws.below(file.len() as u64) as usize;
        match draws.below(9) {
            0 => file[at] ^= 1 << draws.below(8),
            1 => file[at] = draws.below(256) as u8,
            2 => file[at] = [0, 0xFF, 0x7F, 0x80, b'9'][draws.below(5) as usize],
            3 => file.truncate(at),
            4 => {
                let end = (at + draws.below(40) as usize).min(file.len());
                file.drain(at..end);
            }
            5 => {
                let end = (at + draws.below(40) as usize).min(file.len());
                let part = file[at..end].to_vec();
                let to = draws.below(file.len() as u64) as usize;
                file.splice(to..to, part);
            }
            6 => {
                let other = &seeds[draws.below(seeds.len() as u64) as usize];
                let from = draws.below(other.len() as u64 + 1) as usize;
                file.truncate(at);
                file.extend_from_slice(&other[from..]);
            }
            7 if file.len() >= at + 4 => {
                let number =
                    [0u32, 1, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x0001_0000][draws.below(6) as usize];
                file[at..at + 4].copy_from_slice(&number.to_be_bytes());
            }
            _ => file.insert(at, draws.below(256) as u8),
        }
    }
    // A tar's checksum would hide what comes after it.
    if draws.chance(0.8) && file.len() >= 512 && file.get(257..262) == Some(b"ustar") {
        for block in file.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    // The end marker is asked for before anything else is.
    if draws.chance(0.9) && file.starts_with(&[0xFF, 0xD8]) {
        file.extend([0xFF, 0xD9]);
    }
    file
}
