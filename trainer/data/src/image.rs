//! Images in memory: interleaved ([`RgbImage`]), or as planes of a part ([`PlanarImage`]).

/// Pixels a plane must have behind its last one, so that whole registers can be loaded.
pub(crate) const OVERREAD: usize = 32;

/// A part of an image, whole pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropBox {
    /// First column.
    pub x: u32,
    /// First row.
    pub y: u32,
    /// Columns, at least 1.
    pub width: u32,
    /// Rows, at least 1.
    pub height: u32,
}

impl CropBox {
    /// The whole of an image.
    #[must_use]
    pub fn whole(width: u32, height: u32) -> Self {
        Self { x: 0, y: 0, width, height }
    }

    /// The smallest box that holds both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        let right = (self.x + self.width).max(other.x + other.width);
        let bottom = (self.y + self.height).max(other.y + other.height);
        Self { x, y, width: right - x, height: bottom - y }
    }

    /// Whether `other` lies within.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.union(other) == self
    }
}

/// An 8-bit RGB image, rows from top to bottom, `[H, W, 3]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

/// A part of an 8-bit RGB image as three planes, `[3, rows, stride]`. Its memory is used again.
#[derive(Debug, Clone)]
pub struct PlanarImage {
    /// The part of the image that is here.
    pub part: CropBox,
    /// Bytes from one row to the next, at least the part's width.
    pub(crate) stride: usize,
    /// Rows in each plane, at least the part's height.
    pub(crate) rows: usize,
    /// Where the part's first pixel is in a plane.
    pub(crate) first: usize,
    /// Red, green, blue; a decoder may keep more behind them.
    pub(crate) data: Vec<u8>,
}

impl Default for PlanarImage {
    fn default() -> Self {
        Self {
            part: CropBox { x: 0, y: 0, width: 0, height: 0 },
            stride: 0,
            rows: 0,
            first: 0,
            data: Vec::new(),
        }
    }
}

impl PlanarImage {
    /// Takes `part` of an image.
    ///
    /// # Panics
    /// If `part` is not within `image`.
    pub fn take(&mut self, image: &RgbImage, part: CropBox) {
        let (width, height) = (part.width as usize, part.height as usize);
        self.reset(part);
        let (r, rest) = self.data.split_at_mut(width * height);
        let (g, rest) = rest.split_at_mut(width * height);
        let b = &mut rest[..width * height];
        let rows = r.chunks_exact_mut(width).zip(g.chunks_exact_mut(width)).zip(b.chunks_exact_mut(width));
        for (y, ((r, g), b)) in rows.enumerate() {
            let start = ((part.y as usize + y) * image.width as usize + part.x as usize) * 3;
            for (x, pixel) in image.data[start..start + 3 * width].chunks_exact(3).enumerate() {
                (r[x], g[x], b[x]) = (pixel[0], pixel[1], pixel[2]);
            }
        }
    }

    /// Becomes an image of `part` alone, rows without gaps, with no particular pixels.
    pub(crate) fn reset(&mut self, part: CropBox) {
        self.part = part;
        self.stride = part.width as usize;
        self.rows = part.height as usize;
        self.first = 0;
        self.data.resize(3 * self.plane_len() + OVERREAD, 0);
    }

    /// Bytes of a plane.
    pub(crate) fn plane_len(&self) -> usize {
        self.stride * self.rows
    }

    /// Plane `channel` from the first pixel of `part` (image coordinates, within [`Self::part`]) on; behind its last
    /// pixel there are [`OVERREAD`] bytes more.
    pub(crate) fn from(&self, channel: usize, part: CropBox) -> &[u8] {
        debug_assert!(self.part.contains(part));
        let (x, y) = ((part.x - self.part.x) as usize, (part.y - self.part.y) as usize);
        &self.data[channel * self.plane_len() + self.first + y * self.stride + x..]
    }

    /// The part as an interleaved image.
    pub fn to_rgb(&self, out: &mut RgbImage) {
        let (width, height) = (self.part.width as usize, self.part.height as usize);
        (out.width, out.height) = (self.part.width, self.part.height);
        out.data.resize(3 * width * height, 0);
        let planes: [&[u8]; 3] = std::array::from_fn(|channel| self.from(channel, self.part));
        for (y, row) in out.data.chunks_exact_mut(3 * width).enumerate() {
            let [r, g, b] = planes.map(|plane| &plane[y * self.stride..][..width]);
            for (((pixel, &r), &g), &b) in row.chunks_exact_mut(3).zip(r).zip(g).zip(b) {
                pixel.copy_from_slice(&[r, g, b]);
            }
        }
    }
}
