//! Shards: what is written is what is read; altered ones are found; a failed write leaves nothing.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Memory, jpeg, rgb_png};
use mentee_config::recipe::DataFormat;
use mentee_data::decode::{Decoder, Reading, RgbImage};
use mentee_data::shard::{
    INDEX_FILE, ShardOptions, Store, Written, forget_part, write_part, write_shards, write_shards_with,
};
use mentee_data::{DataError, Encoding, Source, check, decode, open};
use tempfile::TempDir;

fn quiet() -> impl FnMut(u64, u64) {
    |_, _| {}
}

fn written(n: u64) -> (TempDir, std::path::PathBuf, Arc<Memory>) {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("shards");
    let source = Memory::noise(n);
    write_shards(&*source, &out, 6000, &mut quiet()).unwrap();
    (dir, out, source)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn round_trip_with_and_without_the_index() {
    let (dir, out, source) = written(40);
    assert_eq!(names(dir.path()), ["shards"], "no temporaries stay");
    let files = names(&out);
    assert!(files.len() > 3 && files[0] == "00000.tar" && files[files.len() - 1] == INDEX_FILE, "{files:?}");
    let same = |read: &dyn Source| {
        assert_eq!(read.len(), 40);
        for i in 0..40 {
            assert_eq!(read.read(i).unwrap().bytes, source.files[i as usize]);
            assert_eq!(read.label(i), source.labels[i as usize]);
            assert!(read.key(i).ends_with(&format!(".tar:{i:08}")), "{}", read.key(i));
        }
    };
    let indexed = open(&out, DataFormat::Auto).unwrap();
    same(&*indexed);
    assert_eq!(indexed.classes(), ["a", "b", "c"]);
    let index = fs::read(out.join(INDEX_FILE)).unwrap();
    fs::remove_file(out.join(INDEX_FILE)).unwrap();
    same(&*open(&out, DataFormat::Tar).unwrap());
    fs::write(out.join(INDEX_FILE), index).unwrap();

    // Shards of shards, and the same bytes every time.
    let again = dir.path().join("again");
    let summary = write_shards(&*indexed, &again, 6000, &mut quiet()).unwrap();
    assert_eq!(summary.digest, indexed.digest());
    for file in names(&out) {
        assert_eq!(fs::read(out.join(&file)).unwrap(), fs::read(again.join(&file)).unwrap(), "{file}");
    }
    let (bytes, shards) = indexed.stored();
    assert_eq!((summary.samples, summary.shards), (40, shards));
    assert_eq!(bytes, source.files.iter().map(|f| f.len() as u64).sum::<u64>());
}

#[test]
fn any_tar_reads_what_was_written() {
    let (_dir, out, source) = written(5);
    let list = std::process::Command::new("tar").arg("-tvf").arg(out.join("00000.tar")).output();
    let list = list.expect("the program tar");
    assert!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    let first = text.lines().next().unwrap();
    assert!(first.starts_with("-rw-r--r--") && first.ends_with("00000000.png"), "{first}");
    assert!(first.contains(&source.files[0].len().to_string()), "{first}");
    assert!(text.contains("00000000.cls"));
}

#[test]
fn raw_pixels_become_png() {
    struct Raw;
    impl Source for Raw {
        fn len(&self) -> u64 {
            3
        }
        fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
            *buffer = common::noise(5 * 4 * 3, index + 1);
            Ok(Encoding::Raw { width: 5, height: 4 })
        }
        fn label(&self, _: u64) -> Option<u32> {
            None
        }
        fn key(&self, index: u64) -> String {
            index.to_string()
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
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let mut heard = Vec::new();
    write_shards(&Raw, &out, 1 << 20, &mut |done, total| heard.push((done, total))).unwrap();
    assert_eq!(heard.last(), Some(&(3, 3)));
    let source = open(&out, DataFormat::Auto).unwrap();
    assert_eq!((source.label(0), source.classes().len()), (None, 0));
    for i in 0..3 {
        let image = decode(&source.read(i).unwrap().bytes).unwrap();
        assert_eq!((image.width, image.height, image.data), (5, 4, common::noise(60, i + 1)));
    }
}

#[test]
fn every_format_goes_into_shards_as_it_is() {
    let dir = TempDir::new().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files");
    let source = open(&folder, DataFormat::Auto).unwrap();
    assert_eq!(source.len(), fs::read_dir(&folder).unwrap().count() as u64, "all are images of the set");
    let out = dir.path().join("out");
    write_shards(&*source, &out, 1 << 20, &mut quiet()).unwrap();
    let indexed = open(&out, DataFormat::Auto).unwrap();
    fs::remove_file(out.join(INDEX_FILE)).unwrap();
    let bare = open(&out, DataFormat::Auto).unwrap();
    for i in 0..source.len() {
        let file = source.read(i).unwrap().bytes;
        assert!(decode(&file).is_ok(), "{}", source.key(i));
        assert_eq!(indexed.read(i).unwrap().bytes, file);
        assert_eq!(bare.read(i).unwrap().bytes, file);
    }
    let tar = fs::read(out.join("00000.tar")).unwrap();
    for extension in ["tif", "bmp", "ppm", "pgm"] {
        let end = format!(".{extension}\0");
        assert!(tar.windows(5).any(|name| name == end.as_bytes()), "{extension}");
    }
}

#[test]
fn images_too_large_to_be_read_are_not_stored() {
    let small = jpeg(16, 8, false, jpeg_encoder::ColorType::Rgb);
    let frame = small.windows(2).position(|pair| matches!(pair, [0xFF, 0xC0 | 0xC1])).unwrap();
    let mut large_jpeg = small.clone();
    large_jpeg[frame + 5..frame + 9].copy_from_slice(&20_000u16.to_be_bytes().repeat(2)); // height, width
    let mut large_png = rgb_png(2, 2, 1);
    large_png[16..24].copy_from_slice(&20_000u32.to_be_bytes().repeat(2));
    for large in [large_jpeg, large_png] {
        let source = Memory { files: vec![small.clone(), large], labels: vec![None; 2], classes: vec![] };
        let dir = TempDir::new().unwrap();
        let refused = write_shards(&source, &dir.path().join("out"), 1 << 20, &mut quiet()).unwrap_err();
        assert!(refused.to_string().contains("20000 x 20000 pixels, more than 100 megapixels"), "{refused}");
        assert_eq!(names(dir.path()), [""; 0]);
    }
}

#[test]
fn deep_images_are_stored_as_told_and_others_as_they_are() {
    let dir = TempDir::new().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let photo = folder.join("jpeg/16x16-444.jpg");
    let set = dir.path().join("set");
    fs::create_dir(&set).unwrap();
    fs::copy(&photo, set.join("a.jpg")).unwrap();
    fs::copy(folder.join("files/rgb-raw.tif"), set.join("b.tif")).unwrap();
    fs::copy(folder.join("deep/grey12.png"), set.join("c.png")).unwrap();
    fs::copy(folder.join("deep/signed16.tif"), set.join("d.tif")).unwrap();
    let source = open(&set, DataFormat::Auto).unwrap();
    let refused = write_shards(&*source, &dir.path().join("no"), 1 << 20, &mut quiet()).unwrap_err();
    let reason = "d.tif: TIFF with signed numbers of 16 bits is not read: tell `mentee shard` the values that count (--range \
                  LOW:HIGH) (`mentee data verify` finds all such)";
    assert!(refused.to_string().ends_with(reason), "{refused}");

    let reading = Reading { range: Some([-1000.0, 400.0]), bands: None };
    let options = ShardOptions { reading, ..OPTIONS };
    let out = dir.path().join("out");
    write_shards_with(&*source, &out, &options, &mut quiet()).unwrap();
    let shards = open(&out, DataFormat::Auto).unwrap();
    assert_eq!(shards.read(0).unwrap().bytes, fs::read(&photo).unwrap());
    assert_eq!(shards.read(1).unwrap().bytes, source.read(1).unwrap().bytes);
    for i in 2..4 {
        let mut told = RgbImage::default();
        Decoder::new(reading).decode(Encoding::File, &source.read(i).unwrap().bytes, &mut told).unwrap();
        let stored = shards.read(i).unwrap().bytes;
        assert!(stored.starts_with(b"\x89PNG"));
        assert_eq!(decode(&stored).unwrap(), told);
    }
    let index = fs::read_to_string(out.join(INDEX_FILE)).unwrap();
    assert!(index.contains("values -1000 to 400 of deep images as 0 to 255"), "{index}");
    // Shards of these shards know of it.
    write_shards(&*shards, &dir.path().join("onward"), 1 << 20, &mut quiet()).unwrap();
    let index = fs::read_to_string(dir.path().join("onward").join(INDEX_FILE)).unwrap();
    assert!(index.contains("values -1000 to 400 of deep images as 0 to 255"), "{index}");
    // Pixels made anew are taken so too.
    let raw = ShardOptions { store: Store::Raw { shorter_side: None }, ..options };
    write_shards_with(&*source, &dir.path().join("raw"), &raw, &mut quiet()).unwrap();
    let again = open(&dir.path().join("raw"), DataFormat::Auto).unwrap();
    assert_eq!(decode(&again.read(3).unwrap().bytes), decode(&shards.read(3).unwrap().bytes));
}

#[test]
fn a_failed_write_leaves_nothing_and_nothing_is_overwritten() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let bad = Memory {
        files: vec![rgb_png(3, 3, 1), jpeg(8, 8, false, jpeg_encoder::ColorType::Rgb), b"GIF89a".to_vec()],
        labels: vec![None; 3],
        classes: vec![],
    };
    let error = write_shards(&bad, &out, 1 << 20, &mut quiet()).unwrap_err();
    assert_eq!(
        error,
        DataError::BadSample {
            sample: "memory:2".to_owned(),
            reason: "none of JPEG, PNG, WebP, TIFF, BMP, PPM and PGM (it starts with 47 49 46 38)".to_owned()
        }
    );
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
    // What a killed writer left is replaced; an empty folder is used; a full one is left alone.
    fs::create_dir_all(dir.path().join(".out.partial")).unwrap();
    fs::write(dir.path().join(".out.partial/00007.tar"), b"half").unwrap();
    fs::create_dir_all(&out).unwrap();
    let good = Memory::noise(2);
    write_shards(&*good, &out, 1 << 20, &mut quiet()).unwrap();
    assert_eq!(names(&out), ["00000.tar", INDEX_FILE]);
    assert_eq!(names(dir.path()), ["out"]);
    let error = write_shards(&*good, &out, 1 << 20, &mut quiet()).unwrap_err();
    assert!(
        error.to_string().ends_with("already exists and is not empty: choose another folder or remove it")
    );
    assert_eq!(open(&out, DataFormat::Auto).unwrap().len(), 2);
}

#[test]
fn a_false_index_is_refused() {
    let (_dir, out, _) = written(10);
    let path = out.join(INDEX_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let refuse = |changed: String, expected: &str| {
        assert_ne!(changed, text);
        fs::write(&path, changed).unwrap();
        let message = open(&out, DataFormat::Auto).err().unwrap().to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    };
    refuse(text[..text.len() / 2].to_owned(), "index.json`: not an index of shards");
    refuse(
        text.replace("\"version\":1", "\"version\":2"),
        "version 2, this program reads mentee-shards version 1",
    );
    refuse(text.replace("00000.tar", "../00000.tar"), "is not a plain file name");
    refuse(
        text.replacen("\"offsets\":[512", "\"offsets\":[99999999", 1),
        "an image beyond the end of the shard",
    );
    refuse(text.replacen("\"offsets\":[512,", "\"offsets\":[", 1), "differ in number");
    refuse(
        text.replacen("\"labels\":[0", "\"labels\":[1048576", 1),
        "label 1048576, and 1048575 is the largest",
    );
    refuse(text.replace("00001.tar", "00009.tar"), "cannot open");
    fs::write(&path, &text).unwrap();
    assert!(open(&out, DataFormat::Auto).is_ok());
    let shard = out.join("00000.tar");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 512]).unwrap();
    let message = open(&out, DataFormat::Auto).err().unwrap().to_string();
    assert!(message.contains("00000.tar") && message.contains("truncated or replaced"), "{message}");
}

