//! Signals that ask for a checkpoint and an end: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set a flag and do nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};

use crate::error::WorkerError;

/// Whether this rank was asked to stop. The ranks agree on the step in `agree.rs`.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Listens from now on.
    pub fn install() -> Result<Self, WorkerError> {
        let flag = Self::default();
        let listen = |signal, flag| match signal_hook::flag::register(signal, flag) {
            Ok(_) => Ok(()),
            Err(error) => Err(WorkerError::Failed(format!("cannot listen for signal {signal}: {error}"))),
        };
        for signal in [SIGTERM, SIGINT, SIGUSR1, SIGUSR2] {
            listen(signal, flag.0.clone())?;
        }
        // A write beyond the limit on a file's size is to be an error, not the end of the process.
        listen(SIGXFSZ, Arc::default())?;
        Ok(flag)
    }

    /// Whether a signal has come.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
