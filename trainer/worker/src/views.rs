//! A batch of the loader as a tensor, and a strip of example views as a picture.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use mentee_config::plan::first_row;
use mentee_config::recipe::Views;
use mentee_data::Batch;
use mentee_ssl::SslError;
use mentee_ssl::state::VIEWS;
use mentee_torch_ext::over_memory;
use tch::{Kind, Tensor};

use crate::error::WorkerError;

/// Image pairs in the strip.
const EXAMPLES: usize = 12;

/// A batch's views as [V·N, 3, H, W], channels-last in memory: in f32 the batch's own memory, which the tensor and all that is
/// made of it keep.
pub fn tensor(batch: &Arc<Batch>, size: u32, kind: Kind) -> Result<Tensor, WorkerError> {
    let side = i64::from(size);
    let rows = VIEWS * batch.ids.len() as i64;
    let len = rows * side * side * 3;
    assert_eq!(batch.views.len() as i64, len, "the loader fills whole batches");
    let memory = batch.views.as_ptr().cast_mut().cast();
    // SAFETY: the batch holds that many f32, which nobody changes as long as the tensor has its part in it.
    let flat = unsafe { over_memory(memory, len, Kind::Float, batch.clone()) }?;
    let nchw = flat.f_view([rows, side, side, 3])?.f_permute([0, 3, 1, 2])?;
    Ok(if kind == Kind::Double { nchw.f_to_kind(Kind::Double)? } else { nchw })
}

/// The micro-batches of a batch of views [V·N, 3, H, W] of this rank's share: [V·n, 3, H, W] each, where the n samples
/// are those that `mentee_config::plan::first_row` says. One part is the batch itself.
pub fn micro_batches(views: &Tensor, own: &Range<u64>, parts: u64) -> Result<Vec<Tensor>, SslError> {
    if parts == 1 {
        return Ok(vec![views.shallow_clone()]);
    }
    let rows = views.size()[0] / VIEWS;
    (0..parts)
        .map(|part| {
            let first = first_row(own, part, parts) as i64;
            let both = (0..VIEWS)
                .map(|view| {
                    Ok(views.f_narrow(0, view * rows, rows)?.f_slice(
                        0,
                        Some(first.min(rows)),
                        Some(rows),
                        parts as i64,
                    )?)
                })
                .collect::<Result<Vec<_>, SslError>>()?;
            Ok(Tensor::f_cat(&both, 0)?)
        })
        .collect()
}

/// Writes `views.png`: the first images of a batch, view 1 above view 2, normalisation undone.
pub fn write_strip(path: &Path, batch: &Batch, views: &Views) -> Result<(), WorkerError> {
    let side = views.size as usize;
    let count = batch.ids.len().min(EXAMPLES);
    let (width, height) = (count * side, 2 * side);
    let mut pixels = vec![0u8; width * height * 3];
    let image_len = side * side * 3;
    for view in 0..2 {
        for index in 0..count {
            let image = &batch.views[(view * batch.ids.len() + index) * image_len..][..image_len];
            for y in 0..side {
                for x in 0..side {
                    for c in 0..3 {
                        let value = f64::from(image[(y * side + x) * 3 + c]) * views.std[c] + views.mean[c];
                        let at = ((view * side + y) * width + index * side + x) * 3 + c;
                        pixels[at] = (value * 255.0).round().clamp(0.0, 255.0) as u8;
                    }
                }
            }
        }
    }
    let file = std::fs::File::create(path).map_err(WorkerError::io("create", path))?;
    let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(&pixels))
        .map_err(|error| WorkerError::Failed(format!("failed to write {}: {error}", path.display())))
}
