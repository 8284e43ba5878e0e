//! The arguments of the commands that `mentee` hands to `mentee-worker`: both read them by these definitions, `mentee` for
//! help, completions, manual pages and what is wrong with a command line, the worker to do the work.

pub mod bench;
pub mod eval;
pub mod trace;

pub use bench::BenchCommand;
pub use eval::EvalArgs;
pub use trace::TraceArgs;

/// The widest that help is written, also in a wider terminal.
pub const HELP_WIDTH: usize = 110;

/// The number of an argument that has to be greater than 0.
fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number greater than 0 is needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finite_numbers_above_0_are_positive() {
        assert_eq!(positive("0.001"), Ok(0.001));
        for text in ["0", "-1", "nan", "inf", "1e999", "", "many"] {
            assert!(positive(text).is_err(), "{text}");
        }
    }
}
