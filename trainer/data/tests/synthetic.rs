//! The synthetic set: the same bytes everywhere, balanced, and not given away by its pixels.

use std::collections::BTreeSet;

use mentee_config::recipe::DataFormat;
use mentee_data::synthetic::{CLASSES, SyntheticConfig, draw, write_synthetic};
use mentee_data::{Split, check, decode, open_split};

#[test]
fn the_bytes_are_the_same_on_every_machine() {
    let config = SyntheticConfig::default();
    let mut hasher = blake3::Hasher::new();
    for index in 0..40 {
        for split in [Split::Train, Split::Eval] {
            hasher.update(&draw(&config, split, index).0.data);
        }
    }
    // A change here changes the demo: measure it again and say so in the change log.
    assert_eq!(hasher.finalize().to_hex().as_str(), GOLDEN);
}

const GOLDEN: &str = "46279ef3c0ef991f38f492bffc550210d831b008c6d0a4a3ab3e67bd52855f98";

#[test]
fn pictures_differ_and_classes_take_turns() {
    let config = SyntheticConfig { size: 24, ..SyntheticConfig::default() };
    let mut seen = BTreeSet::new();
    let mut counts = [0; CLASSES.len()];
    for index in 0..160 {
        for split in [Split::Train, Split::Eval] {
            let (image, label) = draw(&config, split, index);
            assert_eq!((image.width, image.height, image.data.len()), (24, 24, 24 * 24 * 3));
            assert!(seen.insert(image.data));
            counts[label as usize] += 1;
        }
    }
    assert_eq!(counts, [40; CLASSES.len()]);
    let other = SyntheticConfig { seed: 1, ..config };
    assert!(seen.insert(draw(&other, Split::Train, 0).0.data), "another seed, other pictures");
}

/// Share of test pictures whose nearest training picture, by pixels, is of their class.
#[test]
fn pixels_do_not_give_the_class_away() {
    let config = SyntheticConfig::default();
    let set = |split, n| (0..n).map(|i| draw(&config, split, i)).collect::<Vec<_>>();
    let (train, test) = (set(Split::Train, 400), set(Split::Eval, 160));
    let distance = |a: &[u8], b: &[u8]| -> u64 {
        a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b)) * u64::from(a.abs_diff(*b))).sum()
    };
    let right = test
        .iter()
        .filter(|(image, label)| {
            train.iter().min_by_key(|(other, _)| distance(&image.data, &other.data)).unwrap().1 == *label
        })
        .count();
    // Chance is 20 of 160.
    assert!(right < 48, "{right} of 160");
}

#[test]
fn written_as_a_divided_set_of_shards() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("set");
    let config = SyntheticConfig { train: 50, test: 20, shard_bytes: 40_000, ..SyntheticConfig::default() };
    let mut last = (0, 0);
    let [train, test] = write_synthetic(&out, &config, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (70, 70));
    assert_eq!((train.samples, test.samples), (50, 20));
    assert!(train.shards > 1);
    for (split, n) in [(Split::Train, 50), (Split::Eval, 20)] {
        let source = open_split(&out, DataFormat::Auto, split).unwrap().unwrap();
        assert_eq!((source.len(), source.classes().len()), (n, CLASSES.len()));
        for index in 0..n {
            let (image, label) = draw(&config, split, index);
            assert_eq!(decode(&source.read(index).unwrap().bytes).unwrap(), image);
            assert_eq!(source.label(index), Some(label));
        }
    }
    let report = check::verify(&out, DataFormat::Auto, 2, &|_, _| {}).unwrap();
    assert_eq!((report.samples, report.problems), (70, vec![]));
    // The same configuration gives the same files.
    let again = write_synthetic(&dir.path().join("again"), &config, &mut |_, _| {}).unwrap();
    assert_eq!(again, [train, test]);
}
