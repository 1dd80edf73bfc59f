/* The AVX2 tier (with F16C): two registers are 16 floats or 8 doubles. */
#include <stdbool.h>

#include "comm/tiers/plain.h"
#include "comm/tiers/streaming.h"
#include "runtime/tiers/simd.h"

#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef struct values {
  __m256 low, high;
} values;
enum { VALUES_BYTES = 64 };

#define DOUBLES(x) _mm256_castps_pd(x)
#define FLOATS(x) _mm256_castpd_ps(x)

/* Low holds the elements of even number, high those of odd number: nothing crosses between parts of a register. */
LANE_FUNCTION values load_bf16(const void *from) {
  __m256i pairs = _mm256_loadu_si256(from);
  return (values){_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                  _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)))};
}

/* To nearest even, in the upper half of each lane. A NaN stays one: it came from a bfloat16 or is the processor's
 * default, so that its lower half is 0, and the addition doesn't carry out of that. */
LANE_FUNCTION __m256i round_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

LANE_FUNCTION void store_bf16(void *to, values x) {
  __m256i even = round_bf16(x.low), odd = round_bf16(x.high);
  _mm256_storeu_si256(to, _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
}

LANE_FUNCTION values load(sl_dtype dtype, const void *from) {
  const char *second = (const char *)from + (dtype == SL_F16 ? 16 : 32);
  if (dtype == SL_BF16) return load_bf16(from);
  if (dtype == SL_F16) {
    return (values){_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128((const void *)second))};
  }
  return (values){_mm256_loadu_ps(from), _mm256_loadu_ps((const void *)second)};
}

LANE_FUNCTION void store(sl_dtype dtype, void *to, values x) {
  if (dtype == SL_BF16) {
    store_bf16(to, x);
  } else if (dtype == SL_F16) {
    _mm_storeu_si128(to, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)((char *)to + 16), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
  } else {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps((void *)((char *)to + 32), x.high);
  }
}

LANE_FUNCTION values broadcast(bool wide, double value) {
  __m256 all = wide ? FLOATS(_mm256_set1_pd(value)) : _mm256_set1_ps((float)value);
  return (values){all, all};
}

LANE_FUNCTION __m256 add_half(bool wide, __m256 x, __m256 y) {
  return wide ? FLOATS(_mm256_add_pd(DOUBLES(x), DOUBLES(y))) : _mm256_add_ps(x, y);
}

LANE_FUNCTION __m256 multiply_half(bool wide, __m256 x, __m256 y) {
  return wide ? FLOATS(_mm256_mul_pd(DOUBLES(x), DOUBLES(y))) : _mm256_mul_ps(x, y);
}

LANE_FUNCTION __m256 divide_half(bool wide, __m256 x, __m256 y) {
  return wide ? FLOATS(_mm256_div_pd(DOUBLES(x), DOUBLES(y))) : _mm256_div_ps(x, y);
}

/* The instructions give their second operand where the first is not below (above) it: also of two zeros, and where
 * either is NaN. So only a NaN in x has to be put back. */
LANE_FUNCTION __m256 put_nan(bool wide, __m256 x, __m256 result) {
  return wide ? FLOATS(
                    _mm256_blendv_pd(DOUBLES(result), DOUBLES(x), _mm256_cmp_pd(DOUBLES(x), DOUBLES(x), _CMP_UNORD_Q)))
              : _mm256_blendv_ps(result, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

LANE_FUNCTION __m256 smaller_half(bool wide, __m256 sum, __m256 x) {
  return put_nan(wide, x, wide ? FLOATS(_mm256_min_pd(DOUBLES(x), DOUBLES(sum))) : _mm256_min_ps(x, sum));
}

LANE_FUNCTION __m256 larger_half(bool wide, __m256 sum, __m256 x) {
  return put_nan(wide, x, wide ? FLOATS(_mm256_max_pd(DOUBLES(x), DOUBLES(sum))) : _mm256_max_ps(x, sum));
}

LANE_FUNCTION values add(bool wide, values x, values y) {
  return (values){add_half(wide, x.low, y.low), add_half(wide, x.high, y.high)};
}

LANE_FUNCTION values multiply(bool wide, values x, values y) {
  return (values){multiply_half(wide, x.low, y.low), multiply_half(wide, x.high, y.high)};
}

LANE_FUNCTION values divide(bool wide, values x, values y) {
  return (values){divide_half(wide, x.low, y.low), divide_half(wide, x.high, y.high)};
}

LANE_FUNCTION values keep_smallest(bool wide, values sum, values x) {
  return (values){smaller_half(wide, sum.low, x.low), smaller_half(wide, sum.high, x.high)};
}

LANE_FUNCTION values keep_largest(bool wide, values sum, values x) {
  return (values){larger_half(wide, sum.low, x.low), larger_half(wide, sum.high, x.high)};
}

#include "comm/tiers/lanes.h"

const sl_reduce_kernel sl_reduce_avx2 = {"avx2", SL_ISA_AVX2, reduce, copy_streaming};
