//! Writes where libtorch and MPI lie into the binary, so that it starts without `LD_LIBRARY_PATH`.

fn main() {
    for variable in ["DEP_MENTEE_TORCH_EXT_LIBDIR", "DEP_MENTEE_MPI_LIBDIRS"] {
        println!("cargo:rerun-if-env-changed={variable}");
        let folders = std::env::var(variable).unwrap_or_default();
        for folder in folders.split(':').filter(|folder| !folder.is_empty()) {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
        }
    }
}