#[test]
fn verify_finds_everything() {
    let (_dir, out, source) = written(40);
    let report = check::verify(&out, DataFormat::Auto, 2, &|_, _| {}).unwrap();
    assert_eq!((report.samples, report.problems), (40, vec![]));
    // A changed byte in an image of the first shard, a second shard cut short, a third one gone.
    let place = |name: &str| out.join(name);
    let mut bytes = fs::read(place("00000.tar")).unwrap();
    bytes[512 + source.files[0].len() / 2] ^= 1;
    fs::write(place("00000.tar"), &bytes).unwrap();
    let bytes = fs::read(place("00001.tar")).unwrap();
    fs::write(place("00001.tar"), &bytes[..2000]).unwrap();
    fs::remove_file(place("00002.tar")).unwrap();
    let report = check::verify(&out, DataFormat::Auto, 2, &|_, _| {}).unwrap();
    let has = |parts: &[&str]| {
        let found = report.problems.iter().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "{parts:?} in {:#?}", report.problems);
    };
    has(&["00000.tar`", "do not match the digest"]);
    has(&["00000.tar:00000000: altered since its shard was written"]);
    has(&["00001.tar`", "2000 bytes", "truncated or replaced"]);
    has(&["00001.tar:", "lies beyond the end of its shard"]);
    has(&["cannot open", "00002.tar"]);
    assert!(report.problems.iter().all(|line| !line.contains('\n')));
    assert!(check::verify(&out.join("nowhere"), DataFormat::Auto, 1, &|_, _| {}).is_err());
}

