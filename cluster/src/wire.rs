//! Bytes ↔ messages: a frame is a big-endian `u32` length and so many bytes of JSON. A frame that has not arrived
//! whole is not an error ([`Decoder::next`] says `None`); one that announces more than the limit is, before any
//! of it is stored.

use serde::{Serialize, de::DeserializeOwned};

/// Largest frame: the longest message is an error text, clipped far below this.
pub const MAX_FRAME: usize = 64 * 1024;
/// Largest frame to a worker, which has chosen whom to listen to: that of a commit names a file of every rank.
pub const MAX_TO_WORKER: usize = 1024 * 1024;
/// Largest first frame: a peer that has not shown its token gets little memory.
pub const MAX_HELLO: usize = 4 * 1024;

const HEADER: usize = 4;

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Longer than the limit.
    #[error("a frame of {bytes} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Announced length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// No message of this protocol.
    #[error("a frame holds no message of this protocol: {0}")]
    NotAMessage(#[from] serde_json::Error),
}

/// One message as a frame.
///
/// # Errors
/// [`WireError::TooLong`] above [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    encode_within(message, MAX_FRAME)
}

/// One message as a frame of at most `limit` bytes.
///
/// # Errors
/// [`WireError::TooLong`] above that.
pub fn encode_within<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; HEADER];
    serde_json::to_writer(&mut frame, message)?;
    let bytes = frame.len() - HEADER;
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= limit);
    let length = length.ok_or(WireError::TooLong { bytes, limit })?;
    frame[..HEADER].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// Collects bytes of a stream and takes messages out of them. Holds at most one frame and one read's worth of bytes.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    limit: usize,
}

impl Decoder {
    /// Refuses frames of more than `limit` bytes.
    pub fn new(limit: usize) -> Decoder {
        Decoder { bytes: Vec::new(), limit }
    }

    /// Changes the limit from the next frame on.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`WireError`]; the stream cannot be used any further then.
    #[expect(clippy::should_implement_trait, reason = "fallible, and generic over the message")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        let Some(header) = self.bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_be_bytes(*header) as usize;
        if length > self.limit {
            return Err(WireError::TooLong { bytes: length, limit: self.limit });
        }
        if self.bytes.len() < HEADER + length {
            return Ok(None);
        }
        let message = serde_json::from_slice(&self.bytes[HEADER..HEADER + length]);
        self.bytes.drain(..HEADER + length);
        Ok(Some(message?))
    }
}
