//! The commands of the guides in `docs`, in order, and a place where they can run.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{binary, clean};
use crate::recipe::write_many_images;
use crate::root;

/// One full batch of `byol-cifar10-small` and a few more.
const NUM_TRAIN: usize = 160;

/// Every line of a guide's `sh` blocks.
pub fn commands(guide: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(guide)).unwrap_or_else(|error| panic!("{guide}: {error}"));
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(language) => inside = !inside && language == "sh",
            None if inside && !line.trim().is_empty() => found.push(line.to_owned()),
            None => {}
        }
    }
    assert!(found.len() >= 4, "{guide} has no commands any more");
    found
}

/// Makes `folder` a place with the images that the guides speak of.
pub fn place(folder: &Path) -> PathBuf {
    write_many_images(&folder.join("data/cifar10"), NUM_TRAIN);
    folder.to_path_buf()
}

/// A command of a guide, run by a shell in `place` with the project's programs on its `PATH`.
pub fn shell(command: &str, place: &Path) -> Command {
    let mut shell = clean(Command::new("bash"));
    shell.args(["-euc", command]).current_dir(place).env("PATH", search_path());
    shell
}

/// `PATH` with the project's programs and its MPI in front.
pub fn search_path() -> std::ffi::OsString {
    let ours = binary("mentee");
    let mut path = vec![ours.parent().expect("a folder").to_path_buf(), root().join(".venv/bin")];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    std::env::join_paths(path).expect("no colon in a path")
}
