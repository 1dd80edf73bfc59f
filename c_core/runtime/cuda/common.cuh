/* What every CUDA kernel file shares: element types, sums over a warp, launching, and the way from a CUDA error to a
 * status. Kernels use static shared memory and warp intrinsics only, so that tests can also run them on the host. */
#ifndef SL_RUNTIME_CUDA_CUH
#define SL_RUNTIME_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include <sluice/types.h>

extern "C" {
#include "runtime/status.h"
}

namespace sluice_cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

/* Number<T>: the type in which values of storage type T are computed, and the conversions. */
template <typename T>
struct Number;

template <>
struct Number<float> {
  using Compute = float;
  static __device__ float read(float value) { return value; }
  static __device__ float write(float value) { return value; }
};

template <>
struct Number<double> {
  using Compute = double;
  static __device__ double read(double value) { return value; }
  static __device__ double write(double value) { return value; }
};

template <>
struct Number<__nv_bfloat16> {
  using Compute = float;
  static __device__ float read(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __nv_bfloat16 write(float value) { return __float2bfloat16_rn(value); }
};

template <>
struct Number<__half> {
  using Compute = float;
  static __device__ float read(__half value) { return __half2float(value); }
  static __device__ __half write(float value) { return __float2half_rn(value); }
};

/* Every lane gets the same bits: each step of the butterfly adds the same two numbers on both sides. */
template <typename N>
__device__ N sum_over_warp(N value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

/* NaN is ignored unless every lane has one. */
template <typename N>
__device__ N max_over_warp(N value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(ALL_LANES, value, distance));
  }
  return value;
}

inline sl_status check_cuda(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return SL_OK;
  (void)cudaGetLastError(); /* it has been reported: the next call shall not see it again */
  return sl_fail(SL_INTERNAL, "%s failed: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

/* Grids are capped; kernels step over their items by the size of the grid. */
inline unsigned count_blocks(int64_t items, int64_t items_per_block) {
  constexpr int64_t most = int64_t{1} << 20;
  int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

template <typename... Parameters, typename... Arguments>
sl_status launch(const char *name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void *stream,
                 const Arguments &...arguments) {
  if (blocks == 0) return SL_OK;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, 1, 1);
  config.blockDim = dim3(threads, 1, 1);
  config.stream = static_cast<cudaStream_t>(stream);
  return check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace sluice_cuda

#endif
