//! The loader's measurement counts what it measures: no batch made before or beyond.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Memory, views};
use mentee_config::recipe::Definition;
use mentee_data::bench::{LoaderBench, loader};
use mentee_data::{DataError, Encoding, Source};

/// How long reading one image takes.
const READ: Duration = Duration::from_millis(2);

/// Slow to read, and knows how often it was.
struct Slow {
    images: Arc<dyn Source>,
    reads: AtomicU64,
}

impl Source for Slow {
    fn len(&self) -> u64 {
        self.images.len()
    }
    fn read_into(&self, index: u64, buffer: &mut Vec<u8>) -> Result<Encoding, DataError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(READ);
        self.images.read_into(index, buffer)
    }
    fn label(&self, index: u64) -> Option<u32> {
        self.images.label(index)
    }
    fn key(&self, index: u64) -> String {
        self.images.key(index)
    }
    fn classes(&self) -> &[String] {
        self.images.classes()
    }
    fn digest(&self) -> String {
        self.images.digest()
    }
    fn stored(&self) -> (u64, u64) {
        self.images.stored()
    }
}

#[test]
fn few_images_are_no_faster_than_many() {
    let source = Arc::new(Slow { images: Memory::noise(100), reads: AtomicU64::new(0) });
    let bench = LoaderBench {
        source: source.clone(),
        views: views(Definition::Byol, 9),
        seed: 3,
        images: 100,
        rounds: 1,
        threads: vec![1, 2],
    };
    let report = loader(&bench, &mut |_, _| {}).expect("measured");
    for line in &report.threads {
        let most = line.threads as f64 / READ.as_secs_f64();
        assert!(line.images_per_s <= most, "{line:?}");
    }
    // 64 and 100 to warm up, four stages of 100, one whole batch of 64 for each number of threads.
    assert_eq!(source.reads.load(Ordering::Relaxed), 64 + 100 + 4 * 100 + 2 * 64);
}
