//! One rank of a training run, and the commands that need libtorch. Read `train.rs` first.

// A closed pipe or a full disk ends no program that says its words by `mentee_config::say`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod across;
mod affinity;
mod agree;
mod ahead;
mod append;
mod bench;
mod checkpoints;
mod collapse;
mod dense;
mod device;
mod doctor;
mod error;
mod eval;
mod faults;
mod feed;
mod import;
mod kernels;
mod lane;
mod learner;
mod link;
mod logging;
mod metrics;
mod online;
mod orphan;
mod passes;
mod reducer;
mod resident;
mod run_dir;
mod setup;
mod skipped;
mod snapshot;
mod stop;
mod tensorboard;
mod times;
mod trace;
mod train;
mod views;
mod waits;
mod world;

use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use mentee_commands::{BenchCommand, EvalArgs, HELP_WIDTH, TraceArgs};
use mentee_config::{Recipe, complain, exit_code};

use crate::error::WorkerError;

/// One rank of a mentee run
#[derive(Parser)]
#[command(name = "mentee-worker", version, max_term_width = HELP_WIDTH, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Option<TrainArgs>,
}

/// Which run this rank is part of.
#[derive(Args)]
pub struct TrainArgs {
    /// A recipe: the path of a .toml file, as a run's plan.toml, or the name of a built-in one
    recipe: String,
    /// Where the run lives; a run that is there already is resumed [default: runs/<name of the recipe>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Replaces a value of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    Eval(EvalArgs),
    Trace(TraceArgs),
    /// Says what this machine has, for `mentee doctor`
    Doctor(doctor::DoctorArgs),
    /// Measures this machine: step, checkpoint, allreduce
    #[command(subcommand)]
    Bench(BenchCommand),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing to do about a closed terminal.
            match mentee_config::usage::one_line(&error.to_string()) {
                Some(line) => complain!("{line}"),
                None => drop(error.print()),
            }
            return code(if error.use_stderr() { exit_code::USAGE } else { exit_code::DONE });
        }
    };
    mentee_torch_ext::keep_freed_memory();
    mentee_torch_ext::use_huge_pages();
    let result = match (cli.command, cli.train) {
        (Some(Command::Eval(args)), _) => eval::command(&args),
        (Some(Command::Trace(args)), _) => trace::command(&args),
        (Some(Command::Doctor(args)), _) => doctor::command(&args),
        (Some(Command::Bench(what)), _) => bench::command(&what),
        (None, Some(args)) => {
            name_run_dir(&args);
            train::command(&args)
        }
        (None, None) => Err(WorkerError::Usage("no recipe given: mentee-worker RECIPE, or --help".into())),
    };
    match result {
        Ok(exit) => code(exit),
        Err(error) => {
            if !error.is_silent() {
                complain!("error: {error}");
            }
            code(error.exit_code())
        }
    }
}

/// Puts the run directory on the command line, where `pgrep -f` and the next start look for it: by becoming this program anew, before
/// anything has begun. Whatever is wrong is for training to say. Not for a recipe from a pipe, which can be read once.
fn name_run_dir(args: &TrainArgs) {
    let is_pipe = std::fs::metadata(&args.recipe).is_ok_and(|it| it.file_type().is_fifo());
    if args.run_dir.is_some() || is_pipe {
        return;
    }
    let (Ok(program), Ok(recipe)) = (std::env::current_exe(), Recipe::load(&args.recipe, &args.sets)) else {
        return;
    };
    let run_dir = run_dir::default_path(&recipe);
    let run_dir = std::path::absolute(&run_dir).unwrap_or(run_dir);
    let mut own = std::env::args_os();
    let mut again = std::process::Command::new(program);
    again.arg0(own.next().unwrap_or_default()).args(own);
    let error = again.arg("--run-dir").arg(run_dir).exec();
    complain!("warning: the run directory is not on the command line: {error}");
}

fn code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
