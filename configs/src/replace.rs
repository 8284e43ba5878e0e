//! Files that are replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Writes a file so that a reader, and a machine that loses its power, sees the old or the new one, never half of it. Behind a
/// link the file that it leads to is replaced, not the link; what is no file, as a device, is written to as it is.
///
/// # Errors
/// The system's.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, true)
}

/// The same of a file that is written so often that nothing waits for a disk: a machine that loses its power may lose it.
///
/// # Errors
/// The system's.
pub fn write_often(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, false)
}

/// [`write_atomically`], unless these bytes are there already: a disk without room is then no matter.
///
/// # Errors
/// The system's.
pub fn write_if_other(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) { Ok(()) } else { write_atomically(path, bytes) }
}

/// Whether `name` is that of a file on its way to `of`, of a process that was killed when it wrote it.
pub fn is_left_of(name: &str, of: &str) -> bool {
    let process = name.strip_prefix(of).and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".tmp"));
    process.is_some_and(|process| process.parse::<u32>().is_ok())
}

fn write(path: &Path, bytes: &[u8], lasts: bool) -> io::Result<()> {
    // /dev/stdout, whatever it leads to.
    let is_descriptor = |path: &Path| path.starts_with("/proc") || path.starts_with("/dev/fd");
    if is_descriptor(path)
        || fs::read_link(path).is_ok_and(|to| is_descriptor(&to))
        || fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir())
    {
        let mut file = File::options().append(true).open(path)?;
        // Where this process goes on writing its own lines, they are to come behind.
        if is_same_file(&file, &io::stdout()) {
            return io::stdout().write_all(bytes).and_then(|()| io::stdout().flush());
        }
        return file.write_all(bytes);
    }
    let path = match fs::symlink_metadata(path) {
        Ok(there) if there.is_symlink() => match fs::canonicalize(path) {
            Ok(leads_to) => leads_to,
            Err(_) => return fs::write(path, bytes), // there is nothing yet
        },
        _ => path.to_owned(),
    };
    let aside = aside(&path)?;
    let written = (|| {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        if lasts {
            file.sync_all()?;
        }
        fs::rename(&aside, &path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&aside);
    }
    written?;
    if lasts {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        match File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()) {
            // There are file systems that cannot, and need not be asked.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {}
            synced => synced?,
        }
    }
    Ok(())
}

fn is_same_file(file: &File, other: &impl AsFd) -> bool {
    let about = |file: &File| file.metadata().map(|file| (file.dev(), file.ino())).ok();
    let other = other.as_fd().try_clone_to_owned().map(File::from).ok();
    about(file).is_some_and(|file| other.and_then(|other| about(&other)) == Some(file))
}

/// The whole name and this process: a file of the user's, or of another command at work here, has another name.
fn aside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_already_is_not_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("plan.toml");
        let place = || fs::metadata(&path).expect("there").ino();
        write_if_other(&path, b"old").expect("written");
        let first = place();
        write_if_other(&path, b"old").expect("nothing to do");
        assert_eq!(place(), first);
        write_if_other(&path, b"new").expect("written");
        assert_eq!((fs::read(&path).expect("read"), place() == first), (b"new".to_vec(), false));
    }

    #[test]
    fn a_file_is_written_beside_whatever_else_lies_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let (page, own) = (folder.path().join("keep.html"), folder.path().join("keep.tmp"));
        fs::write(&own, "the user's").expect("written");
        write_atomically(&page, b"old").expect("written");
        write_atomically(&page, b"new").expect("written");
        assert_eq!(
            (fs::read(&page).unwrap(), fs::read(&own).unwrap()),
            (b"new".to_vec(), b"the user's".to_vec())
        );
        // A folder is in the way: the error is told, and nothing is left behind.
        let taken = folder.path().join("taken");
        fs::create_dir_all(taken.join("full")).expect("made");
        write_atomically(&taken, b"x").expect_err("a folder");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_link_stays_a_link_and_a_pipe_a_pipe() {
        let folder = tempfile::tempdir().expect("a folder");
        let (page, link) = (folder.path().join("page.html"), folder.path().join("link.html"));
        fs::write(&page, "old").expect("written");
        std::os::unix::fs::symlink("page.html", &link).expect("linked");
        write_atomically(&link, b"new").expect("written");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&page).unwrap(), b"new");

        fs::remove_file(&page).expect("removed");
        write_atomically(&link, b"again").expect("written");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&page).unwrap(), b"again");

        // As /dev/stdout is one.
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
        write_atomically(Path::new(&path), b"said").expect("written");
        drop(writer);
        let mut said = String::new();
        io::Read::read_to_string(&mut reader, &mut said).expect("read");
        assert_eq!(said, "said");
        // A file that is written to already is written to there.
        let log = File::options().append(true).open(&page).expect("opened");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&log));
        write_atomically(Path::new(&path), b", and more").expect("written");
        assert_eq!(fs::read(&page).unwrap(), b"again, and more");
    }

    #[test]
    fn what_a_killed_process_left_is_known_by_its_name() {
        assert!(is_left_of("plan.toml.77.tmp", "plan.toml"));
        for other in ["mine.77.tmp", "plan.toml.x.tmp", "plan.toml.77", "plan.toml"] {
            assert!(!is_left_of(other, "plan.toml"), "{other}");
        }
    }
}
