/* What a build with CUDA kernels says of itself; no_cuda.c is its counterpart. */
#include <sluice/cuda.h>

extern "C" bool sl_cuda_built(void) { return true; }
