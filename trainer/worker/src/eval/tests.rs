//! Evaluations on several ranks, and of sets with damaged and unlabelled images.

use std::sync::Mutex;
use std::time::Duration;

use mentee_collectives::{Single, threads};
use mentee_config::exit_code;
use mentee_data::Encoding;

use super::*;

const SIDE: usize = 16;

#[derive(Clone, Copy)]
struct Image {
    seed: u64,
    label: Option<u32>,
    whole: bool,
}

/// Noise of two classes, one darker than the other.
#[derive(Clone)]
struct Set {
    name: &'static str,
    images: Vec<Image>,
}

impl Set {
    fn new(name: &'static str, seeds: std::ops::Range<u64>) -> Self {
        let image = |seed| Image { seed, label: Some((seed % 2) as u32), whole: true };
        Self { name, images: seeds.map(image).collect() }
    }

    fn damaged(mut self, indices: &[usize]) -> Self {
        indices.iter().for_each(|&index| self.images[index].whole = false);
        self
    }

    fn unlabelled(mut self, indices: &[usize]) -> Self {
        indices.iter().for_each(|&index| self.images[index].label = None);
        self
    }

    /// Only its images that are whole.
    fn repaired(mut self) -> Self {
        self.images.retain(|image| image.whole);
        self
    }
}

impl Source for Set {
    fn len(&self) -> u64 {
        self.images.len() as u64
    }

    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        let Image { seed, whole, .. } = self.images[index as usize];
        if !whole {
            return Err(DataError::BadSample { sample: self.key(index), reason: "torn".to_owned() });
        }
        let mut state = seed + 1;
        buffer.clear();
        buffer.extend((0..3 * SIDE * SIDE).map(|_| {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            (state >> 57) as u8 + 100 * (seed % 2) as u8
        }));
        Ok(Encoding::Raw { width: SIDE as u32, height: SIDE as u32 })
    }

    fn label(&self, index: u64) -> Option<u32> {
        self.images[index as usize].label
    }

    fn key(&self, index: u64) -> String {
        format!("{}:{index}", self.name)
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn digest(&self) -> String {
        self.name.to_owned()
    }

    fn stored(&self) -> (u64, u64) {
        (0, 1)
    }
}

fn recipe(sets: &[&str]) -> Recipe {
    let usual = ["views.size=16", "eval.knn_k=3", "eval.knn_bank=0", "eval.knn_every_epochs=1"];
    let sets: Vec<String> = usual.iter().chain(sets).map(|&set| set.to_owned()).collect();
    Recipe::load("byol-cifar10-small", &sets).unwrap()
}

fn evaluator(train: &Set, test: &Set, sets: &[&str]) -> Result<Evaluator, WorkerError> {
    let (train, test) = (Arc::new(train.clone()), Arc::new(test.clone()));
    Evaluator::from_sources(&recipe(sets), train, Some(test), 2, Device::Cpu)
}

fn on_ranks<R: Send>(world: u32, body: impl Fn(&dyn Collectives) -> R + Send + Sync) -> Vec<R> {
    threads::run(world, Duration::from_secs(60), |rank| body(&rank))
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).view([-1])).unwrap()
}

