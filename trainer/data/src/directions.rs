//! Views of images that a device holds, as directions for a kernel: everything drawn and worked out, so that nothing is left but
//! integers and floats to be added and multiplied in the order in which [`crate::augment`] does it. The pixels are the same, to
//! the last bit.
//!
//! ```text
//!   [view 0: HEAD words] [view 1: HEAD words] …  [weights of view 0] [weights of view 1] …      words of 32 bits
//! ```

use mentee_config::recipe::Definition;

use crate::augment::{Augmenter, ColourOp, ViewDraw, ViewKey};
use crate::blur::{self, Edge};
use crate::held::Images;
use crate::loader::{LoaderConfig, NUM_VIEWS};
use crate::resize::Resizer;

/// Words of a view before the weights.
pub const HEAD: usize = 32;

/// Places of a head's words. `trainer/torch-ext/cpp/views.cu` reads them.
mod word {
    /// Two: where the crop's first pixel is, bytes from the first image's.
    pub(super) const PIXELS: usize = 0;
    /// Bytes from one row of the image to the next.
    pub(super) const STRIDE: usize = 2;
    pub(super) const WIDTH: usize = 3;
    pub(super) const HEIGHT: usize = 4;
    /// Four: where the starts are, where the weights, pairs of weights of a row, bits of their fraction.
    pub(super) const DOWN: usize = 5;
    /// As `DOWN`, of a column.
    pub(super) const ACROSS: usize = 9;
    /// How many colour operations there are.
    pub(super) const OPS: usize = 13;
    /// Four: what they are.
    pub(super) const KINDS: usize = 14;
    /// Four: how strong (f32).
    pub(super) const STRENGTHS: usize = 18;
    /// 0: colours stay; 1, 2: gray by the weights of JAX, of PIL.
    pub(super) const GRAY: usize = 22;
    /// Weights of the blur on each side; 0: there is none.
    pub(super) const RADIUS: usize = 23;
    /// Where the blur's weights are (f32), from the middle outwards.
    pub(super) const TAPS: usize = 24;
    /// Whether the blur sees the border repeated, or else nothing.
    pub(super) const REPEATS: usize = 25;
    pub(super) const SOLARIZE: usize = 26;
}

/// A colour operation's word.
fn kind(op: ColourOp, definition: Definition) -> (i32, f32) {
    match (op, definition) {
        (ColourOp::Brightness(delta), Definition::Byol) => (0, delta),
        (ColourOp::Brightness(factor), Definition::Torchvision) => (1, factor),
        (ColourOp::Contrast(factor), Definition::Byol) => (2, factor),
        (ColourOp::Contrast(factor), Definition::Torchvision) => (3, factor),
        (ColourOp::Saturation(factor), Definition::Byol) => (4, factor),
        (ColourOp::Saturation(factor), Definition::Torchvision) => (5, factor),
        (ColourOp::Hue(turns), _) => (6, turns),
    }
}

fn bits(x: f32) -> i32 {
    x.to_bits() as i32
}

/// One step's views.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directed {
    /// From 0.
    pub step: u64,
    /// Its epoch.
    pub epoch: u64,
    /// The samples, in the order of the global batch. `[N]`
    pub ids: Vec<u64>,
    /// Of all views, `[V, N]`; see the module.
    pub words: Vec<i32>,
}

/// Directs the views that a [`crate::Loader`] of the same settings would make.
pub struct Director {
    config: LoaderConfig,
    augmenter: Augmenter,
    images: Images,
    resizer: Resizer,
}

impl Director {
    /// Of all samples of `config.source`, which `images` are.
    #[must_use]
    pub fn new(config: LoaderConfig, images: Images) -> Self {
        let augmenter = Augmenter::new(&config.views);
        Self { config, augmenter, images, resizer: Resizer::default() }
    }

    /// The settings it was given.
    #[must_use]
    pub fn into_config(self) -> LoaderConfig {
        self.config
    }

    /// The views of a step; none after the last.
    pub fn step(&mut self, step: u64) -> Option<Directed> {
        if step >= self.config.last_step {
            return None;
        }
        let (epoch, ids) = self.config.order.share(step, self.config.rank_share.clone());
        let mut words = vec![0; NUM_VIEWS * ids.len() * HEAD];
        let mut places = 0..;
        for view in 0..NUM_VIEWS as u8 {
            for (&sample, place) in ids.iter().zip(&mut places) {
                let key = ViewKey { seed: self.config.seed, epoch, sample, view };
                let size = self.images.sizes[sample as usize];
                let draw = self.augmenter.draw(size.width, size.height, key);
                self.direct(sample, &draw, place, &mut words);
            }
        }
        Some(Directed { step, epoch, ids, words })
    }

    fn direct(&mut self, sample: u64, draw: &ViewDraw, place: usize, words: &mut Vec<i32>) {
        let (views, size) = (self.augmenter.views(), self.images.sizes[sample as usize]);
        let crop = draw.crop;
        let pixels = size.first + 3 * (u64::from(crop.y) * u64::from(size.width) + u64::from(crop.x));
        let mut head = [0; HEAD];
        head[word::PIXELS] = pixels as i32;
        head[word::PIXELS + 1] = (pixels >> 32) as i32;
        head[word::STRIDE] = 3 * size.width as i32;
        head[word::WIDTH] = crop.width as i32;
        head[word::HEIGHT] = crop.height as i32;
        let filters = self.augmenter.filters(&mut self.resizer, draw);
        for (filter, at) in filters.into_iter().zip([word::DOWN, word::ACROSS]) {
            head[at] = words.len() as i32;
            words.extend(filter.starts.iter().map(|&start| start as i32));
            head[at + 1] = words.len() as i32;
            words.extend(&filter.weights);
            head[at + 2] = filter.pairs as i32;
            head[at + 3] = filter.precision as i32;
        }
        head[word::OPS] = draw.jitter.len() as i32;
        for (n, &op) in draw.jitter.iter().enumerate() {
            let (kind, strength) = kind(op, views.definition);
            head[word::KINDS + n] = kind;
            head[word::STRENGTHS + n] = bits(strength);
        }
        if draw.grayscale {
            head[word::GRAY] = if views.definition == Definition::Byol { 1 } else { 2 };
        }
        if let Some(sigma) = draw.blur {
            let (taps, edge) = blur::weights(views.definition, sigma, views.size as usize);
            head[word::RADIUS] = taps.len() as i32 - 1;
            head[word::TAPS] = words.len() as i32;
            head[word::REPEATS] = i32::from(edge == Edge::Repeat);
            words.extend(taps.into_iter().map(bits));
        }
        head[word::SOLARIZE] = i32::from(draw.solarize);
        words[place * HEAD..][..HEAD].copy_from_slice(&head);
    }
}
