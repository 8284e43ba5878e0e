//! Entropy-coded scans to samples: a frame in one scan straight through, any other by way of all its coefficients.

use super::JpegError;
use super::bits::{BitReader, Segments};
use super::colour::{self, Rows};
use super::huffman::{Class, END_OF_BLOCK, Lookup, Table};
use super::idct::{self, Block, Place};
use super::layout::Layout;
use super::markers::{Component, Header, Tables, ZIGZAG, next_scan, segment};
use crate::image::{CropBox, OVERREAD, PlanarImage};

/// Scans of a progressive file, at most: encoders write about ten. Bounds the time a hostile file can take.
const MAX_SCANS: usize = 200;

/// Memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// All coefficients, component after component, of a frame in several scans.
    coefficients: Vec<i16>,
    rows: Rows,
}

/// The header of a scan.
#[derive(Debug)]
struct Scan {
    /// Which component of the frame, DC and AC table: for each of the scan.
    parts: Vec<(usize, usize, usize)>,
    /// Spectral selection and successive approximation.
    first: usize,
    last: usize,
    high: u32,
    low: u32,
    /// Where its entropy-coded bytes start.
    data: usize,
}

fn read_scan(file: &[u8], at: usize, header: &Header) -> Result<Scan, JpegError> {
    const BAD: JpegError = JpegError::Damaged("an impossible scan header");
    let (body, data) = segment(file, at)?;
    let (&count, rest) = body.split_first().ok_or(BAD)?;
    let (list, parameters) = rest.split_at_checked(2 * usize::from(count)).ok_or(BAD)?;
    let &[first, last, approximation] = parameters else { return Err(BAD) };
    let parts = list
        .chunks_exact(2)
        .map(|pair| {
            let component = header.components.iter().position(|c| c.id == pair[0]).ok_or(BAD)?;
            Ok((component, usize::from(pair[1] >> 4 & 3), usize::from(pair[1] & 3)))
        })
        .collect::<Result<Vec<_>, JpegError>>()?;
    let repeated = parts.iter().enumerate().any(|(i, part)| parts[..i].iter().any(|p| p.0 == part.0));
    let blocks: usize = parts.iter().map(|&(c, ..)| header.components[c].h * header.components[c].v).sum();
    if parts.is_empty() || repeated || (parts.len() > 1 && blocks > 10) {
        return Err(BAD);
    }
    let (first, last) = (usize::from(first), usize::from(last));
    let (high, low) = (u32::from(approximation >> 4), u32::from(approximation & 15));
    if header.progressive {
        let dc = first == 0;
        if first > last || last > 63 || (dc && last != 0) || (!dc && parts.len() > 1) || low > 13 {
            return Err(BAD);
        }
        if high != 0 && high != low + 1 {
            return Err(BAD);
        }
    }
    Ok(Scan { parts, first, last, high, low, data })
}

/// See [`super::Decoder::decode`].
pub(super) fn decode(
    file: &[u8],
    header: &Header,
    tables: &mut Tables,
    segments: &mut Segments,
    work: &mut Work,
    region: CropBox,
    out: &mut PlanarImage,
) -> Result<(), JpegError> {
    let (layout, bytes) = Layout::new(header, region);
    out.part = region;
    out.stride = layout.stride;
    out.rows = layout.rows;
    let origin = (layout.across.0 * 8 * header.hmax, layout.down.0 * 8 * header.vmax);
    out.first = (region.y as usize - origin.1) * layout.stride + (region.x as usize - origin.0);
    if out.data.len() < bytes + OVERREAD {
        out.data.resize(bytes + OVERREAD, 0);
    }
    let scan = read_scan(file, header.scan, header)?;
    let mut emit = Emit { header, layout: &layout, region, next: region.y as usize, rows: &mut work.rows };
    if !header.progressive && scan.parts.len() == header.components.len() {
        // What was not asked for need not be there: the caller has looked for the end of the image.
        segments.unstuff(file, scan.data)?;
        return straight(header, tables, &scan, segments, &mut emit, &mut out.data);
    }
    let coefficients = &mut work.coefficients;
    let steps = buffered(file, header, tables, scan, segments, coefficients)?;
    transform(header, &steps, coefficients, &mut emit, &mut out.data)
}