/// Of many shards not all stay open.
#[test]
fn a_shard_that_the_system_does_not_open_again_is_no_damaged_image() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("shards");
    let source = Memory::noise(600);
    write_shards(&*source, &out, 1, &mut quiet()).unwrap();
    let shards = open(&out, DataFormat::Auto).unwrap();
    assert_eq!(shards.stored().1, 600, "one image a shard");
    for n in 0..600 {
        fs::remove_file(out.join(format!("{n:05}.tar"))).unwrap();
    }
    let errors: Vec<_> = (0..600).filter_map(|index| shards.read(index).err()).collect();
    assert!(!errors.is_empty(), "all stay open");
    for error in errors {
        assert!(matches!(&error, DataError::Io { action: "read", .. }), "{error}");
    }
}

#[test]
fn an_altered_image_is_damaged_though_it_can_be_decoded() {
    let source = Arc::new(Memory {
        files: vec![jpeg(40, 30, false, jpeg_encoder::ColorType::Rgb); 3],
        labels: vec![None; 3],
        classes: Vec::new(),
    });
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("shards");
    write_shards(&*source, &out, 1 << 20, &mut quiet()).unwrap();
    let place = out.join("00000.tar");
    let mut bytes = fs::read(&place).unwrap();
    // The last bytes of the second image's scan.
    let begin = bytes.windows(3).enumerate().filter(|(_, b)| b == &[0xFF, 0xD8, 0xFF]).nth(1).unwrap().0;
    bytes[begin + source.files[1].len() - 9] ^= 4;
    fs::write(&place, &bytes).unwrap();
    let set = open(&out, DataFormat::Auto).unwrap();
    assert_eq!(set.read(0).unwrap().bytes, source.files[0]);
    let said = set.read(1).unwrap_err().to_string();
    assert!(said.contains("00000.tar:00000001: altered since its shard was written: copy or "), "{said}");
    // Without checksums, as sets of an earlier version are, nobody knows.
    let index = out.join("index.json");
    let text = fs::read_to_string(&index).unwrap();
    let (before, rest) = text.split_once(",\"crc32c\":[").unwrap();
    let (_, after) = rest.split_once(']').unwrap();
    let digest = set.digest();
    fs::write(&index, format!("{before}{after}")).unwrap();
    let older = open(&out, DataFormat::Auto).unwrap();
    assert_eq!(older.digest(), digest);
    let altered = older.read(1).unwrap().bytes;
    assert!(altered != source.files[1] && mentee_data::decode(&altered).is_ok());
    // As many as there are images, or none.
    fs::write(&index, format!("{before},\"crc32c\":[1,2]{after}")).unwrap();
    let said = open(&out, DataFormat::Auto).err().unwrap().to_string();
    assert!(said.contains("00000.tar: 2 checksums of 3 images"), "{said}");
}

