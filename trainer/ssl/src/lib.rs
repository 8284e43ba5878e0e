//! Self-supervised learning: encoders, heads, methods, losses, optimizers, schedules, the teacher. Knows no network:
//! what has to be summed over ranks is summed by a closure that the caller passes in.
//!
//! Shapes: V = 2 views, N samples of this rank, D the projection's width, C channels, H x W pixels. A batch is
//! [V·N, C, H, W] with view 1 in the first N rows, channels-last in memory.

pub mod beside;
pub mod encoder;
pub mod gradients;
pub mod head;
pub mod layers;
pub mod layout;
pub mod loss;
pub mod method;
mod normal;
pub mod optimizer;
pub mod params;
pub mod schedule;
pub mod state;
pub mod statistics;

pub use method::{Method, StepLoss};
pub use schedule::{Rates, Schedule};
pub use state::State;

/// What can go wrong inside a step.
#[derive(Debug, thiserror::Error)]
pub enum SslError {
    /// libtorch refused a call made through torch-ext.
    #[error(transparent)]
    TorchExt(#[from] mentee_torch_ext::TorchError),
    /// libtorch refused a call made through tch.
    #[error("libtorch: {}", first_line(.0))]
    Tch(#[from] tch::TchError),
    /// The rows of other ranks could not be had.
    #[error("collecting rows over ranks: {0}")]
    Gather(String),
    /// A tensor to be loaded is missing, or not what this recipe's network has.
    #[error("tensor `{name}`: {problem}")]
    Load {
        /// The tensor's full name.
        name: String,
        /// What disagrees.
        problem: String,
    },
}

/// What libtorch says; its own stack follows on further lines.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
