//! An exported backbone holds the checkpoint's numbers under torchvision's names.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use system_tests::process::{finish, mentee};
use system_tests::recipe::{TinyRecipe, write_images};
use system_tests::{machine, root, temp_dir};

/// Loads the export into a network with torchvision's names, strictly, and compares it with the checkpoint.
const CHECK: &str = r#"
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import replay, torch
replay.KINDS["I64"] = torch.int64
exported = replay.read(Path(sys.argv[2]))
network = replay.Backbone("resnet20", "cifar")
network.load_state_dict(exported, strict=True)
trained = replay.read(Path(sys.argv[3]))
count = 0
for name, value in exported.items():
    if name.endswith("num_batches_tracked"):
        assert value.item() == 6, value
    else:
        count += 1
        assert torch.equal(value.double(), trained[sys.argv[4] + ".backbone." + name].double().float().double()), name
print(count, tuple(network.eval()(torch.randn(2, 3, 16, 16)).shape))
"#;

/// Runs the code of a model card, gives the model the test images of a CIFAR file as the card says, and holds its features and
/// what scikit-learn makes of them against `mentee eval`'s.
const REAL: &str = r#"
import os, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy, torch, replay
replay.KINDS["I64"] = torch.int64
card, images, features = (Path(a).resolve() for a in sys.argv[2:5])
k, temperature, knn, linear = int(sys.argv[5]), *map(float, sys.argv[6:9])
os.chdir(card.parent)
exec(re.search(r"```python\n(.*?)```", card.read_text(), re.S).group(1))
text = card.read_text()
mean, std = (torch.tensor(eval(re.search(word + r" (\[.*?\])", text).group(1))).reshape(3, 1, 1) for word in ("minus mean", "deviation"))
ours = replay.read(features)

def embed(part, file):
    rows = torch.frombuffer(bytearray((images / file).read_bytes()), dtype=torch.uint8).reshape(-1, 3073)
    labels, pixels = rows[:, 0].long(), rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    with torch.no_grad():
        found = model((pixels - mean) / std)
    assert torch.equal(labels, ours[part + ".labels"])
    expected = ours[part + ".features"]
    return found, labels.numpy(), ((found - expected).abs().max() / expected.abs().max()).item()

bank, bank_labels, bank_off = embed("bank", "data_batch_1.bin")
queries, labels, queries_off = embed("queries", "test_batch.bin")
assert max(bank_off, queries_off) <= 1e-5, (bank_off, queries_off)

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

votes = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: numpy.exp((1 - d) / temperature))
found = 100 * votes.fit(bank.numpy(), bank_labels).score(queries.numpy(), labels)
assert abs(found - knn) < 1e-6, ("kNN", found, knn)
probe = make_pipeline(StandardScaler(), LogisticRegression(C=1, tol=1e-6, max_iter=1000))
found = 100 * probe.fit(bank.double().numpy(), bank_labels).score(queries.double().numpy(), labels)
# An image on the border between two classes may fall to either side.
assert abs(found - linear) <= 100 / len(labels) + 1e-6, ("logistic regression", found, linear)
print(max(bank_off, queries_off))
"#;

#[test]
fn torchvision_timm_and_scikit_learn_find_the_features_and_scores_of_eval() {
    let _machine = machine();
    // The second is in neither library: its card brings the class.
    for backbone in ["resnet18", "resnet20"] {
        real_libraries_agree(backbone);
    }
}

fn real_libraries_agree(backbone: &str) {
    let dir = temp_dir();
    let images = dir.path().join("images");
    write_images(&images);
    let recipe = TinyRecipe::new(&images)
        .set("model.backbone", &format!("{backbone:?}"))
        .set("views.size", "32")
        .set("parallel.precision", "\"f32\"")
        .set("schedule.max_steps", "3")
        .write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    let mut command = mentee();
    command.arg("run").arg(&recipe).arg("--run-dir").arg(&run_dir);
    finish(command).expect(0);
    let features = dir.path().join("features.safetensors");
    let mut command = mentee();
    command
        .arg("eval")
        .arg(&run_dir)
        .args(["--knn", "--linear", "--k", "7", "--json", "--features"])
        .arg(&features);
    let scores: Value = serde_json::from_str(&finish(command).expect(0).stdout).expect("one object");
    for layout in ["torchvision", "timm"] {
        let out = dir.path().join(format!("{layout}.safetensors"));
        let mut command = mentee();
        command.arg("export").arg(&run_dir).args(["--layout", layout, "--out"]).arg(&out);
        finish(command).expect(0);
        let mut python = Command::new(root().join(".venv/bin/python"));
        python
            .args(["-c", REAL])
            .arg(root().join("tests"))
            .arg(out.with_extension("md"))
            .arg(&images)
            .arg(&features);
        python.args(["7", "0.1", &scores["knn_top1"].to_string(), &scores["linear_top1"].to_string()]);
        println!(
            "{backbone}, {layout}: largest relative difference of a feature {}",
            finish(python).expect(0).stdout.trim()
        );
    }
}

