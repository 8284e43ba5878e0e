//! Batches: the same bytes for any number of threads, any world size, any resume point; errors with a name.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Memory, views};
use mentee_config::recipe::Definition;
use mentee_data::digest::{OrderDigest, Running};
use mentee_data::eval::{EvalBatch, EvalOptions, EvalView, all_labelled, eval_images, training_images};
use mentee_data::{Batch, Damaged, DataError, Encoding, Loader, LoaderConfig, OnError, Order, Source};
use proptest::prelude::*;

const SIZE: u32 = 9;
const LEN: usize = (SIZE * SIZE * 3) as usize;

fn config(source: Arc<dyn Source>, batch: u64) -> LoaderConfig {
    LoaderConfig {
        order: Order::new(3, source.len(), batch),
        source,
        views: views(Definition::Byol, SIZE),
        seed: 3,
        rank_share: 0..batch,
        first_step: 0,
        last_step: 11,
        threads: 2,
        queue_steps: 3,
        on_error: mentee_data::OnError::Fail,
    }
}

fn all(config: LoaderConfig) -> Vec<Batch> {
    let mut loader = Loader::new(config).unwrap();
    let mut batches = Vec::new();
    while let Some(batch) = loader.next().unwrap() {
        batches.push(Batch { wait: Duration::ZERO, ..batch.clone() });
        loader.recycle(batch);
    }
    assert!(loader.next().unwrap().is_none(), "the end stays the end");
    batches
}

