// Facts about nccl.h that src/nccl/ffi.rs repeats in Rust, compared by the compiler. With MENTEE_REAL_HEADER they are
// taken from the header itself, signatures included; without it from the declarations below, which say what the
// header of NCCL 2.28.9 says.
#include <climits>
#include <cstddef>
#include <type_traits>

#ifdef MENTEE_REAL_HEADER
#include <nccl.h>

#define SIGNATURE(function, ...) \
    static_assert(std::is_same<decltype(&function), __VA_ARGS__>::value, "signature of " #function)
SIGNATURE(ncclGetVersion, ncclResult_t (*)(int*));
SIGNATURE(ncclGetUniqueId, ncclResult_t (*)(ncclUniqueId*));
SIGNATURE(ncclCommInitRankConfig, ncclResult_t (*)(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*));
SIGNATURE(ncclCommGetAsyncError, ncclResult_t (*)(ncclComm_t, ncclResult_t*));
SIGNATURE(ncclAllReduce, ncclResult_t (*)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                                          cudaStream_t));
SIGNATURE(ncclBroadcast, ncclResult_t (*)(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t));
SIGNATURE(ncclCommFinalize, ncclResult_t (*)(ncclComm_t));
SIGNATURE(ncclCommDestroy, ncclResult_t (*)(ncclComm_t));
SIGNATURE(ncclCommAbort, ncclResult_t (*)(ncclComm_t));
SIGNATURE(ncclGroupStart, ncclResult_t (*)());
SIGNATURE(ncclGroupEnd, ncclResult_t (*)());
SIGNATURE(ncclGetErrorString, const char* (*)(ncclResult_t));
SIGNATURE(ncclGetLastError, const char* (*)(ncclComm_t));
static_assert(sizeof(ncclComm_t) == sizeof(void*) && sizeof(cudaStream_t) == sizeof(void*), "handles are pointers");
#else
struct ncclUniqueId {
    char internal[128];
};
enum ncclResult_t { ncclSuccess = 0, ncclInProgress = 7, ncclNumResults = 8 };
enum ncclRedOp_t { ncclSum = 0, ncclMaxRedOp = INT_MAX };
enum ncclDataType_t { ncclFloat32 = 7, ncclFloat64 = 8, ncclBfloat16 = 9 };
struct ncclConfig_t {
    size_t size;
    unsigned int magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char* netName;
    int splitShare;
    int trafficClass;      // 2.26
    const char* commName;  // 2.27, and so on: not handed over
};
#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_VERSION(X, Y, Z) ((X) * 10000 + (Y) * 100 + (Z))
#define NCCL_VERSION_CODE 22809
#endif

#define SAME(fact, value) static_assert((unsigned long long)(fact) == (unsigned long long)(value), #fact)
// The structure of 2.18 ends, padded to its alignment, where the name of the communicator (2.27) begins.
#if NCCL_VERSION_CODE >= 22700
SAME(offsetof(ncclConfig_t, commName), MENTEE_CONFIG_SIZE);
#else
SAME(sizeof(ncclConfig_t), MENTEE_CONFIG_SIZE);
#endif
#if NCCL_VERSION_CODE >= 22600
SAME(offsetof(ncclConfig_t, trafficClass), MENTEE_OFFSET_TRAFFIC_CLASS);
#else
SAME(offsetof(ncclConfig_t, splitShare) + sizeof(int), MENTEE_OFFSET_TRAFFIC_CLASS);
#endif
SAME(alignof(ncclConfig_t), MENTEE_CONFIG_ALIGN);
SAME(offsetof(ncclConfig_t, size), MENTEE_OFFSET_SIZE);
SAME(offsetof(ncclConfig_t, magic), MENTEE_OFFSET_MAGIC);
SAME(offsetof(ncclConfig_t, version), MENTEE_OFFSET_VERSION);
SAME(offsetof(ncclConfig_t, blocking), MENTEE_OFFSET_BLOCKING);
SAME(offsetof(ncclConfig_t, cgaClusterSize), MENTEE_OFFSET_CGA);
SAME(offsetof(ncclConfig_t, minCTAs), MENTEE_OFFSET_MIN_CTAS);
SAME(offsetof(ncclConfig_t, maxCTAs), MENTEE_OFFSET_MAX_CTAS);
SAME(offsetof(ncclConfig_t, netName), MENTEE_OFFSET_NET_NAME);
SAME(offsetof(ncclConfig_t, splitShare), MENTEE_OFFSET_SPLIT_SHARE);
static_assert(NCCL_CONFIG_UNDEF_INT == MENTEE_UNDEFINED, "undefined");
SAME(0xcafebeef, MENTEE_MAGIC);
SAME(NCCL_VERSION(2, 18, 0), MENTEE_VERSION);
SAME(sizeof(ncclUniqueId), MENTEE_ID_SIZE);
SAME(alignof(ncclUniqueId), MENTEE_ID_ALIGN);
SAME(sizeof(ncclResult_t), MENTEE_RESULT_SIZE);
SAME(sizeof(ncclDataType_t), MENTEE_RESULT_SIZE);
SAME(sizeof(ncclRedOp_t), MENTEE_RESULT_SIZE);
SAME(ncclSuccess, MENTEE_RESULT_SUCCESS);
SAME(ncclInProgress, MENTEE_RESULT_IN_PROGRESS);
SAME(ncclSum, MENTEE_OPERATION_SUM);
SAME(ncclFloat32, MENTEE_TYPE_FLOAT32);
SAME(ncclFloat64, MENTEE_TYPE_FLOAT64);
SAME(ncclBfloat16, MENTEE_TYPE_BFLOAT16);
