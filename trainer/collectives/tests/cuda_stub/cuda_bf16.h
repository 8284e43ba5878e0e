// Empty: nccl.h includes it and declares nothing by it.