#[test]
fn batches_come_in_order_and_follow_the_order() {
    let source = Memory::noise(23);
    let batches = all(config(source.clone(), 5));
    let order = Order::new(3, 23, 5);
    assert_eq!(batches.iter().map(|b| b.step).collect::<Vec<_>>(), (0..11).collect::<Vec<_>>());
    for batch in &batches {
        assert_eq!((batch.epoch, batch.ids.clone()), order.batch(batch.step));
        assert_eq!(batch.views.len(), 2 * 5 * LEN);
        assert!(batch.views.iter().all(|x| (0.0..=1.0).contains(x)));
    }
    // The same sample in another epoch is seen differently.
    let of = |epoch: u64| {
        let batch = batches.iter().find(|b| b.epoch == epoch && b.ids.contains(&7))?;
        let i = batch.ids.iter().position(|&id| id == 7)?;
        Some(batch.views[i * LEN..(i + 1) * LEN].to_vec())
    };
    let seen: Vec<_> = (0..3).filter_map(of).collect();
    assert!(seen.len() >= 2 && seen[0] != seen[1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn bytes_do_not_depend_on_threads_queue_or_resume(threads in 1usize..6, queue in 1usize..5, first in 0u64..11) {
        let source = Memory::noise(23);
        let whole = all(LoaderConfig { threads: 1, queue_steps: 1, ..config(source.clone(), 5) });
        let other = all(LoaderConfig { threads, queue_steps: queue, first_step: first, ..config(source, 5) });
        prop_assert_eq!(&whole[first as usize..], &other[..]);
    }

    #[test]
    fn bytes_do_not_depend_on_the_world(world in 1u64..8) {
        let source = Memory::noise(23);
        let whole = all(config(source.clone(), 5));
        let ranks: Vec<Vec<Batch>> = (0..world)
            .map(|rank| all(LoaderConfig {
                rank_share: rank * 5 / world..(rank + 1) * 5 / world,
                ..config(source.clone(), 5)
            }))
            .collect();
        for (step, batch) in whole.iter().enumerate() {
            let ids: Vec<u64> = ranks.iter().flat_map(|r| r[step].ids.clone()).collect();
            prop_assert_eq!(&ids, &batch.ids);
            for view in 0..2 {
                let joined: Vec<f32> = ranks
                    .iter()
                    .flat_map(|r| {
                        let n = r[step].ids.len();
                        r[step].views[view * n * LEN..(view + 1) * n * LEN].to_vec()
                    })
                    .collect();
                prop_assert_eq!(&joined[..], &batch.views[view * 5 * LEN..(view + 1) * 5 * LEN]);
            }
        }
    }
}

#[test]
fn one_digest_for_every_world_and_a_resume_at_another() {
    let source = Memory::noise(23);
    let digest = |worlds: &[(u64, std::ops::Range<u64>)], seed| {
        let mut running = Running::default();
        for (world, steps) in worlds {
            OrderDigest {
                source: source.clone(),
                order: Order::new(seed, 23, 5),
                views: views(Definition::Torchvision, SIZE),
                seed,
                shares: (0..*world).map(|rank| rank * 5 / world..(rank + 1) * 5 / world).collect(),
                steps: steps.clone(),
                threads: 2,
                on_error: mentee_data::OnError::Fail,
            }
            .update(&mut running, &mut |_, _| {})
            .unwrap();
        }
        running.finish()
    };
    let one = digest(&[(1, 0..8)], 3);
    for world in [2, 3, 4, 8] {
        assert_eq!(one, digest(&[(world, 0..8)], 3), "world of {world}");
    }
    assert_eq!(one, digest(&[(2, 0..3), (3, 3..8)], 3), "resumed at another world size");
    assert_ne!(one, digest(&[(1, 0..8)], 4), "another seed");
}

/// A set in which some files are damaged.
fn damaged(bad: &[u64]) -> Arc<Memory> {
    let whole = Memory::noise(23);
    let mut files = whole.files.clone();
    for &i in bad {
        let half = files[i as usize].len() / 2;
        files[i as usize].truncate(half);
    }
    Arc::new(Memory { files, labels: whole.labels.clone(), classes: whole.classes.clone() })
}

#[test]
fn the_first_damaged_sample_in_order_is_named_whatever_the_threads() {
    let order = Order::new(3, 23, 5);
    let second = order.batch(1).1;
    let source = damaged(&[second[1], second[3], order.batch(3).1[0]]);
    for threads in [1, 2, 5] {
        let mut loader = Loader::new(LoaderConfig { threads, ..config(source.clone(), 5) }).unwrap();
        assert_eq!(loader.next().unwrap().unwrap().step, 0);
        let error = loader.next().unwrap_err();
        let DataError::BadSample { sample, reason } = &error else { panic!("{error}") };
        assert_eq!(sample, &format!("memory:{}", second[1]));
        assert!(reason.starts_with("truncated PNG"), "{reason}");
        assert_eq!(loader.next().unwrap_err(), error, "and again");
    }
}

/// Files that take a while to read.
struct Slow(Arc<Memory>);

impl Source for Slow {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        std::thread::sleep(Duration::from_millis(20));
        self.0.read_into(index, buffer)
    }
    fn label(&self, index: u64) -> Option<u32> {
        self.0.label(index)
    }
    fn key(&self, index: u64) -> String {
        self.0.key(index)
    }
    fn classes(&self) -> &[String] {
        self.0.classes()
    }
    fn digest(&self) -> String {
        self.0.digest()
    }
    fn stored(&self) -> (u64, u64) {
        self.0.stored()
    }
}

#[test]
fn dropping_a_busy_loader_is_prompt_and_waiting_is_told() {
    let source: Arc<dyn Source> = Arc::new(Slow(Memory::noise(23)));
    let mut loader =
        Loader::new(LoaderConfig { threads: 3, last_step: 1000, ..config(source.clone(), 5) }).unwrap();
    let batch = loader.next().unwrap().unwrap();
    assert!(batch.wait >= Duration::from_millis(20), "{:?}", batch.wait);
    let started = Instant::now();
    drop(loader);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // Dropped before anything was asked for.
    drop(Loader::new(config(source, 5)).unwrap());
}

#[test]
fn the_queue_bounds_what_is_made_ahead() {
    struct Counting(Arc<Memory>, std::sync::atomic::AtomicU64);
    impl Source for Counting {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
            self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            self.0.read_into(index, buffer)
        }
        fn label(&self, _: u64) -> Option<u32> {
            None
        }
        fn key(&self, index: u64) -> String {
            self.0.key(index)
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
    let source = Arc::new(Counting(Memory::noise(23), 0.into()));
    let mut loader = Loader::new(LoaderConfig { queue_steps: 2, ..config(source.clone(), 5) }).unwrap();
    for taken in 1..=4u64 {
        assert!(loader.next().unwrap().is_some());
        // However long the threads are given, no more than two batches ahead of those taken are begun.
        std::thread::sleep(Duration::from_millis(30));
        let read = source.1.load(std::sync::atomic::Ordering::SeqCst);
        assert!(read <= (taken + 2) * 5, "{read} read, {taken} batches taken");
    }
}

#[test]
fn a_rank_without_samples_gets_empty_batches() {
    let batches = all(LoaderConfig { rank_share: 2..2, ..config(Memory::noise(23), 5) });
    assert_eq!(batches.len(), 11);
    assert!(batches.iter().all(|b| b.ids.is_empty() && b.views.is_empty()));
}

/// Nothing is left out.
fn strict() -> Arc<Damaged> {
    Arc::new(Damaged::new(OnError::Fail))
}

#[test]
fn evaluation_images_come_once_each_with_labels() {
    let source = Memory::noise(23);
    let mut settings = views(Definition::Byol, SIZE);
    (settings.mean, settings.std) = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5]);
    let indices: Vec<u64> = (0..23).rev().collect();
    let options = EvalOptions { batch: 5, threads: 3 };
    let batches: Vec<_> = eval_images(source.clone(), indices.clone(), &settings, options, strict())
        .unwrap()
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
    assert_eq!(batches.iter().flat_map(|b| b.ids.clone()).collect::<Vec<_>>(), indices);
    assert_eq!(batches.len(), 5);
    for batch in &batches {
        assert_eq!(batch.images.len(), batch.ids.len() * LEN);
        for (id, label) in batch.ids.iter().zip(&batch.labels) {
            assert_eq!(source.label(*id), Some(*label));
        }
    }
    // The statistics are applied to each channel, whatever the number of threads.
    (settings.mean, settings.std) = ([0.0; 3], [1.0; 3]);
    let plain = eval_images(source, indices, &settings, EvalOptions { threads: 1, ..options }, strict())
        .unwrap()
        .map(Result::unwrap)
        .flat_map(|batch| batch.images);
    let normalised = batches.iter().flat_map(|batch| &batch.images);
    for (i, (x, y)) in plain.zip(normalised).enumerate() {
        let (mean, std) = ([0.5, 0.4, 0.3][i % 3], [0.2, 0.25, 0.5][i % 3]);
        assert!(((x - mean) / std - y).abs() < 1e-5);
    }
}