/// Turns samples into RGB as soon as all that a row looks at is there.
struct Emit<'a> {
    header: &'a Header,
    layout: &'a Layout,
    region: CropBox,
    /// The next row to be made.
    next: usize,
    rows: &'a mut Rows,
}

impl Emit<'_> {
    /// The samples of MCU row `mcu_row` and all above it are there.
    fn after(&mut self, mcu_row: usize, data: &mut [u8]) {
        let end = (self.region.y + self.region.height) as usize;
        let mut ready = (mcu_row + 1) * 8 * self.header.vmax;
        if self.header.vmax > 1 && mcu_row + 1 < self.header.mcus_down() {
            // The last row of pixels looks at the samples below.
            ready -= self.header.vmax;
        }
        let until = ready.min(end);
        if self.next < until {
            colour::rows(self.header, self.layout, self.next..until, self.rows, data);
            self.next = until;
        }
    }
}

/// One component's part in a sequential scan.
struct Part<'a> {
    component: &'a Component,
    dc: &'a Table,
    /// Its [`Ac`], which components share.
    ac: usize,
    plane: Place,
}

/// How a component's other coefficients are read.
struct Ac<'a> {
    table: &'a Table,
    /// The lookup of `table` and the steps, side by side: the loop over symbols has one register for both.
    lookup: Lookup,
    steps: Steps,
}

/// Quantisation step and place of the k-th coefficient, in the low and high half of the (k+1)-th.
type Steps = [u32; 128];

fn steps(quantisation: impl Fn(usize) -> u16) -> Steps {
    std::array::from_fn(|at| match at.checked_sub(1) {
        Some(k @ ..64) => u32::from(quantisation(k)) | u32::from(ZIGZAG[k]) << 16,
        _ => 0,
    })
}

/// How two blocks are transformed.
trait Transform {
    fn pair(blocks: &[Block; 2], out: &mut [u8], places: [Place; 2]);
}

struct Portable;

impl Transform for Portable {
    #[inline(always)]
    fn pair(blocks: &[Block; 2], out: &mut [u8], places: [Place; 2]) {
        idct::pair_portable(blocks, out, places);
    }
}

#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Transform for Avx2 {
    #[inline(always)]
    fn pair(blocks: &[Block; 2], out: &mut [u8], places: [Place; 2]) {
        // SAFETY: `Avx2` is named only where AVX2 was found.
        unsafe { idct::pair_avx2(blocks, out, places) }
    }
}

/// Blocks waiting to be transformed two by two.
struct Queue {
    blocks: [Block; 2],
    places: [Place; 2],
    count: usize,
}

impl Queue {
    fn new() -> Self {
        Self { blocks: [[0; 64]; 2], places: [Place::default(); 2], count: 0 }
    }

    /// The block that was just filled goes to `place`.
    #[inline(always)]
    fn push<T: Transform>(&mut self, place: Place, out: &mut [u8]) {
        self.places[self.count] = place;
        self.count += 1;
        if self.count == 2 {
            T::pair(&self.blocks, out, self.places);
            self.blocks = [[0; 64]; 2];
            self.count = 0;
        }
    }

    fn flush<T: Transform>(&mut self, out: &mut [u8]) {
        if self.count == 1 {
            self.blocks[1] = self.blocks[0];
            let place = self.places[0];
            self.push::<T>(place, out);
        }
    }
}

/// A sequential frame whose components are all in one scan.
fn straight(
    header: &Header,
    tables: &Tables,
    scan: &Scan,
    segments: &Segments,
    emit: &mut Emit<'_>,
    data: &mut [u8],
) -> Result<(), JpegError> {
    #[cfg(target_arch = "x86_64")]
    {
        // Shifts by any count in one instruction: a third of the time.
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
        fn wide(
            header: &Header,
            tables: &Tables,
            scan: &Scan,
            segments: &Segments,
            emit: &mut Emit<'_>,
            data: &mut [u8],
        ) -> Result<(), JpegError> {
            straight_on::<Avx2>(header, tables, scan, segments, emit, data)
        }
        if crate::cpu::has_avx2() {
            // SAFETY: `has_avx2` has found all that `wide` asks for.
            return unsafe { wide(header, tables, scan, segments, emit, data) };
        }
    }
    straight_on::<Portable>(header, tables, scan, segments, emit, data)
}

