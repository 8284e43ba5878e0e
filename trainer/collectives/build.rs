//! Finds the folder of the MPI library and writes it into this package's own tests and examples as their run
//! path, so that they start without `LD_LIBRARY_PATH`.
//!
//! Cargo does not hand link arguments on to the packages that depend on this one. A package that builds a
//! binary gets the folder as `DEP_MENTEE_MPI_LIBDIRS` (several are separated by `:`) and repeats the loop
//! below in its `build.rs`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=MPICC");
    #[cfg(feature = "mpi")]
    find_mpi();
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
