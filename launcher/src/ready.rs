//! What a run needs beside its training images, looked at before anything is written or started.

use std::fs::File;

use mentee_config::Recipe;
use mentee_data::open_held_out;

use crate::failure::Failure;

/// Whether there is what the run is to classify.
///
/// # Errors
/// [`Failure`] with the exit code that the run would end with.
pub fn held_out(recipe: &Recipe) -> Result<(), Failure> {
    if recipe.eval.knn_every_epochs > 0 {
        open_held_out(recipe)?;
    }
    Ok(())
}

/// Whether there is what the run starts from.
///
/// # Errors
/// As [`held_out`].
pub fn weights(recipe: &Recipe) -> Result<(), Failure> {
    let path = &recipe.model.init;
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let readable = File::open(path).and_then(|file| file.metadata()).and_then(|about| match about.is_dir() {
        true => Err(std::io::ErrorKind::IsADirectory.into()),
        false => Ok(()),
    });
    readable.map_err(|error| {
        Failure::usage(format!(
            "model.init = {}: cannot be read: {error}; give the weights of this model.backbone under torchvision's names",
            path.display()
        ))
    })
}
