//! Programs that tests put somewhere and then start.
//!
//! Tests run side by side and start programs: a file that this process has open for writing is, for a moment, open in the
//! child of another test too, and cannot be executed then ("Text file busy"). So no program is written by this process.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The executable `from`, under the name `to`.
pub fn put(from: &Path, to: &Path) {
    // A link where it can be: the launcher looks beside its own executable, whatever that is a link to.
    if fs::hard_link(from, to).is_err() {
        let copied = Command::new("cp").arg(from).arg(to).status().expect("cp starts");
        assert!(copied.success(), "{} to {}", from.display(), to.display());
    }
}

/// A shell script under the name `path`, in place of what was there.
pub fn script(path: &Path, text: &str) {
    let mut shell = Command::new("/bin/sh")
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sh starts");
    let text = format!("#!/bin/sh\n{text}\n");
    shell.stdin.take().expect("piped").write_all(text.as_bytes()).expect("written");
    assert!(shell.wait().expect("waited").success(), "{}", path.display());
}
