//! Commands that are asked something, and given a time to answer in.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long the pipes of a command that has ended are read on, when something else holds them open.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub struct Said {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// It did not end in time, and was killed.
    pub timed_out: bool,
}

/// Runs a command, in a process group of its own so that all it started is ended with it.
///
/// # Errors
/// When it cannot be started, or there is no thread to read what it writes.
pub fn ask(mut command: Command, patience: Duration) -> std::io::Result<Said> {
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let (out, err) = match (reader(child.stdout.take()), reader(child.stderr.take())) {
        (Ok(out), Ok(err)) => (out, err),
        (Err(error), _) | (_, Err(error)) => {
            end_group(&child);
            child.wait()?;
            return Err(error);
        }
    };
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() >= patience {
            timed_out = true;
            end_group(&child);
            break child.wait()?;
        }
        thread::sleep(LOOK_EVERY);
    };
    // Also what the command left behind, which would keep the pipes open; what left the group is not waited for.
    end_group(&child);
    let until = Instant::now() + LAST_WORDS;
    Ok(Said { code: status.code(), out: out.text(until), err: err.text(until), timed_out })
}

/// A pipe that is read as it fills.
struct Reader {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: thread::JoinHandle<()>,
}

impl Reader {
    /// All of it, or what has come until then.
    fn text(self, until: Instant) -> String {
        while !self.thread.is_finished() && Instant::now() < until {
            thread::sleep(LOOK_EVERY);
        }
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::io::Result<Reader> {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = bytes.clone();
    let thread = thread::Builder::new().spawn(move || {
        let mut part = [0; 4096];
        let Some(mut pipe) = pipe else { return };
        // What was read until an error is what there is.
        while let Ok(count @ 1..) = pipe.read(&mut part) {
            into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&part[..count]);
        }
    })?;
    Ok(Reader { bytes, thread })
}

fn end_group(child: &Child) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: sends a signal to the group this process made; one that is gone is no harm.
        unsafe { libc::killpg(group, libc::SIGKILL) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    #[test]
    fn what_a_command_leaves_behind_holds_nobody_up() {
        let long = Duration::from_secs(60);
        let began = Instant::now();
        let said = ask(sh("sleep 60 & echo one; echo two >&2; exit 3"), long).unwrap();
        assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (Some(3), "one\n", "two\n"));
        assert!(!said.timed_out && began.elapsed() < long / 2);
        let said = ask(sh("setsid sleep 60 & echo one"), long).unwrap();
        assert_eq!((said.code, said.out.as_str()), (Some(0), "one\n"), "a session of its own");
        let said = ask(sh("echo one; sleep 60 & sleep 60"), Duration::from_millis(200)).unwrap();
        assert_eq!((said.code, said.out.as_str()), (None, "one\n"));
        assert!(said.timed_out && began.elapsed() < long / 2);
    }
}
