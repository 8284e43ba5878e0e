//! `mentee`: the light binary. It prepares, supervises and reads runs; training itself is in `mentee-worker`, which
//! alone links libtorch and MPI.

// A closed pipe or a full disk ends no program that says its words by `mentee_config::say`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod bench;
mod checkpoints;
mod child;
mod curve;
mod data;
mod demo;
mod doctor;
mod engine;
mod export;
mod failure;
mod flood;
mod interface;
mod left_memory;
mod limits;
mod logs;
mod metrics;
mod monitor;
mod out_of_memory;
mod place;
mod printable;
mod processes;
mod progress;
mod prometheus;
mod ready;
mod report;
mod run;
mod rundir;
mod shard;
mod shell;
mod site;
mod slurm;
mod snapshot;
mod status;
mod submit;
mod supervise;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use mentee_commands::{EvalArgs, HELP_WIDTH, TraceArgs};
use mentee_config::say::Results;
use mentee_config::{complain, exit_code};

use crate::engine::{Engine, Layout};
use crate::failure::Failure;

/// Pretrains vision backbones without labels: BYOL, SimSiam, MoCo v3, on one CPU or many machines, on the same loss curve.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = HELP_WIDTH,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 bad data, \
    4 checkpoint unusable, 5 a rank failed too often, 6 diverged or collapsed, 75 stopped on request (resumable)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draws images, trains BYOL on them with 2 workers, evaluates, writes a report: minutes on 2 cores
    Demo(demo::DemoArgs),
    /// Trains here, supervised; continues the run that is in the run directory
    Run(run::RunArgs),
    /// Writes and submits the Slurm job of a run, or of an array of runs
    Submit(submit::SubmitArgs),
    /// Writes any data set that can be read as tar shards with an index
    Shard(shard::ShardArgs),
    /// Looks into a data set, checks it, shows the order it is read in
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Lists the checkpoints of a run
    Checkpoints {
        /// A run directory
        run: PathBuf,
        /// Read every byte and compare it with its digest
        #[arg(long)]
        verify: bool,
        /// As one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Writes one self-contained page about a run: curves, evaluations, times; or compares several
    Report(report::ReportArgs),
    /// Writes a backbone under the names that torchvision or timm use, with a model card
    Export(export::ExportArgs),
    /// Says where a run stands
    Status {
        /// A run directory
        run: PathBuf,
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Shows a run in the terminal, live or after it has ended: progress, curves, ranks, events
    Monitor(monitor::MonitorArgs),
    /// Shows the logs of all processes of a run, merged by time
    Logs(logs::LogsArgs),
    /// Says which rank the launcher made of this process, on which cores and device
    Place(place::PlaceArgs),
    /// Says whether this machine is fit to train: libraries, devices, files, cores, one small all-reduce
    Doctor(doctor::DoctorArgs),
    Eval(EvalArgs),
    Trace(TraceArgs),
    /// Measures this machine: loader, step, checkpoint, allreduce, coordinator
    #[command(subcommand, after_help = bench::EXAMPLES)]
    Bench(bench::BenchCommand),
    /// Prints completions for a shell: bash, zsh or fish
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints the manual page, of mentee or of one of its commands
    Man {
        /// A command of mentee, or a command of that: `mentee man data order`
        command: Vec<String>,
        /// Write the pages of all commands into this folder instead
        #[arg(long, value_name = "DIR", conflicts_with = "command")]
        out: Option<PathBuf>,
    },
}

/// Shells that completions are written for.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints what a shell needs to complete `mentee`'s commands and options.
fn completions(shell: Shell) {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mentee", &mut text);
    print(&text);
}

/// Prints one manual page, or writes all of them into a folder.
fn man(command: &[String], out: Option<&Path>) -> Result<(), Failure> {
    // `mentee help` and its like would have a page for every command once more.
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    if let Some(out) = out {
        let failed = |error: std::io::Error| Failure::io("write", out, &error);
        std::fs::create_dir_all(out).map_err(failed)?;
        return clap_mangen::generate_to(cli, out).map_err(failed);
    }
    let mut page = &cli;
    for name in command {
        page = page.find_subcommand(name).ok_or_else(|| {
            let parent = page.get_bin_name().unwrap_or("mentee");
            Failure::usage(format!("{parent} has no command {name}: see {parent} --help"))
        })?;
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(page.clone())
        .render(&mut text)
        .map_err(|error| Failure::failed(format!("cannot write the manual page: {error}")))?;
    print(&text);
    Ok(())
}

fn print(text: &[u8]) {
    let mut out = Results::new();
    out.text(text);
    out.flush();
}

fn main() -> ExitCode {
    limits::outlive_file_size_limit();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return code(failure::parser_said(&error)),
    };
    match dispatch(cli.command) {
        Ok(exit_code) => code(exit_code),
        Err(failure) => {
            if !failure.line.is_empty() {
                complain!("error: {}", failure.line);
            }
            code(failure.exit_code)
        }
    }
}

fn dispatch(command: Command) -> Result<i32, Failure> {
    let only_tells = matches!(
        command,
        Command::Checkpoints { .. }
            | Command::Status { .. }
            | Command::Monitor(_)
            | Command::Logs(_)
            | Command::Place(_)
            | Command::Completions { .. }
            | Command::Man { .. }
    );
    if !only_tells {
        stands_somewhere()?;
    }
    match command {
        Command::Run(args) => return Ok(run::command(&args)?.exit_code),
        Command::Demo(args) => return demo::command(&args),
        Command::Doctor(args) => return doctor::command(&args),
        Command::Submit(args) => submit::command(&args)?,
        Command::Shard(args) => shard::command(&args)?,
        Command::Data(data) => data::command(&data)?,
        Command::Checkpoints { run, verify, json } => checkpoints::command(&run, verify, json)?,
        Command::Report(args) => report::command(&args)?,
        Command::Export(args) => export::command(&args)?,
        Command::Status { run, json } => status::command(&run, json)?,
        Command::Monitor(args) => monitor::command(&args)?,
        Command::Logs(args) => logs::command(&args)?,
        Command::Place(args) => place::command(&args)?,
        Command::Completions { shell } => completions(shell),
        Command::Man { command, out } => man(&command, out.as_deref())?,
        Command::Eval(_) | Command::Trace(_) => return Err(forward(1)),
        Command::Bench(bench::BenchCommand::Loader(args)) => bench::loader(&args)?,
        Command::Bench(bench::BenchCommand::Coordinator(args)) => bench::coordinator(&args)?,
        Command::Bench(bench::BenchCommand::Worker(what)) => return Err(forward(what.workers())),
    }
    Ok(exit_code::DONE)
}

/// Refuses a current directory that was removed: paths would mean nothing, and no worker could be started there.
fn stands_somewhere() -> Result<(), Failure> {
    match std::env::current_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::usage("the current directory was removed: change to one that is there"))
        }
        _ => Ok(()),
    }
}

/// Becomes `mentee-worker` with the arguments of this process, or the `mpirun` of several; returns only when that cannot be.
fn forward(workers: u32) -> Failure {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let engine = if workers > 1 { Engine::Mpirun } else { Engine::Direct };
    let line = match engine::find_tools(engine, &[]) {
        Ok(tools) => {
            let layout = Layout { nodes: 1, left_out: Vec::new() };
            engine::command_line(engine, workers, &tools, &layout, None, &arguments)
        }
        Err(failure) => return failure,
    };
    let mut command = std::process::Command::new(&line.program);
    for name in &line.clear {
        command.env_remove(name);
    }
    let error = command.args(&line.arguments).envs(line.set).exec();
    Failure::failed(format!("cannot start {}: {error}", line.program.display()))
}

fn code(exit_code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(exit_code).unwrap_or(1))
}
