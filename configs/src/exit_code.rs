//! How `mentee` and `mentee-worker` end. Scripts and schedulers rely on these numbers; they do not change.
//!
//! | code | constant | meaning | what to do |
//! |---|---|---|---|
//! | 0 | [`DONE`] | the work is done | |
//! | 1 | [`FAILED`] | failed in a way no other code names | read the last line on stderr |
//! | 2 | [`USAGE`] | bad command line or bad recipe | correct what the line names |
//! | 3 | [`DATA`] | bad or missing data | `mentee data verify DIR` |
//! | 4 | [`CHECKPOINT`] | a checkpoint is needed and none is usable | `mentee checkpoints RUN --verify` |
//! | 5 | [`RANK_FAILED`] | a rank failed and the restart budget is spent | `mentee logs RUN` |
//! | 6 | [`DIVERGED`] | the loss is not finite, or the projections collapsed | change the recipe |
//! | 75 | [`PREEMPTED`] | stopped on request; what is said last names the checkpoint | run the same command again |
//!
//! 75 is `EX_TEMPFAIL` of BSD's `sysexits.h`: "the user is invited to retry".

/// The work is done.
pub const DONE: i32 = 0;
/// Failed in a way that no other code names.
pub const FAILED: i32 = 1;
/// Bad command line or bad recipe: every [`ConfigError`](crate::ConfigError) ends with this one.
pub const USAGE: i32 = 2;
/// Bad or missing data.
pub const DATA: i32 = 3;
/// A checkpoint is needed and none is usable.
pub const CHECKPOINT: i32 = 4;
/// A rank failed and the restart budget is spent.
pub const RANK_FAILED: i32 = 5;
/// The loss is not finite on some rank, or the projections collapsed.
pub const DIVERGED: i32 = 6;
/// Stopped on request, resumable: the same command continues the run.
pub const PREEMPTED: i32 = 75;
