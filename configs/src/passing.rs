//! What the system may do another time.

use std::io::{Error, ErrorKind};

/// Linux's ELOOP, for which there is no kind yet: a link that leads to itself.
const LOOP: i32 = 40;

/// Whether what the system refused may go well another time: a server that does not answer, too many open files, a full disk. Not
/// where there is no such file, it may not be read, or what was read is wrong.
#[must_use]
pub fn is_passing(error: &Error) -> bool {
    let stays = matches!(
        error.kind(),
        ErrorKind::InvalidFilename
            | ErrorKind::InvalidInput
            | ErrorKind::IsADirectory
            | ErrorKind::NotADirectory
            | ErrorKind::NotFound
            | ErrorKind::PermissionDenied
    );
    !stays && error.raw_os_error().is_some_and(|code| code != LOOP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_stays_away_and_a_server_that_does_not_answer_may_come_back() {
        let passing = |code| is_passing(&Error::from_raw_os_error(code));
        // ENOENT, EACCES, ENOTDIR, EISDIR, ELOOP; EIO, EMFILE, ENOSPC, ETIMEDOUT, ESTALE.
        assert_eq!([2, 13, 20, 21, LOOP].map(passing), [false; 5]);
        assert_eq!([5, 24, 28, 110, 116].map(passing), [true; 5]);
        // No word of the system's.
        assert!(!is_passing(&Error::from(ErrorKind::UnexpectedEof)));
        assert!(!is_passing(&Error::other("is a pipe")));
    }
}
