//! Finds the folder of the MPI library and writes it into this package's own tests and examples as their run
//! path, so that they start without `LD_LIBRARY_PATH`.
//!
//! Cargo does not hand link arguments on to the packages that depend on this one. A package that builds a
//! binary gets the folder as `DEP_MENTEE_MPI_LIBDIRS` (several are separated by `:`) and repeats the loop
//! below in its `build.rs`.

use std::{
    env,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=MPICC");
    #[cfg(feature = "mpi")]
    find_mpi();
    find_nccl();
}

/// Where NVIDIA's own library and header are, for the tests that compare with them; nothing else needs them. From
/// `MENTEE_NCCL` and `MENTEE_NCCL_INCLUDE`, else from the wheels that `ci/setup --python` installs.
fn find_nccl() {
    println!("cargo:rustc-check-cfg=cfg(real_nccl, real_nccl_header)");
    println!("cargo:rerun-if-env-changed=MENTEE_NCCL");
    println!("cargo:rerun-if-env-changed=MENTEE_NCCL_INCLUDE");
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv");
    println!("cargo:rerun-if-changed={}", venv.join("setup-bench.stamp").display());
    // .venv/lib/python3.X/site-packages/nvidia
    let pythons = std::fs::read_dir(venv.join("lib")).into_iter().flatten().flatten();
    let wheels = pythons.map(|python| python.path().join("site-packages/nvidia"));
    let wheels = wheels.filter_map(|folder| folder.canonicalize().ok()).next().unwrap_or_default();

    let library =
        env::var_os("MENTEE_NCCL").map_or_else(|| wheels.join("nccl/lib/libnccl.so.2"), PathBuf::from);
    if library.exists() {
        println!("cargo:rustc-cfg=real_nccl");
    }
    println!("cargo:rustc-env=MENTEE_REAL_NCCL={}", library.display());
    let include =
        env::var_os("MENTEE_NCCL_INCLUDE").map_or_else(|| wheels.join("nccl/include"), PathBuf::from);
    if include.join("nccl.h").exists() {
        println!("cargo:rustc-cfg=real_nccl_header");
    }
    println!("cargo:rustc-env=MENTEE_REAL_NCCL_INCLUDE={}", include.display());
}

#[cfg(feature = "mpi")]
fn find_mpi() {
    // When nothing is found, rsmpi's own build script stops the build and lists where it looked.
    let Ok(library) = build_probe_mpi::probe() else { return };
    let folders: Vec<String> = library.lib_paths.iter().map(|path| path.display().to_string()).collect();
    for folder in &folders {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
    println!("cargo:libdirs={}", folders.join(":"));
    // The tests look for mpirun beside the compiler wrapper.
    println!("cargo:rustc-env=MENTEE_MPICC={}", library.mpicc.unwrap_or_default());
}