#[test]
fn verify_names_damaged_files_of_a_folder() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    for (name, bytes) in [
        ("train/a/good.png", rgb_png(4, 4, 1)),
        ("train/a/empty.jpg", vec![]),
        ("train/b/text.jpg", b"hello, world".to_vec()),
        ("test/a/cut.jpg", jpeg(30, 30, false, jpeg_encoder::ColorType::Rgb)[..800].to_vec()),
    ] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), bytes).unwrap();
    }
    let report = check::verify(root, DataFormat::Auto, 3, &|_, _| {}).unwrap();
    let lines: Vec<String> =
        report.problems.iter().map(|line| line.replace(&root.display().to_string(), "DIR")).collect();
    assert_eq!(
        lines,
        [
            "DIR/train/a/empty.jpg: the file is empty",
            "DIR/train/b/text.jpg: none of JPEG, PNG, WebP, TIFF, BMP, PPM and PGM (it starts with 68 65 6c 6c)",
            "DIR/test/a/cut.jpg: truncated JPEG: the file ends before the image does",
        ]
    );
    assert_eq!((report.samples, report.files), (4, 4));
}

#[test]
fn stats_count_and_measure() {
    let dir = TempDir::new().unwrap();
    let root = dir.path();
    let flat = |value: u8, side: u32| {
        common::png(
            side,
            side + 1,
            png::ColorType::Rgb,
            png::BitDepth::Eight,
            &[value, 0, 255].repeat((side * (side + 1)) as usize),
        )
    };
    for (name, bytes) in [("a/1.png", flat(0, 2)), ("a/2.png", flat(255, 2)), ("b/3.png", flat(0, 2))] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), bytes).unwrap();
    }
    let stats = check::stats(root, DataFormat::Auto, Reading::default(), 2).unwrap();
    let [stats] = &stats[..] else { panic!("{stats:?}") };
    assert_eq!((stats.samples, stats.files, stats.unlabelled, stats.decoded), (3, 3, 0, 3));
    assert_eq!(stats.classes, [("a".to_owned(), 2), ("b".to_owned(), 1)]);
    assert_eq!((stats.width, stats.height), ([2, 2, 2], [3, 3, 3]));
    for (found, expected) in stats.mean.iter().zip([1.0 / 3.0, 0.0, 1.0]) {
        assert!((found - expected).abs() < 1e-12);
    }
    for (found, expected) in stats.std.iter().zip([(2.0f64 / 9.0).sqrt(), 0.0, 0.0]) {
        assert!((found - expected).abs() < 1e-6);
    }
    fs::write(root.join("b/3.png"), b"no image").unwrap();
    assert!(matches!(
        check::stats(root, DataFormat::Auto, Reading::default(), 2),
        Err(DataError::BadSample { .. })
    ));
}

