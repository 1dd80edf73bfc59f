// float16 on the host, for kernels that cuda_runtime.h beside this file runs.
#ifndef SLUICE_TESTS_CUDA_FP16_H
#define SLUICE_TESTS_CUDA_FP16_H

extern "C" {
#include "runtime/number.h"
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) { return sl_f16_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {sl_float_to_f16(value)}; }

#endif