#[inline(always)]
fn straight_on<T: Transform>(
    header: &Header,
    tables: &Tables,
    scan: &Scan,
    segments: &Segments,
    emit: &mut Emit<'_>,
    data: &mut [u8],
) -> Result<(), JpegError> {
    let layout = emit.layout;
    // By table and quantisation, so that both colours have the same.
    let mut acs: Vec<((usize, usize), Ac)> = Vec::new();
    let mut parts = Vec::with_capacity(scan.parts.len());
    for &(c, dc, ac) in &scan.parts {
        let component = &header.components[c];
        let tables_of = (ac, component.quantisation);
        let at = match acs.iter().position(|(of, _)| *of == tables_of) {
            Some(at) => at,
            None => {
                let table = tables.huffman(Class::Ac, ac)?;
                let quantisation = tables.quantisation(component.quantisation)?;
                let steps = steps(|k| quantisation[k]);
                acs.push((tables_of, Ac { table, lookup: *table.lookup, steps }));
                acs.len() - 1
            }
        };
        parts.push(Part { component, dc: tables.huffman(Class::Dc, dc)?, ac: at, plane: layout.planes[c] });
    }
    // Blocks of an MCU: the part, and where it is in the part's MCU.
    let blocks: Vec<(usize, usize, usize)> = (0..parts.len())
        .flat_map(|p| {
            let Component { h, v, .. } = *parts[p].component;
            (0..v).flat_map(move |y| (0..h).map(move |x| (p, x, y)))
        })
        .collect();

    let across = header.mcus_across();
    let (left, right) = layout.across;
    let (top, bottom) = layout.down;
    let interval = match tables.restart_interval {
        0 if segments.len() > 1 => return Err(JpegError::Damaged("a restart marker that was not announced")),
        0 => usize::MAX,
        interval => interval,
    };
    let end = (bottom - 1) * across + right;
    let mut queue = Queue::new();
    let mut mcu = 0;
    let mut emitted = top;
    while mcu < end {
        // The next MCU that is wanted: the segment it is in is read, those before it are not.
        let (y, x) = (mcu / across, mcu % across);
        let wanted = if y < top {
            top * across + left
        } else if x < left {
            y * across + left
        } else if x >= right {
            (y + 1) * across + left
        } else {
            mcu
        };
        let segment = wanted / interval;
        mcu = mcu.max(segment * interval);
        let mut reader = segments.reader(segment).ok_or(JpegError::Truncated)?;
        let last = segment + 1 == segments.len();
        let stop = end.min(segment.saturating_add(1).saturating_mul(interval));
        let mut dc = [0i32; 4];
        let (mut y, mut x) = (mcu / across, mcu % across);
        while mcu < stop {
            let inside = y >= top && x >= left && x < right;
            for &(p, bx, by) in &blocks {
                let part = &parts[p];
                let ac = &acs[part.ac].1;
                dc[p] = dc[p].wrapping_add(part.dc.difference(&mut reader)?);
                if !inside {
                    skip_block(&mut reader, ac)?;
                    continue;
                }
                let coefficient = (dc[p].wrapping_mul(ac.steps[1] as u16 as i32)) as i16;
                let block = &mut queue.blocks[queue.count];
                let flat = read_block(&mut reader, (ac.table, &ac.lookup), &ac.steps, block)?;
                let Component { h, v, .. } = *part.component;
                let row = ((y - top) * v + by) * 8;
                let column = ((x - left) * h + bx) * 8;
                let place =
                    Place { at: part.plane.at + row * part.plane.stride + column, stride: part.plane.stride };
                if flat {
                    idct::flat(coefficient, data, place);
                } else {
                    block[0] = coefficient;
                    queue.push::<T>(place, data);
                }
            }
            if reader.overrun() {
                return Err(if last {
                    JpegError::Truncated
                } else {
                    JpegError::Damaged("a scan that runs over a restart marker")
                });
            }
            mcu += 1;
            x += 1;
            if x == across {
                (x, y) = (0, y + 1);
            }
            // All that is wanted of a row is there once the next begins.
            if y > emitted {
                queue.flush::<T>(data);
                while emitted < y.min(bottom) {
                    emit.after(emitted, data);
                    emitted += 1;
                }
            }
        }
    }
    queue.flush::<T>(data);
    for row in emitted..bottom {
        emit.after(row, data);
    }
    Ok(())
}

