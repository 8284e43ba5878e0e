//! Where a decoding's samples go.

use super::idct::Place;
use super::markers::Header;
use crate::image::CropBox;

/// What a decoding makes: which MCUs, and where their samples go.
#[derive(Debug)]
pub(super) struct Layout {
    /// MCUs whose samples are made: columns and rows, half-open.
    pub(super) across: (usize, usize),
    pub(super) down: (usize, usize),
    /// Where each component's samples start in the image's memory, and their stride.
    pub(super) planes: [Place; 4],
    /// Pixels across and down of the full planes.
    pub(super) stride: usize,
    pub(super) rows: usize,
}

impl Layout {
    /// For `region` and what upsampling looks at around it. The full planes come first in memory, whichever component
    /// is sampled coarser has its samples behind them.
    pub(super) fn new(header: &Header, region: CropBox) -> (Self, usize) {
        let (mcu_w, mcu_h) = (8 * header.hmax, 8 * header.vmax);
        let axis = |start: u32, length: u32, mcu: usize, margin: usize, count: usize| {
            let (start, end) = (start as usize, (start + length) as usize);
            (start.saturating_sub(margin) / mcu, (end + margin).div_ceil(mcu).min(count))
        };
        // The filter looks one coarse sample to each side.
        let margin = |factor: usize| if factor > 1 { factor } else { 0 };
        let across = axis(region.x, region.width, mcu_w, margin(header.hmax), header.mcus_across());
        let down = axis(region.y, region.height, mcu_h, margin(header.vmax), header.mcus_down());
        let (columns, rows) = (across.1 - across.0, down.1 - down.0);
        let (stride, full_rows) = (columns * mcu_w, rows * mcu_h);
        let full = stride * full_rows;
        let mut end = full * header.components.len().max(3);
        let mut planes = [Place::default(); 4];
        for (c, component) in header.components.iter().enumerate() {
            if component.h == header.hmax && component.v == header.vmax {
                planes[c] = Place { at: c * full, stride };
            } else {
                planes[c] = Place { at: end, stride: columns * component.h * 8 };
                end += columns * component.h * 8 * rows * component.v * 8;
            }
        }
        (Self { across, down, planes, stride, rows: full_rows }, end)
    }
}
