/* The AVX-512 tier (F, BW, DQ, VL): two registers are 32 floats or 16 doubles. */
#include <stdbool.h>

#include "comm/tiers/plain.h"
#include "comm/tiers/streaming.h"
#include "runtime/tiers/simd.h"

#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef struct values {
  __m512 low, high;
} values;
enum { VALUES_BYTES = 128 };

#define DOUBLES(x) _mm512_castps_pd(x)
#define FLOATS(x) _mm512_castpd_ps(x)

/* Low holds the elements of even number, high those of odd number: nothing crosses between parts of a register. */
LANE_FUNCTION values load_bf16(const void *from) {
  __m512i pairs = _mm512_loadu_si512(from);
  return (values){_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                  _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)))};
}

/* To nearest even, in the upper half of each lane. A NaN stays one: it came from a bfloat16 or is the processor's
 * default, so that its lower half is 0, and the addition doesn't carry out of that. */
LANE_FUNCTION __m512i round_bf16(__m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

LANE_FUNCTION void store_bf16(void *to, values x) {
  __m512i even = round_bf16(x.low), odd = round_bf16(x.high);
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd));
}

LANE_FUNCTION values load(sl_dtype dtype, const void *from) {
  const char *second = (const char *)from + (dtype == SL_F16 ? 32 : 64);
  if (dtype == SL_BF16) return load_bf16(from);
  if (dtype == SL_F16) {
    return (values){_mm512_cvtph_ps(_mm256_loadu_si256(from)),
                    _mm512_cvtph_ps(_mm256_loadu_si256((const void *)second))};
  }
  return (values){_mm512_loadu_ps(from), _mm512_loadu_ps((const void *)second)};
}

LANE_FUNCTION void store(sl_dtype dtype, void *to, values x) {
  if (dtype == SL_BF16) {
    store_bf16(to, x);
  } else if (dtype == SL_F16) {
    _mm256_storeu_si256(to, _mm512_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm256_storeu_si256((void *)((char *)to + 32),
                        _mm512_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    _mm512_storeu_ps(to, x.low);
    _mm512_storeu_ps((void *)((char *)to + 64), x.high);
  }
}

LANE_FUNCTION values broadcast(bool wide, double value) {
  __m512 all = wide ? FLOATS(_mm512_set1_pd(value)) : _mm512_set1_ps((float)value);
  return (values){all, all};
}

LANE_FUNCTION __m512 add_half(bool wide, __m512 x, __m512 y) {
  return wide ? FLOATS(_mm512_add_pd(DOUBLES(x), DOUBLES(y))) : _mm512_add_ps(x, y);
}

LANE_FUNCTION __m512 multiply_half(bool wide, __m512 x, __m512 y) {
  return wide ? FLOATS(_mm512_mul_pd(DOUBLES(x), DOUBLES(y))) : _mm512_mul_ps(x, y);
}

LANE_FUNCTION __m512 divide_half(bool wide, __m512 x, __m512 y) {
  return wide ? FLOATS(_mm512_div_pd(DOUBLES(x), DOUBLES(y))) : _mm512_div_ps(x, y);
}

/* The instructions give their second operand where the first is not below (above) it: also of two zeros, and where
 * either is NaN. So only a NaN in x has to be put back. */
LANE_FUNCTION __m512 put_nan(bool wide, __m512 x, __m512 result) {
  if (!wide) return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), result, x);
  __mmask8 nan = _mm512_cmp_pd_mask(DOUBLES(x), DOUBLES(x), _CMP_UNORD_Q);
  return FLOATS(_mm512_mask_blend_pd(nan, DOUBLES(result), DOUBLES(x)));
}

LANE_FUNCTION __m512 smaller_half(bool wide, __m512 sum, __m512 x) {
  return put_nan(wide, x, wide ? FLOATS(_mm512_min_pd(DOUBLES(x), DOUBLES(sum))) : _mm512_min_ps(x, sum));
}

LANE_FUNCTION __m512 larger_half(bool wide, __m512 sum, __m512 x) {
  return put_nan(wide, x, wide ? FLOATS(_mm512_max_pd(DOUBLES(x), DOUBLES(sum))) : _mm512_max_ps(x, sum));
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

const sl_reduce_kernel sl_reduce_avx512 = {"avx512", SL_ISA_AVX512, reduce, copy_streaming};
