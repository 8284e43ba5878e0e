//! Compiles the C++ shim against the libtorch that torch-sys uses (`LIBTORCH`).

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = PathBuf::from(
        std::env::var("LIBTORCH").expect("LIBTORCH is not set: run ci/setup, or point it at a libtorch 2.11"),
    );
    let libtorch = libtorch.canonicalize().unwrap_or_else(|error| {
        panic!("LIBTORCH = {}: {error}; run ci/setup, or point it at a libtorch 2.11", libtorch.display())
    });
    let lib = libtorch.join("lib");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("cpp/shim.cpp")
        .file("cpp/layers.cpp")
        .file("cpp/winograd.cpp")
        .file("cpp/batch_norm.cpp")
        .file("cpp/update.cpp")
        .file("cpp/launch.cpp")
        .file("cpp/device.cpp")
        .file("cpp/device_norm.cpp")
        .file("cpp/device_views.cpp")
        .file("cpp/profile.cpp")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        // at::parallel_for is silently serial without it.
        .flag("-fopenmp")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .opt_level(3)
        .warnings(false)
        .compile("mentee_torch_ext");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dl");
    // The OpenMP runtime that libtorch itself loads: two of them would fight over the cores.
    println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:libdir={}", lib.display());
}
