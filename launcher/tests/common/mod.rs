//! Programs that tests put somewhere and then start, and terminals to start them on.
//!
//! Tests run side by side and start programs: a file that this process has open for writing is, for a moment, open in the
//! child of another test too, and cannot be executed then ("Text file busy"). So no program is written by this process.

use std::ffi::CStr;
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
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

/// A new terminal of 80 by 24: our end of it, and the other. No program that another test starts meanwhile gets ours.
pub fn terminal() -> (fs::File, fs::File) {
    // SAFETY: no memory is involved.
    let ours = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    assert!(ours >= 0, "a terminal");
    // SAFETY: it was just opened, and nobody else has it.
    let ours = unsafe { fs::File::from_raw_fd(ours) };
    let mut name = [0; 64];
    let size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open, `size` is what that request reads, and `name` is as long as is said.
    let made = unsafe {
        libc::ioctl(ours.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) == 0
            && libc::grantpt(ours.as_raw_fd()) == 0
            && libc::unlockpt(ours.as_raw_fd()) == 0
            && libc::ptsname_r(ours.as_raw_fd(), name.as_mut_ptr(), name.len()) == 0
    };
    assert!(made, "a terminal");
    // SAFETY: ptsname_r has ended it with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    let theirs = Path::new(name.to_str().expect("a path"));
    let theirs = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(theirs);
    (ours, theirs.expect("opened"))
}
