// All that nccl.h needs of CUDA's header, which the wheel of CUDA's run time cannot be compiled with alone.
#pragma once
typedef struct CUstream_st* cudaStream_t;