const OPTIONS: ShardOptions = ShardOptions {
    shard_bytes: 4000,
    threads: 3,
    reading: Reading { range: None, bands: None },
    store: Store::AsIs,
};

/// Sixty images as [`OPTIONS`] says, without a stop: the set, and what the writer says of it.
fn in_one_go() -> (TempDir, PathBuf, Written) {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let all = write_shards_with(&*Memory::noise(60), &out, &OPTIONS, &mut quiet()).unwrap();
    assert!(all.shards > 5);
    (dir, out, all)
}

/// The same images, and one that ends the writer.
fn broken(source: &Memory) -> Memory {
    let damaged = |(i, file): (usize, &Vec<u8>)| if i == 41 { vec![1] } else { file.clone() };
    Memory {
        files: source.files.iter().enumerate().map(damaged).collect(),
        labels: source.labels.clone(),
        classes: source.classes.clone(),
    }
}

fn same_files(a: &Path, b: &Path) {
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert_eq!(fs::read(a.join(&name)).unwrap(), fs::read(b.join(&name)).unwrap(), "{name}");
    }
}

/// Fails at a sample, as a kill would: what was finished is taken over, and the result is what one go gives.
#[test]
fn a_writer_that_was_stopped_is_carried_on() {
    let (_whole, uninterrupted, all) = in_one_go();
    let (source, options) = (Memory::noise(60), OPTIONS);
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let broken = broken(&source);
    write_shards_with(&broken, &out, &options, &mut quiet()).unwrap_err();
    assert_eq!(names(dir.path()), [".out.partial"]);
    // A half-written shard, and a finished one that is no longer as the journal says.
    let finished = names(&dir.path().join(".out.partial")).len() - 1;
    fs::write(dir.path().join(format!(".out.partial/{finished:05}.tar")), b"half").unwrap();
    fs::write(dir.path().join(format!(".out.partial/{:05}.tar", finished - 1)), b"cut").unwrap();
    let mut heard = Vec::new();
    let again = write_shards_with(&*source, &out, &options, &mut |done, _| heard.push(done)).unwrap();
    assert!(heard[0] > 0, "it starts where the other had come to");
    assert_eq!(again, all);
    assert_eq!(names(dir.path()), ["out"]);
    same_files(&out, &uninterrupted);
    // Another job does not take them over.
    write_shards_with(&broken, &dir.path().join("two"), &options, &mut quiet()).unwrap_err();
    let other = ShardOptions { shard_bytes: 5000, ..options };
    let mut heard = Vec::new();
    write_shards_with(&*source, &dir.path().join("two"), &other, &mut |done, _| heard.push(done)).unwrap();
    assert_eq!(heard[0], 0);
}