#[test]
fn student_and_teacher_load_under_torchvisions_names() {
    let _machine = machine();
    let dir = temp_dir();
    write_images(&dir.path().join("images"));
    let recipe = TinyRecipe::new(&dir.path().join("images"))
        .set("schedule.max_steps", "3")
        .set("eval.knn_every_epochs", "1")
        .write(dir.path().join("tiny.toml"));
    let run_dir = dir.path().join("run");
    let mut command = mentee();
    command.arg("run").arg(&recipe).arg("--run-dir").arg(&run_dir);
    finish(command).expect(0);
    let state = run_dir.join("checkpoints/step-00000003/state.safetensors");
    for (what, out, code, said) in [
        ("checkpoints/step-00000009", "no.safetensors", 4, "manifest.json"),
        (".", "nowhere/no.safetensors", 1, ": make "),
    ] {
        let mut command = mentee();
        command.arg("export").arg(run_dir.join(what)).arg("--out").arg(dir.path().join(out));
        let refused = finish(command).expect(code);
        assert!(refused.error_line().contains(said), "{}", refused.told());
    }
    for (network, layout) in [("student", "timm"), ("teacher", "torchvision")] {
        let out = dir.path().join(format!("{network}.safetensors"));
        let mut command = mentee();
        command
            .arg("export")
            .arg(&run_dir)
            .args(["--layout", layout, "--network", network, "--out"])
            .arg(&out);
        finish(command).expect(0);
        let mut python = Command::new(root().join(".venv/bin/python"));
        python.args(["-c", CHECK]).arg(root().join("tests")).arg(&out).arg(&state).arg(network);
        assert_eq!(finish(python).expect(0).stdout.trim(), "105 (2, 64)");
        let text = std::fs::read_to_string(out.with_extension("json")).expect("a description");
        let described: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(described["architecture"], "resnet20");
        assert_eq!((&described["layout"], &described["network"]), (&layout.into(), &network.into()));
        assert_eq!(described["input"]["size"], 16);
        let card = std::fs::read_to_string(out.with_extension("md")).expect("a card");
        assert!(
            card.contains("model.load_state_dict(load_file(") && card.contains("class ResNet20"),
            "{card}"
        );
        assert!(card.contains(&format!("The {network}'s backbone: byol")), "{card}");
        // What was measured is the student.
        if network == "student" {
            assert!(described["scores"]["knn_random_init"].as_f64().is_some(), "no floor: {text}");
            assert!(card.contains("| kNN top-1 |"), "{card}");
        } else {
            assert!(described["scores"].is_null() && described["why_no_scores"].is_string(), "{text}");
            assert!(card.contains("None: evaluations measure the student") && !card.contains('%'), "{card}");
        }
        // Readable by whom other new files are.
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        let beside = dir.path().join("beside");
        std::fs::write(&beside, "").expect("written");
        assert_eq!(mode(&out), mode(&beside), "{:o}", mode(&out));
    }
    for out in ["x.json", "x.md"] {
        let mut command = mentee();
        command.arg("export").arg(&run_dir).arg("--out").arg(dir.path().join(out));
        assert!(finish(command).expect(2).error_line().contains("give FILE.safetensors"), "{out}");
        assert!(!dir.path().join(out).exists());
    }
    let mut command = mentee();
    command.args(["export", "--out", "x.safetensors"]).arg(dir.path());
    assert!(finish(command).expect(2).error_line().contains("no run directory"));
}