/// The other 63 coefficients of a block, into `block`, which is zero. Whether all of them are zero.
#[inline(always)]
fn read_block(
    reader: &mut BitReader<'_>,
    (table, lookup): (&Table, &Lookup),
    steps: &Steps,
    block: &mut Block,
) -> Result<bool, JpegError> {
    let mut k = 1;
    loop {
        reader.refill();
        // A symbol and its value have 31 bits at the most, and nearly always leave enough of the window for another.
        for _ in 0..2 {
            if !reader.has_symbol() {
                break;
            }
            let symbol = table.symbol_by(lookup, reader.peek()).ok_or(JpegError::BAD_CODE)?;
            let value = symbol.value(reader.peek());
            reader.take(symbol.total_bits());
            k += symbol.advance();
            let step = steps[(k & 127) as usize];
            // At the end of a block this writes 0 over a 0.
            block[(step >> 16 & 63) as usize] = value.wrapping_mul(i32::from(step as u16)) as i16;
            if k > 63 {
                if k > 64 && k <= END_OF_BLOCK {
                    return Err(OVERLONG);
                }
                return Ok(k == 1 + 1 + END_OF_BLOCK);
            }
        }
    }
}

const OVERLONG: JpegError = JpegError::Damaged("a block of more than 64 coefficients");

/// As [`read_block`], keeping nothing.
#[inline(always)]
fn skip_block(reader: &mut BitReader<'_>, ac: &Ac) -> Result<(), JpegError> {
    let mut k = 1;
    loop {
        reader.refill();
        for _ in 0..2 {
            if !reader.has_symbol() {
                break;
            }
            let symbol = ac.table.symbol_by(&ac.lookup, reader.peek()).ok_or(JpegError::BAD_CODE)?;
            reader.take(symbol.total_bits());
            k += symbol.advance();
            if k > 63 {
                return if k > 64 && k <= END_OF_BLOCK { Err(OVERLONG) } else { Ok(()) };
            }
        }
    }
}

/// Blocks across and down that a component's coefficients are kept for: whole MCUs.
fn kept(header: &Header, component: &Component) -> (usize, usize) {
    (header.mcus_across() * component.h, header.mcus_down() * component.v)
}

/// A table of 64 steps.
type Quantisation = [u16; 64];

/// Reads all scans into `coefficients`: natural order, not multiplied. Returns each component's table, which is the one that held at
/// its first scan (libjpeg's `latch_quant_tables`).
fn buffered(
    file: &[u8],
    header: &Header,
    tables: &mut Tables,
    mut scan: Scan,
    segments: &mut Segments,
    coefficients: &mut Vec<i16>,
) -> Result<Vec<Quantisation>, JpegError> {
    let mut starts = Vec::with_capacity(4);
    let mut total = 0;
    for component in &header.components {
        let (across, down) = kept(header, component);
        starts.push(total);
        total += across * down * 64;
    }
    coefficients.clear();
    coefficients.resize(total, 0);
    let mut seen = 0u32;
    let mut latched = vec![None; header.components.len()];
    for _ in 0..MAX_SCANS {
        for &(c, ..) in &scan.parts {
            if latched[c].is_none() {
                latched[c] = Some(*tables.quantisation(header.components[c].quantisation)?);
            }
        }
        let stop = segments.unstuff(file, scan.data)?;
        if tables.restart_interval == 0 && segments.len() > 1 {
            return Err(JpegError::Damaged("a restart marker that was not announced"));
        }
        read_coefficients(header, tables, &scan, segments, &starts, coefficients)?;
        if scan.first == 0 {
            scan.parts.iter().for_each(|part| seen |= 1 << part.0);
        }
        match next_scan(file, stop, tables)? {
            Some(at) => scan = read_scan(file, at, header)?,
            None if seen.count_ones() as usize == header.components.len() => {
                return Ok(latched.into_iter().flatten().collect());
            }
            None => return Err(JpegError::Truncated),
        }
    }
    Err(JpegError::Unsupported("more than 200 scans"))
}