#[test]
fn training_images_come_once_an_epoch_in_another_order_and_view() {
    let source = Memory::noise(23);
    let settings = views(Definition::Torchvision, SIZE);
    let indices: Vec<u64> = (0..23).filter(|index| index % 5 != 0).collect();
    let epochs = |threads, seed| {
        let options = EvalOptions { batch: 7, threads };
        training_images(source.clone(), indices.clone(), &settings, seed, 2, options)
            .unwrap()
            .collect::<Result<Vec<_>, _>>()
            .unwrap()
    };
    let batches = epochs(3, 1);
    assert_eq!(batches.iter().map(|batch| batch.ids.len()).collect::<Vec<_>>(), [7, 7, 4, 7, 7, 4]);
    let order = |batches: &[EvalBatch]| batches.iter().flat_map(|b| b.ids.clone()).collect::<Vec<_>>();
    let (first, second) = (order(&batches[..3]), order(&batches[3..]));
    assert_ne!(first, second);
    for mut order in [first.clone(), second] {
        order.sort_unstable();
        assert_eq!(order, indices);
    }
    let image = |batches: &[EvalBatch], id: u64| {
        let found = batches.iter().find_map(|b| Some((b, b.ids.iter().position(|&other| other == id)?)));
        let (batch, place) = found.unwrap();
        assert_eq!(Some(batch.labels[place]), source.label(id));
        batch.images[place * LEN..][..LEN].to_vec()
    };
    assert_ne!(image(&batches[..3], 3), image(&batches[3..], 3), "the same view in both epochs");
    // Whatever the number of threads; another seed is another run.
    assert_eq!(epochs(1, 1), batches);
    assert_ne!(order(&epochs(1, 2)[..3]), first);
}

#[test]
fn evaluation_names_what_it_cannot_use() {
    let whole = Memory::noise(5);
    let unlabelled = Arc::new(Memory {
        files: whole.files.clone(),
        labels: vec![Some(0), None, None, Some(1), None],
        classes: vec![],
    });
    let settings = views(Definition::Byol, SIZE);
    let options = EvalOptions { batch: 2, threads: 1 };
    let error =
        eval_images(unlabelled.clone(), vec![0, 3, 2, 1], &settings, options, strict()).err().unwrap();
    assert_eq!(error, DataError::NoLabel { sample: "memory:2".to_owned() });
    assert_eq!(all_labelled(&*unlabelled, &[0, 3, 2, 1]), Err(error));
    assert_eq!(all_labelled(&*unlabelled, &[0, 3]), Ok(()));
    assert!(eval_images(unlabelled, vec![0, 3], &settings, options, strict()).is_ok());
    let results: Vec<_> =
        eval_images(damaged(&[2]), vec![0, 1, 2, 3, 4], &settings, options, strict()).unwrap().collect();
    assert_eq!(results.len(), 2, "it ends at the error");
    assert!(matches!(&results[1], Err(DataError::BadSample { sample, .. }) if sample == "memory:2"));
}

