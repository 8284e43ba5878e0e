//! A site's defaults for `mentee submit`: one small file, so that nobody has to remember the account.
//!
//! The first of these that exists: the file that `MENTEE_SITE` names, `mentee/site.toml` in `XDG_CONFIG_HOME` (else in
//! `~/.config`), `/etc/mentee/site.toml`. Every key is optional; the command line wins.
//!
//! ```toml
//! [slurm]
//! account = "vision"
//! partition = "gpu"
//! qos = "normal"
//! time = "12:00:00"
//! nodes = 1
//! workers_per_node = 4
//! cpus_per_worker = 8
//! gpus_per_node = 4
//! stop_lead = 120                          # seconds between the warning and the time limit
//! interface = "ib0"                        # where workers reach the supervisor
//! setup = ["module load gcc"]              # lines of the script before the supervisor starts
//! sbatch = ["--constraint=icelake"]        # more options of sbatch
//! srun = ["--cpu-bind=cores"]              # more options of srun
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::Failure;

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Site {
    /// `--account`.
    pub account: Option<String>,
    /// `--partition`.
    pub partition: Option<String>,
    /// `--qos`.
    pub qos: Option<String>,
    /// `--time`.
    pub time: Option<String>,
    /// `--nodes`.
    pub nodes: Option<u32>,
    /// `--workers-per-node`.
    pub workers_per_node: Option<u32>,
    /// `--cpus-per-worker`.
    pub cpus_per_worker: Option<u32>,
    /// `--gpus-per-node`.
    pub gpus_per_node: Option<u32>,
    /// `--stop-lead`.
    pub stop_lead: Option<u32>,
    /// `--interface`.
    pub interface: Option<String>,
    /// Lines of the script.
    pub setup: Vec<String>,
    /// Options of `sbatch`.
    pub sbatch: Vec<String>,
    /// Options of `srun`.
    pub srun: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    slurm: Site,
}

impl Site {
    /// The site's defaults and the file they stand in; none when there is no such file.
    ///
    /// # Errors
    /// [`Failure`] with exit code 2 for a file that cannot be read or holds anything unknown, or when the one that
    /// `MENTEE_SITE` names is missing.
    pub fn load() -> Result<(Site, Option<PathBuf>), Failure> {
        if let Some(named) = std::env::var_os("MENTEE_SITE").filter(|name| !name.is_empty()) {
            let path = PathBuf::from(named);
            return Ok((Site::read(&path)?, Some(path)));
        }
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".config"));
        let config = std::env::var_os("XDG_CONFIG_HOME")
            .filter(|name| !name.is_empty())
            .map(PathBuf::from)
            .or_else(home);
        let candidates =
            [config.map(|config| config.join("mentee/site.toml")), Some("/etc/mentee/site.toml".into())];
        match candidates.into_iter().flatten().find(|path| path.is_file()) {
            Some(path) => Ok((Site::read(&path)?, Some(path))),
            None => Ok((Site::default(), None)),
        }
    }

    fn read(path: &Path) -> Result<Site, Failure> {
        let bad = |why: String| Failure::usage(format!("site defaults {}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
        Site::parse(&text).map_err(bad)
    }

    fn parse(text: &str) -> Result<Site, String> {
        toml::from_str::<File>(text).map(|file| file.slurm).map_err(|error| {
            let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            format!("line {line}: {}", error.message().replace('\n', " "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_file_is_understood() {
        let text = include_str!("site.rs");
        let text: Vec<&str> = text
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//! "))
            .collect();
        let site = Site::parse(&text.join("\n")).expect("it parses");
        assert_eq!(site.account.as_deref(), Some("vision"));
        assert_eq!((site.workers_per_node, site.stop_lead), (Some(4), Some(120)));
        assert_eq!(site.srun, ["--cpu-bind=cores"]);
    }

    #[test]
    fn what_is_unknown_is_refused_with_its_line() {
        let error = Site::parse("[slurm]\naccount = \"a\"\npartitoin = \"b\"\n").expect_err("a typing error");
        assert!(error.starts_with("line 3: unknown field `partitoin`"), "{error}");
        assert!(Site::parse("[pbs]\n").is_err());
        assert_eq!(Site::parse("").expect("all is optional"), Site::default());
    }
}