#[test]
fn a_last_move_that_fails_keeps_all_shards() {
    let (_whole, uninterrupted, all) = in_one_go();
    let dir = TempDir::new().unwrap();
    let (out, source) = (dir.path().join("out"), Memory::noise(60));
    // Somebody fills the place meanwhile.
    let mut fill = |done: u64, total: u64| {
        if done == total {
            fs::create_dir_all(&out).unwrap();
            fs::write(out.join("theirs"), b"").unwrap();
        }
    };
    let error = write_shards_with(&*source, &out, &OPTIONS, &mut fill).unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, DataError::Unmoved { from, to, .. }
        if *from == dir.path().join(".out.partial") && *to == out));
    assert!(text.contains("they stay there") && !text.contains('\n'), "{text}");
    assert_eq!(names(dir.path()), [".out.partial", "out"]);
    // As long as that is so nothing is lost either.
    let error = write_shards_with(&*source, &out, &OPTIONS, &mut quiet()).unwrap_err();
    assert!(matches!(error, DataError::OutputExists { .. }), "{error}");
    fs::remove_dir_all(&out).unwrap();
    let mut heard = Vec::new();
    let again = write_shards_with(&*source, &out, &OPTIONS, &mut |done, _| heard.push(done)).unwrap();
    assert_eq!((again, heard), (all, vec![60]));
    assert_eq!(names(dir.path()), ["out"]);
    same_files(&out, &uninterrupted);
}

