//! What `nccl.h` declares, as far as it is used here. The unit tests below have a C++ compiler check every number and
//! every offset, against the real header where there is one.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;
/// `cudaStream_t`.
pub(super) type CudaStream = *mut c_void;
/// `ncclResult_t`.
pub(super) type ResultCode = c_int;

pub(super) const SUCCESS: ResultCode = 0;
pub(super) const IN_PROGRESS: ResultCode = 7;

/// `ncclRedOp_t`.
pub(super) const SUM: c_int = 0;

/// `ncclDataType_t`.
pub(super) const FLOAT32: c_int = 7;
pub(super) const FLOAT64: c_int = 8;
pub(super) const BFLOAT16: c_int = 9;

pub(super) const UNIQUE_ID_BYTES: usize = 128;

/// `ncclUniqueId`; handed over by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; UNIQUE_ID_BYTES]);

/// "Take the default", for integers and for pointers.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclConfig_t` as NCCL 2.18 has it, which every later version accepts.
///
/// A library copies `size` bytes over its own defaults, at most as many as its own structure has, and then resets what
/// it knows to be younger than `version` (`parseCommConfig` in NCCL's `src/init.cc`, alike from 2.18.1 to 2.30.7). So
/// this one, with the size and the version of 2.18, sets what 2.18 knew and leaves the rest at the library's defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// In 2.18 the padding at the end; since 2.26 the traffic class lies here. Reset because of `version`, and set all
    /// the same.
    traffic_class: c_int,
}

const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// `NCCL_VERSION(2, 18, 0)`.
const CONFIG_VERSION: c_uint = 21800;

impl Config {
    pub(super) fn non_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal ( $($argument:ty),* ) -> $result:ty;)*) => {
        /// The functions of the library, looked up once.
        pub(super) struct Functions {
            $($(#[$doc])* pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Looks all functions up; the error is the name of the first that is missing.
            ///
            /// # Safety
            /// `library` is NCCL: its functions have the types that NCCL's header gives them. It is never closed.
            pub(super) unsafe fn load(
                library: &libloading::os::unix::Library,
            ) -> Result<Functions, &'static str> {
                Ok(Functions {
                    $($field: {
                        let name = concat!($symbol, "\0").as_bytes();
                        // SAFETY: as this function's; the pointer stays valid because the library is never closed.
                        *unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>(name) }
                            .map_err(|_| $symbol)?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion"(*mut c_int) -> ResultCode;
    get_unique_id = "ncclGetUniqueId"(*mut UniqueId) -> ResultCode;
    /// Communicator out, world size, id, rank, configuration.
    comm_init_rank_config = "ncclCommInitRankConfig"(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> ResultCode;
    comm_get_async_error = "ncclCommGetAsyncError"(Comm, *mut ResultCode) -> ResultCode;
    /// From, to, count, type, operation, communicator, stream.
    all_reduce = "ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> ResultCode;
    /// From, to, count, type, root, communicator, stream.
    broadcast = "ncclBroadcast"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CudaStream) -> ResultCode;
    comm_finalize = "ncclCommFinalize"(Comm) -> ResultCode;
    comm_destroy = "ncclCommDestroy"(Comm) -> ResultCode;
    comm_abort = "ncclCommAbort"(Comm) -> ResultCode;
    group_start = "ncclGroupStart"() -> ResultCode;
    group_end = "ncclGroupEnd"() -> ResultCode;
    get_error_string = "ncclGetErrorString"(ResultCode) -> *const c_char;
    /// The communicator may be null.
    get_last_error = "ncclGetLastError"(Comm) -> *const c_char;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, mem::offset_of, path::Path, process::Command};

    #[test]
    fn numbers_and_offsets_are_as_written_down() {
        compare(None);
    }

    #[test]
    #[cfg_attr(
        not(real_nccl_header),
        ignore = "needs nccl.h: ci/setup --python, or its folder in MENTEE_NCCL_INCLUDE when the tests are built"
    )]
    fn numbers_offsets_and_signatures_are_those_of_the_header() {
        compare(Some(env!("MENTEE_REAL_NCCL_INCLUDE")));
    }

    /// Compiles `tests/nccl_facts.cpp`, which compares its own declarations (or those of the header in `folder`) with
    /// the numbers handed in.
    fn compare(folder: Option<&str>) {
        let facts = [
            ("CONFIG_SIZE", size_of::<Config>()),
            ("CONFIG_ALIGN", align_of::<Config>()),
            ("OFFSET_SIZE", offset_of!(Config, size)),
            ("OFFSET_MAGIC", offset_of!(Config, magic)),
            ("OFFSET_VERSION", offset_of!(Config, version)),
            ("OFFSET_BLOCKING", offset_of!(Config, blocking)),
            ("OFFSET_CGA", offset_of!(Config, cga_cluster_size)),
            ("OFFSET_MIN_CTAS", offset_of!(Config, min_ctas)),
            ("OFFSET_MAX_CTAS", offset_of!(Config, max_ctas)),
            ("OFFSET_NET_NAME", offset_of!(Config, net_name)),
            ("OFFSET_SPLIT_SHARE", offset_of!(Config, split_share)),
            ("OFFSET_TRAFFIC_CLASS", offset_of!(Config, traffic_class)),
            ("MAGIC", CONFIG_MAGIC as usize),
            ("VERSION", CONFIG_VERSION as usize),
            ("ID_SIZE", size_of::<UniqueId>()),
            ("ID_ALIGN", align_of::<UniqueId>()),
            ("RESULT_SIZE", size_of::<ResultCode>()),
            ("RESULT_SUCCESS", SUCCESS as usize),
            ("RESULT_IN_PROGRESS", IN_PROGRESS as usize),
            ("OPERATION_SUM", SUM as usize),
            ("TYPE_FLOAT32", FLOAT32 as usize),
            ("TYPE_FLOAT64", FLOAT64 as usize),
            ("TYPE_BFLOAT16", BFLOAT16 as usize),
        ];
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl_facts.cpp");
        let mut compiler = Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()));
        compiler.args(["-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-deprecated-declarations"]);
        compiler.args(facts.map(|(name, value)| format!("-DMENTEE_{name}={value}u")));
        compiler.arg(format!("-DMENTEE_UNDEFINED=({UNDEFINED}LL)"));
        if let Some(folder) = folder {
            let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_stub");
            compiler.arg("-DMENTEE_REAL_HEADER").arg("-isystem").arg(cuda).arg("-isystem").arg(folder);
        }
        let output = compiler.arg(source).output().expect("a C++ compiler, c++ or what CXX names");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