#[test]
fn evaluation_leaves_damaged_images_out_and_nothing_else() {
    let settings = views(Definition::Byol, SIZE);
    let indices: Vec<u64> = (0..23).collect();
    // One batch of four is lost as a whole.
    let bad = [1, 8, 9, 10, 11, 22];
    let good: Vec<u64> = indices.iter().copied().filter(|index| !bad.contains(index)).collect();
    let all = |source: Arc<Memory>, indices: &[u64], threads, damaged: Arc<Damaged>| {
        let options = EvalOptions { batch: 4, threads };
        eval_images(source, indices.to_vec(), &settings, options, damaged)
            .unwrap()
            .collect::<Result<Vec<_>, _>>()
            .unwrap()
    };
    let whole = all(Memory::noise(23), &good, 1, strict());
    let images = |batches: &[EvalBatch]| -> Vec<f32> {
        batches.iter().flat_map(|batch| batch.images.iter().copied()).collect()
    };
    for threads in [1, 3] {
        let found = Arc::new(Damaged::new(OnError::Skip { budget: 6 }));
        let first = all(damaged(&bad), &indices, threads, found.clone());
        assert_eq!(first.iter().map(|batch| batch.ids.len()).collect::<Vec<_>>(), [3, 4, 4, 4, 2]);
        assert_eq!(first.iter().flat_map(|batch| batch.ids.clone()).collect::<Vec<_>>(), good);
        for batch in &first {
            assert_eq!(batch.labels, batch.ids.iter().map(|id| (id % 3) as u32).collect::<Vec<_>>());
        }
        assert_eq!(images(&first), images(&whole));
        assert_eq!(found.found().keys().copied().collect::<Vec<_>>(), bad);
        let reason = &found.found()[&9];
        assert!(reason.starts_with("memory:9: truncated PNG"), "{reason}");
        // What was damaged once stays out, in the same batches, though the file is whole again.
        assert_eq!(all(Memory::noise(23), &indices, threads, found.clone()), first);
    }
    let options = EvalOptions { batch: 4, threads: 2 };
    let few = Arc::new(Damaged::new(OnError::Skip { budget: 5 }));
    let error = eval_images(damaged(&bad), indices, &settings, options, few).unwrap().find_map(Result::err);
    let Some(DataError::TooManyBad { found: 6, budget: 5, last }) = &error else { panic!("{error:?}") };
    assert!(last.starts_with("memory:"), "{last}");
}

#[test]
fn the_evaluation_crop_is_torchvisions() {
    let crop = |size, width, height| EvalView::new(&views(Definition::Byol, size)).crop(width, height);
    // 500 x 375 at 224: resized to 341 x 256, cut at (round(58.5) = 58, 16).
    let (x, y, w, h) = crop(224, 500, 375);
    let (sx, sy) = (500.0 / 341.0, 375.0 / 256.0);
    for (found, expected) in [(x, 58.0 * sx), (y, 16.0 * sy), (w, 224.0 * sx), (h, 224.0 * sy)] {
        assert!((found - expected).abs() < 1e-9, "{found} for {expected}");
    }
    // What has the size is taken as it is; small views keep no margin.
    assert_eq!(crop(224, 224, 224), (0.0, 0.0, 224.0, 224.0));
    assert_eq!(crop(32, 32, 32), (0.0, 0.0, 32.0, 32.0));
    assert_eq!(crop(32, 64, 64), (0.0, 0.0, 64.0, 64.0));
    assert_eq!(crop(32, 48, 32), (8.0, 0.0, 32.0, 32.0));
    for (width, height) in [(1, 1), (1, 500), (500, 1), (223, 225), (31, 33)] {
        for size in [32, 224] {
            let (x, y, w, h) = crop(size, width, height);
            assert!(x >= 0.0 && y >= 0.0 && w > 0.0 && h > 0.0);
            assert!(
                x + w <= f64::from(width) + 1e-9 && y + h <= f64::from(height) + 1e-9,
                "{width} {height} {size}"
            );
        }
    }
}