/// A disk may be mounted there: renaming another folder over it would fail.
#[test]
fn a_folder_that_is_there_is_filled_and_not_replaced() {
    let (_whole, uninterrupted, all) = in_one_go();
    let dir = TempDir::new().unwrap();
    let (out, link, source) = (dir.path().join("out"), dir.path().join("link"), Memory::noise(60));
    fs::create_dir_all(out.join("lost+found")).unwrap();
    symlink(&out, &link).unwrap();
    let before = fs::metadata(&out).unwrap().ino();
    write_shards_with(&broken(&source), &link, &OPTIONS, &mut quiet()).unwrap_err();
    assert_eq!(
        (names(dir.path()), names(&out)),
        (vec!["link".into(), "out".into()], vec![".partial".into(), "lost+found".into()])
    );
    // As a writer leaves it that is killed while it moves its shards: no set, and none is read.
    for name in ["00000.tar", "00001.tar"] {
        fs::rename(out.join(".partial").join(name), out.join(name)).unwrap();
    }
    let message = open(&out, DataFormat::Auto).err().unwrap().to_string();
    assert!(message.contains("run the same `mentee shard` again"), "{message}");
    let mut heard = Vec::new();
    let again = write_shards_with(&*source, &link, &OPTIONS, &mut |done, _| heard.push(done)).unwrap();
    assert!(heard[0] > 20, "{heard:?}");
    assert_eq!(again, all);
    assert_eq!(fs::metadata(&out).unwrap().ino(), before);
    assert!(link.is_symlink());
    assert_eq!(names(dir.path()), ["link", "out"]);
    fs::remove_dir(out.join("lost+found")).unwrap();
    same_files(&out, &uninterrupted);
}

#[test]
fn what_was_begun_before_the_folder_was_made_goes_on_in_it() {
    let (_whole, uninterrupted, all) = in_one_go();
    let dir = TempDir::new().unwrap();
    let (out, source) = (dir.path().join("out"), Memory::noise(60));
    write_shards_with(&broken(&source), &out, &OPTIONS, &mut quiet()).unwrap_err();
    assert_eq!(names(dir.path()), [".out.partial"]);
    fs::create_dir(&out).unwrap();
    let before = fs::metadata(&out).unwrap().ino();
    let mut heard = Vec::new();
    let again = write_shards_with(&*source, &out, &OPTIONS, &mut |done, _| heard.push(done)).unwrap();
    assert!(heard[0] > 20, "{heard:?}");
    assert_eq!((again, names(dir.path())), (all, vec!["out".to_owned()]));
    assert_eq!(fs::metadata(&out).unwrap().ino(), before);
    same_files(&out, &uninterrupted);
}

#[test]
fn what_cannot_be_a_folder_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let refuse = |name: &str, expected: &str| {
        let out = dir.path().join(name);
        let error = write_shards_with(&*Memory::noise(1), &out, &OPTIONS, &mut |_, _| panic!("it began"));
        let text = error.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    };
    symlink(dir.path().join("nowhere"), dir.path().join("link")).unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    refuse("link", "link`: a link to a folder that is not there");
    refuse("link/", "link`: a link to a folder that is not there");
    refuse("file", "file`: a file, not a folder");
    refuse("file/below", "cannot open");
    refuse("..", "not a name for a new folder");
    assert_eq!(names(dir.path()), ["file", "link"]);
}

#[test]
fn a_second_writer_is_refused() {
    let (_whole, uninterrupted, all) = in_one_go();
    let source = Memory::noise(60);
    for is_there in [false, true] {
        let dir = TempDir::new().unwrap();
        let out = dir.path().join("out");
        if is_there {
            fs::create_dir(&out).unwrap();
        }
        let mut refused = Vec::new();
        let first = write_shards_with(&*source, &out, &OPTIONS, &mut |_, _| {
            refused.push(write_shards_with(&*source, &out, &OPTIONS, &mut quiet()).unwrap_err());
        });
        assert_eq!(first.unwrap(), all);
        let place = if is_there { out.join(".partial") } else { dir.path().join(".out.partial") };
        assert!(refused.len() > 1);
        for error in refused {
            assert_eq!(error, DataError::InUse { path: place.clone() });
        }
        assert_eq!(names(dir.path()), ["out"]);
        same_files(&out, &uninterrupted);
    }
}