fn read_coefficients(
    header: &Header,
    tables: &Tables,
    scan: &Scan,
    segments: &Segments,
    starts: &[usize],
    coefficients: &mut [i16],
) -> Result<(), JpegError> {
    // A component alone has the blocks its samples need; together they fill whole MCUs.
    let (across, down) = match scan.parts[..] {
        [(c, ..)] => {
            let component = &header.components[c];
            (component.width.div_ceil(8), component.height.div_ceil(8))
        }
        _ => (header.mcus_across(), header.mcus_down()),
    };
    let interval = if tables.restart_interval == 0 { usize::MAX } else { tables.restart_interval };
    let total = across * down;
    let mut state = Progress { dc: [0; 4], run: 0 };
    let mut reader = segments.reader(0).ok_or(JpegError::Truncated)?;
    for mcu in 0..total {
        if mcu > 0 && mcu % interval == 0 {
            reader = segments.reader(mcu / interval).ok_or(JpegError::Truncated)?;
            state = Progress { dc: [0; 4], run: 0 };
        }
        let (y, x) = (mcu / across, mcu % across);
        for (p, &(c, dc, ac)) in scan.parts.iter().enumerate() {
            let component = &header.components[c];
            let stride = kept(header, component).0;
            let (h, v) = if scan.parts.len() == 1 { (1, 1) } else { (component.h, component.v) };
            for (by, bx) in (0..v).flat_map(|by| (0..h).map(move |bx| (by, bx))) {
                let at = starts[c] + ((y * v + by) * stride + x * h + bx) * 64;
                let block = &mut coefficients[at..at + 64];
                if header.progressive {
                    state.block(&mut reader, scan, p, (dc, ac), tables, block)?;
                } else {
                    state.sequential(&mut reader, p, (dc, ac), tables, block)?;
                }
            }
        }
        if reader.overrun() {
            return Err(JpegError::Truncated);
        }
    }
    Ok(())
}

/// What is carried from block to block.
struct Progress {
    /// Last DC value of each of the scan's components.
    dc: [i32; 4],
    /// Blocks still to come that end at once.
    run: u32,
}

impl Progress {
    fn sequential(
        &mut self,
        reader: &mut BitReader<'_>,
        part: usize,
        (dc, ac): (usize, usize),
        tables: &Tables,
        block: &mut [i16],
    ) -> Result<(), JpegError> {
        let block: &mut Block = block.try_into().map_err(|_| OVERLONG)?;
        let steps = steps(|_| 1);
        let ac = tables.huffman(Class::Ac, ac)?;
        self.dc[part] = self.dc[part].wrapping_add(tables.huffman(Class::Dc, dc)?.difference(reader)?);
        read_block(reader, (ac, &ac.lookup), &steps, block)?;
        block[0] = self.dc[part] as i16;
        Ok(())
    }

    /// One block of one progressive scan (T.81, G.1.2).
    fn block(
        &mut self,
        reader: &mut BitReader<'_>,
        scan: &Scan,
        part: usize,
        (dc, ac): (usize, usize),
        tables: &Tables,
        block: &mut [i16],
    ) -> Result<(), JpegError> {
        match (scan.first, scan.high) {
            (0, 0) => {
                let difference = tables.huffman(Class::Dc, dc)?.difference(reader)?;
                self.dc[part] = self.dc[part].wrapping_add(difference);
                block[0] = (self.dc[part] << scan.low) as i16;
                Ok(())
            }
            (0, _) => {
                block[0] |= (reader.bits(1) << scan.low) as i16;
                Ok(())
            }
            (_, 0) => self.first(reader, scan, tables.huffman(Class::Ac, ac)?, block),
            _ => self.refine(reader, scan, tables.huffman(Class::Ac, ac)?, block),
        }
    }

    /// The first bits of some coefficients (G.1.2.2).
    fn first(
        &mut self,
        reader: &mut BitReader<'_>,
        scan: &Scan,
        table: &Table,
        block: &mut [i16],
    ) -> Result<(), JpegError> {
        if self.run > 0 {
            self.run -= 1;
            return Ok(());
        }
        let mut k = scan.first;
        while k <= scan.last {
            reader.refill();
            let symbol = table.symbol(reader.peek()).ok_or(JpegError::BAD_CODE)?;
            let value = symbol.value(reader.peek());
            reader.take(symbol.total_bits());
            let run = symbol.run() & 15;
            if symbol.run() & END_OF_BLOCK != 0 {
                self.run = (1 << run) - 1 + reader.bits(run);
                break;
            }
            k += run as usize;
            if symbol.size() > 0 {
                if k > scan.last {
                    return Err(OVERLONG);
                }
                block[usize::from(ZIGZAG[k])] = (value << scan.low) as i16;
            }
            k += 1;
        }
        Ok(())
    }

