//! The CUDA kernels, on the processor, against plain loops in double.

use std::path::Path;
use std::process::Command;

#[test]
fn the_kernels_compute_what_plain_loops_do() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/emulate.cpp");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulate");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut compile = Command::new(&compiler);
    compile.args(["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-o"]).arg(&program).arg(&source);
    let compiled = compile.output().unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let done = Command::new(&program).output().expect("the program that was just made");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}{}", String::from_utf8_lossy(&done.stderr));
    assert!(said.ends_with("0 failures\n") && said.lines().count() > 100, "{said}");
}