#[test]
fn a_part_that_is_complete_is_left_as_it_is() {
    let (_whole, uninterrupted, all) = in_one_go();
    let dir = TempDir::new().unwrap();
    let (out, source) = (dir.path().join("train"), Memory::noise(60));
    let part = |options: &ShardOptions| write_part(&*source, &out, options, &mut quiet());
    assert_eq!(part(&OPTIONS).unwrap(), Some(all));
    let threads = ShardOptions { threads: 1, ..OPTIONS };
    assert_eq!(part(&threads).unwrap(), None, "threads change nothing");
    same_files(&out, &uninterrupted);
    // Another job's, and shards that are no longer those, are refused.
    let refuse = |options: &ShardOptions| {
        let error = part(options).unwrap_err();
        assert!(matches!(error, DataError::OutputExists { .. }), "{error}");
    };
    refuse(&ShardOptions { shard_bytes: 5000, ..OPTIONS });
    refuse(&ShardOptions { store: Store::Raw { shorter_side: None }, ..OPTIONS });
    let shard = fs::read(out.join("00001.tar")).unwrap();
    fs::write(out.join("00001.tar"), b"cut").unwrap();
    refuse(&OPTIONS);
    fs::write(out.join("00001.tar"), shard).unwrap();
    assert_eq!(part(&OPTIONS).unwrap(), None);
    forget_part(&out);
    assert_eq!(names(dir.path()), ["train"]);
    refuse(&OPTIONS);
}

#[test]
fn changed_images_are_another_data_set() {
    let dir = TempDir::new().unwrap();
    let source = Memory {
        files: (0..20).map(|i| rgb_png(60 + i, 40, u64::from(i))).collect(),
        labels: vec![Some(0); 20],
        classes: vec!["a".to_owned()],
    };
    let mut digests = std::collections::BTreeSet::new();
    let stores = [
        (Store::AsIs, None, "png", (60, 40)),
        (Store::Raw { shorter_side: None }, Some("raw pixels"), "ppm", (60, 40)),
        (
            Store::Jpeg { shorter_side: Some(20), quality: 90 },
            Some("JPEG of quality 90, 4:2:0, shorter side at most 20 pixels"),
            "jpg",
            (30, 20),
        ),
        (Store::Jpeg { shorter_side: None, quality: 50 }, Some("JPEG of quality 50, 4:2:0"), "jpg", (60, 40)),
    ];
    for (i, (store, changed, extension, size)) in stores.into_iter().enumerate() {
        let out = dir.path().join(i.to_string());
        let options =
            |threads| ShardOptions { shard_bytes: 30_000, threads, reading: Reading::default(), store };
        let written = write_shards_with(&source, &out, &options(2), &mut quiet()).unwrap();
        let again =
            write_shards_with(&source, &dir.path().join(format!("again{i}")), &options(1), &mut quiet());
        assert_eq!(again.unwrap(), written, "threads change nothing");
        assert!(digests.insert(written.digest));
        let index = fs::read_to_string(out.join(INDEX_FILE)).unwrap();
        match changed {
            None => assert!(!index.contains("changed")),
            Some(changed) => assert!(index.contains(&format!("\"changed\":\"{changed}\"")), "{index}"),
        }
        let tar = fs::read(out.join("00000.tar")).unwrap();
        assert!(tar.starts_with(format!("00000000.{extension}").as_bytes()));
        let source_again = open(&out, DataFormat::Auto).unwrap();
        let image = decode(&source_again.read(0).unwrap().bytes).unwrap();
        assert_eq!((image.width, image.height), size);
        if extension == "ppm" {
            assert_eq!(image, decode(&source.files[0]).unwrap());
        }
    }
}
