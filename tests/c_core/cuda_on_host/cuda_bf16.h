// bfloat16 on the host, for kernels that cuda_runtime.h beside this file runs.
#ifndef SLUICE_TESTS_CUDA_BF16_H
#define SLUICE_TESTS_CUDA_BF16_H

extern "C" {
#include "runtime/number.h"
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return sl_bf16_to_float(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {sl_float_to_bf16(value)}; }

#endif
