//! A piece of memory that all ranks of one machine see, each at an address of its own.
//!
//! Rank 0 makes a file that has no name and lives in memory (`memfd_create(2)`), the others open it through
//! `/proc/PID/fd/FD`, which the kernel allows to processes of the same user. Whether what they found there is that
//! file shows in a number at its beginning: on another machine, or in a container that numbers processes by itself,
//! that path leads nowhere or elsewhere. Unlike `/dev/shm`, such a file has no size limit but the machine's memory
//! (containers often allow 64 MB there), and nothing is left behind when a rank is killed.

use std::{
    ffi::c_void,
    fs::{File, OpenOptions},
    hash::{BuildHasher, Hasher, RandomState},
    io,
    os::fd::{AsRawFd, FromRawFd},
    ptr::NonNull,
};

use crate::{CollectiveError, Collectives};

/// The first bytes of every segment are the segment's own.
pub(super) const HEAD: usize = 128;

/// Memory of all ranks of a group. Unmapped when dropped; it lasts until the last rank has done so.
pub(super) struct Segment {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory at a fixed address; who may touch what and when is the business of those who use it, who reach
// it through pointers only.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// Where rank 0's file is: process, descriptor, and the number that proves it.
#[derive(Clone, Copy)]
struct Offer {
    process: u64,
    descriptor: u64,
    proof: u64,
}

impl Offer {
    fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (part, word) in bytes.chunks_exact_mut(8).zip([self.process, self.descriptor, self.proof]) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Offer> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Some(Offer { process: word(0), descriptor: word(8), proof: word(16) })
    }
}

impl Segment {
    /// Zeroed memory of `len` bytes behind [`HEAD`], the same for all ranks of `group`. Every rank calls it at the same place
    /// among its calls, and all of them get the segment, or none: then the reason of the lowest rank that cannot.
    pub(super) fn open(
        group: &dyn Collectives,
        len: usize,
    ) -> Result<Result<Segment, String>, CollectiveError> {
        let Some(len) = len.checked_add(HEAD) else { return Ok(Err("it is larger than memory".into())) };
        // The file stays open until all have found it.
        let made = (group.rank() == 0).then(|| make(len));
        let own = match &made {
            Some(Ok((_, _, offer))) => offer.to_bytes().to_vec(),
            Some(Err(error)) => error.to_string().into_bytes(),
            None => Vec::new(),
        };
        let offers = group.all_gather(&own)?;
        let found = match (&made, Offer::from_bytes(&offers[0])) {
            (Some(Err(_)), _) | (_, None) => Err(String::from_utf8_lossy(&offers[0]).into_owned()),
            (Some(Ok(_)), _) => Ok(None),
            (None, Some(offer)) => find(offer, len).map(Some),
        };
        let problem = found.as_ref().err().map(String::as_bytes).unwrap_or_default();
        let problems = group.all_gather(problem)?;
        if let Some((rank, problem)) = problems.iter().enumerate().find(|(_, problem)| !problem.is_empty()) {
            return Ok(Err(format!("rank {rank}: {}", String::from_utf8_lossy(problem))));
        }
        let made = made.and_then(Result::ok).map(|(_, segment, _)| segment);
        Ok(found.ok().flatten().or(made).ok_or_else(|| "no rank offered any".into()))
    }

    /// Bytes behind the head.
    pub(super) fn len(&self) -> usize {
        self.len - HEAD
    }

    /// The byte `offset` behind the head.
    ///
    /// # Panics
    /// When it lies beyond the end.
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len(), "{offset} of {} bytes", self.len());
        // SAFETY: inside the mapping by the check above.
        unsafe { self.at.as_ptr().add(HEAD + offset) }
    }

    fn map(file: &File, len: usize) -> io::Result<Segment> {
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping where the kernel likes; the descriptor is open.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, read_write, shared, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Large pages where the machine gives them to shared memory; it is as good as a hint, whatever comes of it.
        // SAFETY: the mapping just made.
        unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
        let at = NonNull::new(at.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Segment { at, len })
    }

    /// The number at the beginning.
    fn proof(&self) -> *mut u64 {
        self.at.as_ptr().cast()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `map`, unmapped once; pointers into it do not outlive it.
        unsafe { libc::munmap(self.at.as_ptr().cast::<c_void>(), self.len) };
    }
}

fn make(len: usize) -> io::Result<(File, Segment, Offer)> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a zero-terminated name.
    let descriptor = unsafe { libc::memfd_create(c"mentee".as_ptr(), flags) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, owned by nobody else.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(len as u64)?;
    // Nobody may shorten it under the feet of those who have mapped it.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain integers on an open descriptor.
    if unsafe { libc::fcntl(descriptor, libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let segment = Segment::map(&file, len)?;
    let proof = RandomState::new().build_hasher().finish() | 1;
    // SAFETY: the head is longer; nobody else has the file yet.
    unsafe { segment.proof().write(proof) };
    let offer = Offer { process: std::process::id().into(), descriptor: descriptor as u64, proof };
    Ok((file, segment, offer))
}

fn find(offer: Offer, len: usize) -> Result<Segment, String> {
    let path = format!("/proc/{}/fd/{}", offer.process, offer.descriptor);
    let other =
        || format!("{path} is not rank 0's memory: the ranks are on several machines, or in containers");
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => other(),
        _ => format!("{path}: {error}"),
    };
    // Sealed files are regular ones in memory: whatever else has this number is not opened, as opening it could wait.
    let link = std::fs::read_link(&path).map_err(failed)?;
    if !link.to_string_lossy().starts_with("/memfd:mentee") {
        return Err(other());
    }
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() != len as u64 {
        return Err(other());
    }
    let segment = Segment::map(&file, len).map_err(failed)?;
    // SAFETY: inside the mapping; written before the offer was made.
    if unsafe { segment.proof().read_volatile() } != offer.proof {
        return Err(other());
    }
    Ok(segment)
}
