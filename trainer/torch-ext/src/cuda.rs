//! The CUDA part of libtorch, opened at run time: the program itself links only the CPU part, and so starts on machines
//! without any of NVIDIA's libraries.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::file_of_libtorch;

/// What NVIDIA's driver installs; there is no device without it.
const DRIVER: &str = "libcuda.so.1";
/// Registers CUDA's kernels with libtorch when it is loaded.
const CUDA_PART: &str = "libtorch_cuda.so";

/// Why there is no device to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// This machine has no driver.
    #[error("no NVIDIA driver ({DRIVER} cannot be loaded)")]
    NoDriver,
    /// There is a driver, and libtorch's CUDA part is missing or broken.
    #[error(
        "{}: {reason}; install torch with its CUDA libraries (ci/setup does where there is a driver)",
        file.display()
    )]
    NoLibrary {
        /// The file that was tried.
        file: PathBuf,
        /// The loader's account.
        reason: String,
    },
}

/// Opens libtorch's CUDA part, the one beside the CPU part that is loaded, and says how many devices it can use. Nothing
/// is opened where there is no driver. May be called again; then it only counts.
///
/// # Errors
/// See [`NoCuda`].
pub fn open() -> Result<u32, NoCuda> {
    // SAFETY: loads the driver, whose initialisers are NVIDIA's.
    let driver = unsafe { Library::open(Some(DRIVER), RTLD_NOW) }.map_err(|_| NoCuda::NoDriver)?;
    // It has threads and state of its own: never unloaded.
    std::mem::forget(driver);
    open_part(&part_beside(file_of_libtorch().as_deref()))?;
    Ok(u32::try_from(tch::Cuda::device_count()).unwrap_or(0))
}

/// The file in the same folder; else whatever the loader finds.
fn part_beside(libtorch: Option<&Path>) -> PathBuf {
    libtorch.map_or_else(|| PathBuf::from(CUDA_PART), |file| file.with_file_name(CUDA_PART))
}

fn open_part(file: &Path) -> Result<(), NoCuda> {
    // Global, as Python's torch has it: what is loaded later looks for libtorch's symbols.
    // SAFETY: runs libtorch's own initialisers.
    match unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            // Its kernels are registered with the CPU part: never unloaded.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(NoCuda::NoLibrary { file: file.to_owned(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_beside_is_meant() {
        let libtorch = Path::new("/somewhere/lib/libtorch_cpu.so");
        assert_eq!(part_beside(Some(libtorch)), Path::new("/somewhere/lib/libtorch_cuda.so"));
        assert_eq!(part_beside(None), Path::new(CUDA_PART));
    }

    #[test]
    fn a_part_that_is_missing_is_named() {
        let error = open_part(Path::new("/nowhere/libtorch_cuda.so")).expect_err("no such file").to_string();
        assert!(error.starts_with("/nowhere/libtorch_cuda.so: "), "{error}");
        assert!(error.contains("install torch with its CUDA libraries"), "{error}");
    }

    #[test]
    fn without_a_driver_nothing_is_opened() {
        match open() {
            // SAFETY: as in `open`.
            Err(NoCuda::NoDriver) => assert!(unsafe { Library::open(Some(DRIVER), RTLD_NOW) }.is_err()),
            // On a machine with a driver: as many as there are, or the reason why they cannot be used.
            Ok(devices) => assert_eq!(i64::from(devices), tch::Cuda::device_count()),
            Err(NoCuda::NoLibrary { reason, .. }) => assert!(!reason.is_empty()),
        }
    }
}
