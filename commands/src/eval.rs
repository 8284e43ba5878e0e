//! `mentee eval`.

use std::path::PathBuf;

use crate::positive;

/// Evaluates frozen features: kNN and linear probes, with their floors and protocols
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  mentee eval runs/try-3
  mentee eval runs/try-3 --data data/shards --knn --linear
  mentee eval runs/try-3/checkpoints/step-00001000 --k 20,200 --temperature 0.07,0.1")]
pub struct EvalArgs {
    /// A run directory (its newest checkpoint) or a checkpoint directory
    pub checkpoint: PathBuf,
    /// Labelled images: a data set with `train` and a held-out part; of one without, a tenth is classified by the rest
    /// [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Weighted k-nearest-neighbour classification (the default)
    #[arg(long)]
    pub knn: bool,
    /// Neighbours that vote; several give a table [default: the recipe's eval.knn_k]
    #[arg(long, value_delimiter = ',', value_name = "K,…", value_parser = clap::value_parser!(u64).range(1..))]
    pub k: Vec<u64>,
    /// A vote weighs exp(cosine / T); several give a table [default: the recipe's eval.knn_temperature]
    #[arg(long, value_delimiter = ',', value_name = "T,…", value_parser = positive)]
    pub temperature: Vec<f64>,
    /// A linear classifier on frozen features
    #[arg(long)]
    pub linear: bool,
    /// How it is trained [default: logistic; with --linear-augment that of the run's method]
    #[arg(long, value_enum, value_name = "PROTOCOL", requires = "linear")]
    pub linear_protocol: Option<LinearProtocol>,
    /// Trains it on random crops and flips of the images, as the official protocols do, instead of features computed
    /// once: slower by the number of epochs
    #[arg(long, requires = "linear")]
    pub linear_augment: bool,
    /// Epochs of an official protocol [default: its own, 80 or 90]
    #[arg(long, value_name = "E", requires = "linear", value_parser = clap::value_parser!(u64).range(1..))]
    pub linear_epochs: Option<u64>,
    /// Also adds the result to the run's metrics.jsonl, where report and export find it; measures kNN too
    #[arg(long)]
    pub record: bool,
    /// Also writes the features and labels of bank and queries, for other programs
    #[arg(long, value_name = "FILE.safetensors")]
    pub features: Option<PathBuf>,
    /// As one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// How a linear classifier is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LinearProtocol {
    /// the best there is: logistic regression to its optimum
    Logistic,
    /// BYOL's official one: SGD with Nesterov momentum
    Byol,
    /// SimSiam's official one: SGD with LARC
    Simsiam,
}