/// A thousand good images and one of each kind of damage, some of it at places that a batch meets early.
fn five_bad() -> (Arc<Memory>, Vec<u64>) {
    let mut set = Memory { files: Vec::new(), labels: Vec::new(), classes: vec!["a".to_owned()] };
    for i in 0..1000 {
        set.files.push(common::rgb_png(9, 8, i + 1));
    }
    let photo = common::jpeg(40, 30, false, jpeg_encoder::ColorType::Rgb);
    let mut bomb = photo.clone();
    let frame = bomb.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    bomb[frame + 5..frame + 9].copy_from_slice(&[0xFD, 0xE8, 0xFD, 0xE8]);
    let kinds = [
        Vec::new(),
        b"<html>not found</html>".to_vec(),
        photo[..photo.len() / 2].to_vec(),
        bomb,
        photo[..4].to_vec(),
    ];
    let mut bad = Vec::new();
    for (kind, bytes) in kinds.into_iter().enumerate() {
        let at = 100 + 173 * kind;
        set.files.insert(at, bytes);
        bad.push(at as u64);
    }
    set.labels = vec![Some(0); set.files.len()];
    (Arc::new(set), bad)
}

#[test]
fn damaged_samples_are_replaced_named_and_the_same_in_every_world() {
    let (source, bad) = five_bad();
    let n = source.len();
    let run = |world: u64, threads: usize, first: u64| {
        let mut views = Vec::new();
        let mut skipped = std::collections::BTreeMap::new();
        let batch = 67; // 15 steps an epoch, all 1005 samples
        for rank in 0..world {
            let batches = all(LoaderConfig {
                order: Order::new(4, n, batch),
                rank_share: rank * batch / world..(rank + 1) * batch / world,
                first_step: first,
                last_step: 15,
                threads,
                on_error: OnError::Skip { budget: 5 },
                ..config(source.clone(), batch)
            });
            for batch in batches {
                let length = batch.views.len() / 2 / batch.ids.len();
                for one in &batch.skipped {
                    assert_eq!(batch.ids[one.place], one.instead);
                    assert!(!bad.contains(&one.instead));
                    assert_eq!(one.damaged[0].0, one.id);
                    skipped.extend(one.damaged.iter().cloned());
                }
                for (i, id) in batch.ids.iter().enumerate() {
                    views.push((batch.step, rank, *id, batch.views[i * length..][..length].to_vec()));
                }
            }
        }
        views.sort_by_key(|view| (view.0, view.1));
        let views: Vec<_> = views.into_iter().map(|(step, _, id, view)| (step, id, view)).collect();
        (views, skipped)
    };
    let (whole, skipped) = run(1, 1, 0);
    assert_eq!(skipped.keys().copied().collect::<Vec<_>>(), bad);
    let reasons: Vec<&str> = skipped.values().map(String::as_str).collect();
    assert_eq!(reasons[0], "memory:100: the file is empty");
    assert!(reasons[1].contains("none of JPEG, PNG"), "{}", reasons[1]);
    assert!(reasons[2].contains("truncated JPEG"), "{}", reasons[2]);
    assert!(reasons[3].contains("65000 x 65000 pixels"), "{}", reasons[3]);
    assert!(reasons[4].contains("truncated JPEG"), "{}", reasons[4]);
    for (world, threads) in [(2, 3), (3, 1), (8, 2)] {
        assert_eq!(run(world, threads, 0), (whole.clone(), skipped.clone()), "{world} ranks");
    }
    let rest: Vec<_> = whole.iter().filter(|view| view.0 >= 7).cloned().collect();
    assert_eq!(run(4, 2, 7).0, rest, "from the middle");
}

#[test]
fn damage_beyond_the_budget_ends_the_loader() {
    let (source, bad) = five_bad();
    let end = |on_error| {
        let mut loader = Loader::new(LoaderConfig {
            order: Order::new(4, source.len(), 67),
            rank_share: 0..67,
            last_step: 15,
            on_error,
            ..config(source.clone(), 67)
        })
        .unwrap();
        loop {
            match loader.next() {
                Ok(Some(batch)) => loader.recycle(batch),
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    };
    assert_eq!(end(OnError::Skip { budget: 5 }), None);
    let Some(DataError::TooManyBad { found: 4, budget: 3, last }) = end(OnError::Skip { budget: 3 }) else {
        panic!("the budget was kept");
    };
    assert!(last.starts_with("memory:"), "{last}");
    let Some(DataError::BadSample { sample, .. }) = end(OnError::Fail) else { panic!("damage went by") };
    assert!(bad.iter().any(|id| sample == format!("memory:{id}")), "{sample}");
}