    /// One more bit of coefficients that are not zero, and new ones between them (G.1.2.3).
    fn refine(
        &mut self,
        reader: &mut BitReader<'_>,
        scan: &Scan,
        table: &Table,
        block: &mut [i16],
    ) -> Result<(), JpegError> {
        let bit = 1i16 << scan.low;
        let mut k = scan.first;
        if self.run == 0 {
            while k <= scan.last {
                reader.refill();
                let symbol = table.symbol(reader.peek()).ok_or(JpegError::BAD_CODE)?;
                reader.take(symbol.code_bits());
                let mut zeros = symbol.run() & 15;
                let mut value = 0;
                if symbol.size() > 0 {
                    if symbol.size() != 1 {
                        return Err(JpegError::Damaged("a refinement of more than one bit"));
                    }
                    value = if reader.bits(1) == 1 { bit } else { -bit };
                } else if symbol.run() & END_OF_BLOCK != 0 {
                    self.run = (1 << zeros) + reader.bits(zeros);
                    break;
                }
                // Over `zeros` coefficients that are still zero, to the next that is.
                while k <= scan.last {
                    let coefficient = &mut block[usize::from(ZIGZAG[k])];
                    if *coefficient != 0 {
                        refine_one(reader, coefficient, bit);
                    } else if zeros == 0 {
                        *coefficient = value;
                        k += 1;
                        break;
                    } else {
                        zeros -= 1;
                    }
                    k += 1;
                }
            }
        }
        if self.run > 0 {
            for k in k..=scan.last {
                let coefficient = &mut block[usize::from(ZIGZAG[k])];
                if *coefficient != 0 {
                    refine_one(reader, coefficient, bit);
                }
            }
            self.run -= 1;
        }
        Ok(())
    }
}

fn refine_one(reader: &mut BitReader<'_>, coefficient: &mut i16, bit: i16) {
    if reader.bits(1) == 1 && *coefficient & bit == 0 {
        *coefficient = coefficient.wrapping_add(if *coefficient >= 0 { bit } else { -bit });
    }
}

/// Coefficients to samples, for the MCUs of the layout.
fn transform(
    header: &Header,
    steps: &[Quantisation],
    coefficients: &[i16],
    emit: &mut Emit<'_>,
    data: &mut [u8],
) -> Result<(), JpegError> {
    let layout = emit.layout;
    let pair = |blocks: &[Block; 2], data: &mut [u8], places| {
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::has_avx2() {
            // SAFETY: the processor has AVX2.
            return unsafe { idct::pair_avx2(blocks, data, places) };
        }
        idct::pair_portable(blocks, data, places);
    };
    let natural = |table: &Quantisation| {
        let mut natural = [0u16; 64];
        (0..64).for_each(|k| natural[usize::from(ZIGZAG[k])] = table[k]);
        natural
    };
    let steps: Vec<Quantisation> = steps.iter().map(natural).collect();
    for y in layout.down.0..layout.down.1 {
        let mut start = 0;
        for (c, component) in header.components.iter().enumerate() {
            let (stride, down) = kept(header, component);
            let plane = layout.planes[c];
            for by in 0..component.v {
                let row = y * component.v + by;
                let first = layout.across.0 * component.h;
                let columns = (layout.across.1 - layout.across.0) * component.h;
                let block = |column: usize| -> Block {
                    let at = start + (row * stride + first + column.min(columns - 1)) * 64;
                    std::array::from_fn(|i| {
                        (i32::from(coefficients[at + i]).wrapping_mul(i32::from(steps[c][i]))) as i16
                    })
                };
                let place = |column: usize| Place {
                    at: plane.at
                        + ((row - layout.down.0 * component.v) * plane.stride + column.min(columns - 1)) * 8,
                    stride: plane.stride,
                };
                for column in (0..columns).step_by(2) {
                    pair(&[block(column), block(column + 1)], data, [place(column), place(column + 1)]);
                }
            }
            start += stride * down * 64;
        }
        emit.after(y, data);
    }
    Ok(())
}
