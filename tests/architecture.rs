//! Who may import whom. ARCHITECTURE.md draws it; this reads `cargo metadata` and refuses any other edge.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;
use system_tests::root;

/// Every crate of the workspace and the crates of the workspace it may depend on, in any way (dev and build too).
const ALLOWED: [(&str, &[&str]); 10] = [
    ("mentee-config", &[]),
    ("mentee-commands", &[]),
    ("mentee-cluster", &["mentee-config"]),
    ("mentee", &["mentee-cluster", "mentee-commands", "mentee-config", "mentee-data", "mentee-checkpoint"]),
    ("mentee-data", &["mentee-config"]),
    ("mentee-checkpoint", &[]),
    ("mentee-collectives", &[]),
    ("mentee-torch-ext", &[]),
    ("mentee-ssl", &["mentee-torch-ext", "mentee-config"]),
    (
        "mentee-worker",
        &[
            "mentee-config",
            "mentee-cluster",
            "mentee-commands",
            "mentee-data",
            "mentee-checkpoint",
            "mentee-collectives",
            "mentee-ssl",
            "mentee-torch-ext",
        ],
    ),
];

/// May depend on everything.
const TESTS: &str = "system-tests";

/// Crates that may name tokio in their own manifest: the training thread is synchronous.
const TOKIO_DIRECTLY: [&str; 2] = ["mentee", "mentee-cluster"];

/// What a crate must not reach, however far away (dev-dependencies aside).
const UNREACHABLE: [(&str, &[&str]); 9] = [
    ("mentee", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc"]),
    ("mentee-cluster", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc"]),
    ("mentee-config", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc", "tokio"]),
    ("mentee-commands", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc", "tokio"]),
    ("mentee-data", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc", "tokio"]),
    ("mentee-checkpoint", &["tch", "torch-sys", "mpi", "mpi-sys", "cudarc", "tokio"]),
    ("mentee-collectives", &["tch", "torch-sys", "tokio"]),
    ("mentee-torch-ext", &["mpi", "mpi-sys", "cudarc", "tokio"]),
    ("mentee-ssl", &["mpi", "mpi-sys", "cudarc", "tokio"]),
];

/// Packages by name, each with what it depends on.
#[derive(Default)]
struct Graph {
    members: BTreeSet<String>,
    /// Normal and build dependencies.
    edges: BTreeMap<String, BTreeSet<String>>,
    /// Of the workspace's crates only: dev-dependencies.
    dev_edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn edge(&mut self, from: &str, to: &str) {
        self.edges.entry(from.into()).or_default().insert(to.into());
    }

    /// Everything `from` reaches, with the edge by which it was first found.
    fn reached(&self, from: &str) -> BTreeMap<String, String> {
        let mut via = BTreeMap::new();
        let mut queue = vec![from.to_owned()];
        while let Some(package) = queue.pop() {
            for next in self.edges.get(&package).into_iter().flatten() {
                if next != from && !via.contains_key(next) {
                    via.insert(next.clone(), package.clone());
                    queue.push(next.clone());
                }
            }
        }
        via
    }

    /// Every edge that should not be, in words.
    fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        for member in self.members.iter().filter(|m| *m != TESTS) {
            let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| name == member) else {
                found.push(format!("{member} is in no row of ALLOWED: say here what it may import"));
                continue;
            };
            let direct = self.edges.get(member).into_iter().chain(self.dev_edges.get(member)).flatten();
            for to in direct {
                if self.members.contains(to) && !allowed.contains(&to.as_str()) {
                    found.push(format!("{member} -> {to}"));
                }
                if to == "tokio" && !TOKIO_DIRECTLY.contains(&member.as_str()) {
                    found.push(format!("{member} -> tokio: only {TOKIO_DIRECTLY:?} may"));
                }
            }
            let reached = self.reached(member);
            for (_, forbidden) in UNREACHABLE.iter().filter(|(name, _)| name == member) {
                for package in forbidden.iter().filter(|package| reached.contains_key(**package)) {
                    found.push(format!("{member} reaches {package}, which {} imports", reached[*package]));
                }
            }
        }
        found.sort();
        found.dedup();
        found
    }

    fn of_this_workspace() -> Self {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let host = Command::new("rustc").arg("-vV").output().expect("rustc runs");
        let host = String::from_utf8(host.stdout).expect("rustc speaks UTF-8");
        let host = host
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .expect("rustc names its host")
            .to_owned();
        let output = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--filter-platform", &host])
            .current_dir(root())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let list = |value: &Value| value.as_array().expect("a list").clone();

        let names: BTreeMap<String, String> =
            list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
        let mut graph = Self::default();
        graph.members.extend(list(&metadata["workspace_members"]).iter().map(|id| names[&text(id)].clone()));
        for node in list(&metadata["resolve"]["nodes"]) {
            let from = &names[&text(&node["id"])];
            for dependency in list(&node["deps"]) {
                let to = &names[&text(&dependency["pkg"])];
                for kind in list(&dependency["dep_kinds"]) {
                    if kind["kind"] == "dev" {
                        graph.dev_edges.entry(from.clone()).or_default().insert(to.clone());
                    } else {
                        graph.edge(from, to);
                    }
                }
            }
        }
        graph
    }
}

#[test]
fn the_workspace_has_no_other_edges() {
    let graph = Graph::of_this_workspace();
    for (member, _) in ALLOWED {
        assert!(
            graph.members.contains(member),
            "{member} is no member of the workspace any more: tidy ALLOWED"
        );
    }
    let violations = graph.violations();
    assert!(violations.is_empty(), "not allowed (see ARCHITECTURE.md):\n  {}", violations.join("\n  "));
}

#[test]
fn an_edge_that_should_not_be_is_found() {
    let violations_with = |from: &str, to: &str, dev: bool| {
        let mut graph = Graph::default();
        graph.members.extend(ALLOWED.iter().map(|(name, _)| (*name).to_owned()));
        graph.edge("mentee", "mentee-cluster");
        graph.edge("mentee-cluster", "tokio");
        graph.edge("mentee-worker", "mentee-cluster");
        graph.edge("tch", "torch-sys");
        assert_eq!(graph.violations(), [""; 0]);
        if dev {
            graph.dev_edges.entry(from.into()).or_default().insert(to.into());
        } else {
            graph.edge(from, to);
        }
        graph.violations()
    };
    assert_eq!(
        violations_with("mentee-ssl", "mentee-collectives", false),
        ["mentee-ssl -> mentee-collectives"]
    );
    assert_eq!(violations_with("mentee-data", "mentee-ssl", true), ["mentee-data -> mentee-ssl"]);
    assert_eq!(
        violations_with("mentee-worker", "tokio", false),
        ["mentee-worker -> tokio: only [\"mentee\", \"mentee-cluster\"] may"]
    );
    // Through a crate from elsewhere, which has no row of its own.
    assert_eq!(
        violations_with("mentee-cluster", "tch", false),
        [
            "mentee reaches tch, which mentee-cluster imports",
            "mentee reaches torch-sys, which tch imports",
            "mentee-cluster reaches tch, which mentee-cluster imports",
            "mentee-cluster reaches torch-sys, which tch imports",
        ]
    );
}
