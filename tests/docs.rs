//! What the repository says about itself is true, and it speaks of no machine it was written on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use system_tests::process::{finish, mentee, worker};
use system_tests::{guide, machine, root, temp_dir};

fn tracked_files() -> Vec<String> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(output.status.success(), "this test needs a git checkout");
    let names = String::from_utf8(output.stdout).expect("file names in UTF-8");
    names.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Parts in two halves, so that this file does not find itself.
const MACHINE_WORDS: [&str; 14] = [
    concat!("/wo", "rk/"),
    concat!("/tm", "p/bash_jobs"),
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("/opt/", "wheels"),
    concat!("python", "hosted"),
    concat!("py", "pi.org"),
    concat!("static.", "crates"),
    concat!("index.", "crates"),
    concat!("registry.", "npmjs"),
    concat!("download.", "pytorch"),
    concat!("deb.", "debian"),
    concat!("archive.", "ubuntu"),
    concat!("proxy.", "golang"),
];

/// Where a word stands as a path or host of its own: `target/work/` names no machine.
fn machine_words(text: &str) -> Vec<&'static str> {
    let stands_alone = |at: usize| {
        let before = text[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '}' | ')'))
    };
    let found =
        |word: &&&str| text.match_indices(**word).any(|(at, _)| !word.starts_with('/') || stands_alone(at));
    MACHINE_WORDS.iter().filter(found).copied().collect()
}

#[test]
fn no_tracked_file_names_a_machine_or_a_registry() {
    let mut found = Vec::new();
    for name in tracked_files() {
        let Ok(bytes) = fs::read(root().join(&name)) else { continue };
        let words = machine_words(&String::from_utf8_lossy(&bytes));
        if !words.is_empty() {
            found.push(format!("{name}: {words:?}"));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_path_of_a_machine_is_found() {
    assert_eq!(machine_words(concat!("cd /wo", "rk/main")).len(), 1);
    assert_eq!(
        machine_words(concat!("\"/ro", "ot/.venv\" from https://files.python", "hosted.org")).len(),
        2
    );
    assert_eq!(machine_words("target/work/x and $HOME/work/ and lib/root/").len(), 0);
}

#[test]
fn no_tracked_file_is_large() {
    for name in tracked_files() {
        let bytes = fs::metadata(root().join(&name)).map_or(0, |data| data.len());
        assert!(bytes <= 2 << 20, "{name} has {bytes} bytes: data does not belong into the repository");
    }
}

/// The words after `program` wherever a document names a command in code: fenced lines and `spans`.
fn commands(text: &str, program: &str) -> BTreeSet<String> {
    let mut code = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            code.push(line.trim());
        } else {
            code.extend(line.split('`').skip(1).step_by(2));
        }
    }
    let mut found = BTreeSet::new();
    for line in code {
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let is_program = pair[0] == program || pair[0].ends_with(&format!("/{program}"));
            if is_program && pair[1].starts_with(|c: char| c.is_ascii_lowercase()) {
                found.insert(pair[1].to_owned());
            }
        }
    }
    found
}

const DOCUMENTS: [&str; 14] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/slurm.md",
    "docs/mpirun.md",
    "docs/evaluation.md",
    "docs/own-data.md",
    "docs/reproducibility.md",
    "docs/methods.md",
    "docs/monitoring.md",
    "docs/gpu.md",
    "docs/recipes.md",
    "CHANGELOG.md",
    "trainer/checkpoint/FORMAT.md",
];

#[test]
fn every_command_the_documents_name_exists() {
    let mut named = BTreeSet::new();
    for name in DOCUMENTS {
        named.extend(commands(&document(name), "mentee"));
    }
    assert!(named.contains("run") && named.contains("shard"), "README names no commands any more: {named:?}");
    for command in &named {
        let mut help = mentee();
        help.args([command, "--help"]);
        finish(help).expect(0);
    }
    let mut help = worker();
    help.arg("--help");
    finish(help).expect(0);
}

fn run_every_command(guide: &str) {
    let _machine = machine();
    let folder = temp_dir();
    let place = guide::place(folder.path());
    for command in guide::commands(guide) {
        finish(guide::shell(&command, &place)).expect(0);
    }
}

#[test]
fn every_command_of_the_mpirun_guide_runs() {
    run_every_command("docs/mpirun.md");
}

#[test]
fn every_command_of_the_evaluation_guide_runs() {
    run_every_command("docs/evaluation.md");
}

#[test]
fn every_command_of_the_guide_to_own_data_runs() {
    run_every_command("docs/own-data.md");
}

#[test]
fn every_command_of_the_reproducibility_guide_runs() {
    run_every_command("docs/reproducibility.md");
}

#[test]
fn every_command_of_the_guide_to_methods_runs() {
    run_every_command("docs/methods.md");
}

#[test]
fn every_command_of_the_monitoring_guide_runs() {
    run_every_command("docs/monitoring.md");
}

#[test]
fn the_two_commands_come_first_and_run() {
    let readme = document("README.md");
    let first = readme.find("```").map(|at| readme[at..].lines().skip(1).take(2).collect::<Vec<_>>());
    let first: Vec<String> = first
        .expect("a code block")
        .iter()
        .map(|line| line.split('#').next().unwrap_or("").trim().to_owned())
        .collect();
    assert_eq!(first, ["ci/demo", "ci/test"]);
    for script in ["ci/setup", "ci/demo", "ci/test", "ci/bench", "ci/slurm-lab", ".ci/run"] {
        let mode = fs::metadata(root().join(script))
            .unwrap_or_else(|e| panic!("{script}: {e}"))
            .permissions()
            .mode();
        assert!(mode & 0o111 != 0, "{script} is not executable");
    }
    assert!(document(".ci/run").contains("ci/test"));
}

#[test]
fn every_recipe_is_in_the_readme_and_the_other_way_round() {
    let shipped: BTreeSet<String> = fs::read_dir(root().join("configs/recipes"))
        .expect("configs/recipes")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".toml").map(str::to_owned))
        .collect();
    let readme = document("README.md");
    let listed: BTreeSet<String> = readme
        .lines()
        .skip_while(|line| *line != "## Recipes")
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name.to_owned()))
        .collect();
    assert_eq!(listed, shipped, "the table of recipes in README.md and configs/recipes differ");
}

#[test]
fn every_link_leads_somewhere() {
    for name in DOCUMENTS {
        for target in document(name).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap_or("");
            if !target.is_empty() && !target.contains("://") {
                let path = root().join(name).with_file_name(target);
                assert!(path.exists(), "{name} links to {target}, which does not exist");
            }
        }
    }
}

#[test]
fn every_path_in_code_exists() {
    for name in DOCUMENTS {
        for span in document(name).split('`').skip(1).step_by(2) {
            let top = span.split('/').next().unwrap_or("");
            let is_ours =
                ["ci", ".ci", "configs", "cluster", "commands", "docs", "launcher", "trainer", "tests"]
                    .contains(&top);
            let is_path =
                span.contains('/') && !span.contains(|c: char| c.is_whitespace() || "{}*…<>".contains(c));
            if is_ours && is_path {
                assert!(root().join(span).exists(), "{name} speaks of {span}, which does not exist");
            }
        }
    }
}
