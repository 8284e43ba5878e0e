//! What a run is: the recipe a user writes, the resolved recipe that really runs, and the plan for a data
//! set and a world.
//!
//! ```text
//! recipe file ─┐
//! --set k=v ───┼─► file: keys and types ─► defaults: fill in ─► validate: ranges, rules ─► Recipe ─► Plan
//! defaults/ ───┘          (schema: every key, its type, its range, its meaning)          (plan.toml)
//! ```
//!
//! Every mistake is a [`ConfigError`]: one line with the key, the file and line (or the `--set`) it stands
//! in, and what would be right. The command ends with [`exit_code::USAGE`].

// A closed pipe or a full disk ends no program that says its words by [`say`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod collapse;
mod defaults;
mod difference;
mod error;
pub mod exit_code;
mod file;
mod load;
mod passing;
pub mod plan;
pub mod recipe;
pub mod reference;
pub mod replace;
pub mod say;
mod schema;
pub mod usage;
mod validate;

pub use error::{ConfigError, Place};
pub use load::RecipeText;
pub use passing::is_passing;
pub use plan::Plan;
pub use recipe::Recipe;
pub use say::counted;
