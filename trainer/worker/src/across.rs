//! What networks get from other ranks, as closures: `ssl` knows no network.

use std::sync::Arc;

use mentee_collectives::{Buffer, Collectives};
use mentee_config::Recipe;
use mentee_ssl::SslError;
use mentee_ssl::layers::{GatherRows, OverRanks, Reduce};
use tch::Tensor;

use crate::device::DeviceGroup;
use crate::snapshot;

/// Both closures of a recipe.
pub fn over_ranks(
    recipe: &Recipe,
    collectives: &Arc<dyn Collectives>,
    group: Option<&DeviceGroup>,
) -> OverRanks {
    OverRanks { reduce: stat_reduce(recipe, collectives, group), gather: gather(collectives, group) }
}

/// The closure by which batch norms sum their statistics over ranks.
fn stat_reduce(
    recipe: &Recipe,
    collectives: &Arc<dyn Collectives>,
    group: Option<&DeviceGroup>,
) -> Option<Reduce> {
    if !recipe.parallel.sync_batch_norm || collectives.world_size() == 1 {
        return None;
    }
    if let Some(group) = group {
        return Some(Reduce::Device(group.ahead().reduce()));
    }
    let collectives = collectives.clone();
    Some(Reduce::Host(Arc::new(move |values: &mut [f64]| {
        match collectives.all_reduce_sum(Buffer::F64(values)) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "batch-norm statistics");
                false
            }
        }
    })))
}

/// The closure by which methods collect rows over ranks; rows on devices are waited for first.
fn gather(collectives: &Arc<dyn Collectives>, group: Option<&DeviceGroup>) -> Option<Arc<GatherRows>> {
    if collectives.world_size() == 1 {
        return None;
    }
    let collectives = collectives.clone();
    let ahead = group.map(|group| group.ahead().clone());
    Some(Arc::new(move |rows: &Tensor| -> Result<(Tensor, i64), SslError> {
        let failed = |error: &dyn std::fmt::Display| SslError::Gather(error.to_string());
        ahead.as_ref().map_or(Ok(()), |ahead| ahead.settle()).map_err(|error| failed(&error))?;
        let own = snapshot::bytes(rows).map_err(|error| failed(&error))?;
        let parts = collectives.all_gather(&own).map_err(|error| failed(&error))?;
        let (dim, kind) = (rows.size2()?.1, rows.kind());
        let parts = parts
            .iter()
            .map(|part| {
                let n = part.len() / (kind.elt_size_in_bytes() * dim.max(1) as usize);
                Tensor::f_from_data_size(part, &[n as i64, dim], kind)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let before = &parts[..collectives.rank() as usize];
        let first = before.iter().map(|part| part.size()[0]).sum();
        Ok((Tensor::f_cat(&parts, 0)?.f_to_device(rows.device())?, first))
    }))
}
