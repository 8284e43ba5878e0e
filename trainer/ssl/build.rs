//! Tests of this crate find libtorch where torch-ext found it.

fn main() {
    let lib =
        std::env::var("DEP_MENTEE_TORCH_EXT_LIBDIR").expect("mentee-torch-ext says where libtorch lies");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
