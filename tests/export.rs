//! An exported backbone holds the checkpoint's numbers under torchvision's names.

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
        assert!(
            described["scores"]["knn_random_init"].as_f64().is_some(),
            "a score without its floor: {text}"
        );
        let card = std::fs::read_to_string(out.with_extension("md")).expect("a card");
        assert!(card.contains("model.load_state_dict(load_file("), "{card}");
        assert!(card.contains("model.maxpool = torch.nn.Identity()"), "{card}");
    }
    let mut command = mentee();
    command.args(["export", "--out", "x.safetensors"]).arg(dir.path());
    assert!(finish(command).expect(2).error_line().contains("no run directory"));
}