#[test]
fn damaged_images_are_left_out_alike_on_any_number_of_ranks() {
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let train = Set::new("train", 0..23).damaged(&[0, 7, 12]);
    let test = Set::new("test", 100..111).damaged(&[10]);
    let skip = ["data.on_error=skip", "data.max_skipped=3"];
    let clean = evaluator(&train.clone().repaired(), &test.clone().repaired(), &skip).unwrap();
    let pixels = clean.raw_pixels(&Single::new()).unwrap();
    assert!(!clean.images_in_words(&pixels).contains("left out"));
    let clean_vote = clean.vote(&Single::new(), &pixels).unwrap();
    let clean_bank = (numbers(&pixels.bank.features), numbers(&pixels.bank.labels));
    let clean_queries = (numbers(&pixels.queries.features), numbers(&pixels.queries.labels));
    for world in [1, 2, 3, 8] {
        let ranks = on_ranks(world, |rank| {
            let mut own = evaluator(&train, &test, &skip).unwrap();
            own.warn = |what| TOLD.lock().unwrap().push(what.to_owned());
            let first = own.raw_pixels(rank).unwrap();
            let again = own.raw_pixels(rank).unwrap();
            for pixels in [&first, &again] {
                let queries = (numbers(&pixels.queries.features), numbers(&pixels.queries.labels));
                assert_eq!(queries, clean_queries);
                assert_eq!(own.vote(rank, pixels).unwrap(), clean_vote);
                assert_eq!(pixels.left_out, [3, 1]);
            }
            let words = own.images_in_words(&again);
            assert!(
                words
                    .contains("bank 20 training images, 10 queries (test images), 4 damaged images left out"),
                "{words}"
            );
            (numbers(&again.bank.features), numbers(&again.bank.labels))
        });
        let (features, labels): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
        assert_eq!((features.concat(), labels.concat()), clean_bank, "{world} ranks");
        // Once each, by the rank that met it, however often they are asked for.
        let mut told = std::mem::take(&mut *TOLD.lock().unwrap());
        told.sort();
        let expected = ["test:10", "train:0", "train:12", "train:7"]
            .map(|key| format!("left a damaged image out of the evaluation: {key}: torn"));
        assert_eq!(told, expected, "{world} ranks");
    }
}

#[test]
fn too_much_damage_ends_the_evaluation_of_all_ranks_with_one_word() {
    let refused = |train: &Set, test: &Set, sets: &[&str]| {
        [1, 2, 5].map(|world| {
            let errors = on_ranks(world, |rank| {
                let own = evaluator(train, test, sets).unwrap();
                own.raw_pixels(rank).err().expect("an error")
            });
            assert!(errors.iter().all(|error| error.exit_code() == exit_code::DATA), "{errors:?}");
            let heard: Vec<String> =
                errors.iter().filter(|error| !error.is_silent()).map(ToString::to_string).collect();
            assert_eq!(heard.len(), 1, "{errors:?}");
            heard[0].clone()
        })
    };
    let (train, test) = (Set::new("train", 0..20), Set::new("test", 100..108));
    // On two ranks and more, none has met more than the recipe passes over.
    for line in
        refused(&train.clone().damaged(&[1, 19]), &test, &["data.on_error=skip", "data.max_skipped=1"])
    {
        assert!(line.starts_with("2 damaged samples, data.max_skipped is 1; the last: train:"), "{line}");
    }
    let none_left = test.clone().damaged(&[0, 1, 2, 3, 4, 5, 6, 7]);
    for line in refused(&train, &none_left, &["data.on_error=skip"]) {
        assert!(line.starts_with("all 8 images to classify are damaged; the last: test:7: torn"), "{line}");
    }
    for line in refused(&train, &test.clone().damaged(&[5]), &["data.on_error=fail"]) {
        assert!(line.starts_with("bad sample test:5: torn"), "{line}");
    }
}

#[test]
fn every_label_is_looked_at_before_an_image_is() {
    let (train, test) = (Set::new("train", 0..20), Set::new("test", 100..108));
    let refused = |train: &Set, test: &Set, sets: &[&str]| {
        let error = evaluator(train, test, sets).err().expect("a label is missing");
        assert_eq!(error.exit_code(), exit_code::DATA);
        error.to_string()
    };
    let line = refused(&train.clone().unlabelled(&[0]), &test, &[]);
    assert!(line.starts_with("sample train:0 has no label"), "{line}");
    let line = refused(&train.clone().unlabelled(&[13, 19]), &test, &[]);
    assert!(line.starts_with("sample train:13 has no label"), "{line}");
    let line = refused(&train, &test.clone().unlabelled(&[7]), &[]);
    assert!(line.starts_with("sample test:7 has no label"), "{line}");
    // The bank is half of the images.
    let half = ["eval.knn_bank=10"];
    let bank: Vec<usize> = chosen(20, 10).into_iter().map(|index| index as usize).collect();
    let others: Vec<usize> = (0..20).filter(|index| !bank.contains(index)).collect();
    assert!(evaluator(&train.clone().unlabelled(&others), &test, &half).is_ok());
    refused(&train.clone().unlabelled(&bank[3..4]), &test, &half);
}

