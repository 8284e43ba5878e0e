//! Setting upright what lies on its side.

use crate::image::{CropBox, PlanarImage, RgbImage};

/// EXIF's orientations (Exif 2.32, 4.6.4): how a stored image of `width` x `height` is to be turned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) orientation: u8,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Turn {
    /// Where the pixel (x, y) of the upright image is stored.
    fn from(self, x: u32, y: u32) -> (u32, u32) {
        let (right, bottom) = (self.width - 1, self.height - 1);
        match self.orientation {
            2 => (right - x, y),
            3 => (right - x, bottom - y),
            4 => (x, bottom - y),
            5 => (y, x),
            6 => (y, bottom - x),
            7 => (right - y, bottom - x),
            8 => (right - y, x),
            _ => (x, y),
        }
    }

    /// The stored pixels of a part of the upright image.
    pub(super) fn stored(self, part: CropBox) -> CropBox {
        let (a, b) = self.from(part.x, part.y);
        let (c, d) = self.from(part.x + part.width - 1, part.y + part.height - 1);
        CropBox { x: a.min(c), y: b.min(d), width: a.abs_diff(c) + 1, height: b.abs_diff(d) + 1 }
    }

    /// Turns a whole image.
    pub(super) fn upright_whole(self, stored: &RgbImage, out: &mut RgbImage) {
        let sides = (stored.width, stored.height);
        (out.width, out.height) = if self.orientation >= 5 { (sides.1, sides.0) } else { sides };
        out.data.clear();
        for y in 0..out.height {
            for x in 0..out.width {
                let (sx, sy) = self.from(x, y);
                let at = (sy as usize * stored.width as usize + sx as usize) * 3;
                out.data.extend_from_slice(&stored.data[at..at + 3]);
            }
        }
    }

    /// Turns the stored pixels of `part`.
    pub(super) fn upright(self, stored: &PlanarImage, part: CropBox, out: &mut PlanarImage) {
        let (width, height) = (part.width as usize, part.height as usize);
        out.reset(part);
        for channel in 0..3 {
            let from = stored.from(channel, stored.part);
            let to = &mut out.data[channel * width * height..][..width * height];
            for (y, row) in (part.y..).zip(to.chunks_exact_mut(width)) {
                for (x, pixel) in (part.x..).zip(row) {
                    let (sx, sy) = self.from(x, y);
                    *pixel =
                        from[(sy - stored.part.y) as usize * stored.stride + (sx - stored.part.x) as usize];
                }
            }
        }
    }
}
