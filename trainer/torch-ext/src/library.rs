//! Which libtorch this process has loaded.

use std::ffi::CStr;
use std::fs;
use std::path::PathBuf;

use crate::sys;

/// The version that libtorch says it was built as, such as "2.11.0"; `None` when it does not say.
pub fn version_of_libtorch() -> Option<String> {
    // SAFETY: the shim returns a NUL-terminated string that lives as long as the process.
    let config = unsafe { CStr::from_ptr(sys::mentee_torch_config()) }.to_string_lossy();
    version_in(&config).map(str::to_owned)
}

/// The file that the loader took `libtorch_cpu.so` from; `None` where the system does not list what is mapped.
pub fn file_of_libtorch() -> Option<PathBuf> {
    mapped(&fs::read_to_string("/proc/self/maps").ok()?, "libtorch_cpu.so")
}

/// `TORCH_VERSION=2.11.0` among libtorch's build settings.
fn version_in(config: &str) -> Option<&str> {
    let (_, rest) = config.split_once("TORCH_VERSION=")?;
    let end = rest.find([',', '\n', ' ']).unwrap_or(rest.len());
    Some(&rest[..end]).filter(|version| !version.is_empty())
}

/// The path of the first mapped file of that name in `/proc/self/maps` (proc(5)).
fn mapped(maps: &str, name: &str) -> Option<PathBuf> {
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    paths.find(|path| path.file_name().is_some_and(|file| file == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_files_are_found_in_what_the_system_says() {
        let config =
            "PyTorch built with:\n  - Build settings: LAPACK_INFO=mkl, TORCH_VERSION=2.11.0, USE_CUDA=1, \n";
        assert_eq!(version_in(config), Some("2.11.0"));
        assert_eq!(version_in("nothing"), None);
        let maps = "7f00-7f01 r-xp 00000000 fe:00 12   /usr/lib/libc.so.6\n\
                    7f02-7f03 r--p 00000000 fe:00 13   /a folder/libtorch_cpu.so\n7f04-7f05 rw-p 00000000 00:00 0\n";
        assert_eq!(mapped(maps, "libtorch_cpu.so"), Some(PathBuf::from("/a folder/libtorch_cpu.so")));
        assert_eq!(mapped(maps, "libtorch_cuda.so"), None);
    }

    #[test]
    fn this_process_has_the_libtorch_that_tch_accepts() {
        assert_eq!(version_of_libtorch().as_deref(), Some("2.11.0"));
        let file = file_of_libtorch().expect("mapped");
        assert!(file.is_file(), "{}", file.display());
    }
}
