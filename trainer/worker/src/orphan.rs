//! While MPI starts: its own start waits for the launcher and for other ranks, and knows no deadline.

use std::os::unix::process::parent_id;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mentee_config::{complain, exit_code};

/// How often the parent is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Ends this process when the launcher that started it is gone; as long as this value lives.
#[derive(Debug)]
#[must_use = "nobody looks when this is dropped"]
pub struct ParentWatch {
    _alive: mpsc::Sender<()>,
}

impl ParentWatch {
    /// Of `rank`, for messages. Where there can be no thread more, nobody looks.
    pub fn start(rank: u32) -> Self {
        let (alive, watched) = mpsc::channel::<()>();
        let parent = parent_id();
        let look = move || {
            while watched.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                if parent_id() != parent {
                    complain!("error: rank {rank}: its launcher (process {parent}) is gone while MPI starts");
                    // MPI is in the middle of its start: nothing of it can be ended in order.
                    // SAFETY: ends the process, at any time.
                    unsafe { libc::_exit(exit_code::FAILED) };
                }
            }
        };
        let _ = thread::Builder::new().name("parent".into()).spawn(look);
        Self { _alive: alive }
    }
}