#[test]
fn one_image_is_too_few() {
    let alone = |train: std::ops::Range<u64>| {
        let train = Arc::new(Set::new("train", train));
        Evaluator::from_sources(&recipe(&[]), train, None, 2, Device::Cpu)
    };
    let error = alone(0..1).err().expect("too few");
    assert_eq!(error.exit_code(), exit_code::DATA);
    assert!(error.to_string().contains("too few"), "{error}");
    assert!(alone(0..2).is_ok());
}

#[test]
fn features_that_are_not_finite_are_a_divergence() {
    let outcomes = on_ranks(2, |rank| {
        let set = |name| Set::new(name, 0..8);
        let evaluator = evaluator(&set("train"), &set("test"), &[]).unwrap();
        let features = |images: &Tensor| -> Result<Tensor, WorkerError> {
            let pixels = images.f_flatten(1, -1)?;
            // The last image of the second rank's part of the bank.
            if rank.rank() == 1 {
                let _ = pixels.f_narrow(0, -1, 1)?.f_fill_(f64::NAN)?;
            }
            Ok(pixels)
        };
        let error = evaluator.features(rank, &features).err().expect("no features");
        (error.exit_code(), error.is_silent(), error.to_string())
    });
    assert_eq!(
        outcomes.iter().map(|(code, silent, _)| (*code, *silent)).collect::<Vec<_>>(),
        [(exit_code::DIVERGED, true), (exit_code::DIVERGED, false)]
    );
    assert!(outcomes[1].2.contains("the features of train:7 are not finite"), "{}", outcomes[1].2);
}

#[test]
fn images_are_chosen_whatever_the_order_of_classes() {
    for (len, count) in [(1, 1), (20, 0), (20, 20), (1000, 100)] {
        let places = chosen(len, count);
        assert_eq!(places, chosen(len, count), "the same ones every time");
        assert_eq!(places.len() as u64, count);
        assert!(places.is_sorted_by(|a, b| a < b) && places.iter().all(|&place| place < len));
    }
    // Ten classes that come in turn: each is asked for, and each is in the bank.
    let train: Arc<dyn Source> = Arc::new(Set::new("train", 0..1000));
    let evaluator = Evaluator::from_sources(&recipe(&[]), train, None, 2, Device::Cpu).unwrap();
    let Evaluator { bank, queries, .. } = evaluator;
    assert_eq!((bank.indices.len(), queries.indices.len()), (900, 100));
    assert!(queries.indices.iter().all(|index| !bank.indices.contains(index)));
    for class in 0..10 {
        assert!([&bank, &queries].map(|part| part.indices.iter().any(|i| i % 10 == class)) == [true; 2]);
    }
}

#[test]
fn a_run_evaluates_on_all_ranks_or_on_none() {
    let dir = tempfile::tempdir().unwrap();
    let set = |name: &str| {
        let image = dir.path().join(name);
        std::fs::create_dir_all(image.parent().unwrap()).unwrap();
        std::fs::write(image, "never looked at").unwrap();
    };
    for name in ["named/a/x.png", "nameless/x.png", "other/b/x.png"] {
        set(name);
    }
    let train: Arc<dyn Source> =
        mentee_data::open(&dir.path().join("named"), mentee_config::recipe::DataFormat::Auto).unwrap();
    // The held-out images of the last rank's machine are these; the other's are good.
    let on_one = |name: &str| -> Vec<Result<bool, i32>> {
        on_ranks(2, |rank| {
            let name = if rank.rank() == 1 { name } else { "named" };
            let recipe = recipe(&[&format!("eval.path={}", dir.path().join(name).display())]);
            let own = Evaluator::of_run(rank, &recipe, train.clone(), 1, Device::Cpu);
            own.map(|own| own.is_some()).map_err(|error| error.exit_code())
        })
    };
    assert_eq!(on_one("named"), [Ok(true); 2]);
    assert_eq!(on_one("nameless"), [Ok(false); 2]);
    assert_eq!(on_one("other"), [Ok(false); 2], "a class that the training images do not have");
    assert_eq!(on_one("nowhere"), [Err(exit_code::DATA); 2], "a wrong path is a mistake");
}
