/* The AVX2 tier (with FMA and F16C): sixteen lanes are two registers. */
#include <math.h>

#include "accumulate/kernel.h"
#include "runtime/tiers/simd.h"

#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef struct floats16 {
  __m256 low, high;
} floats16;
typedef struct ints16 {
  __m256i low, high;
} ints16;
typedef __m256i extremes;
typedef struct mask16 {
  __m256 low, high;
} mask16;

LANE_FUNCTION floats16 load_f32(const void *values) {
  const float *from = values;
  return (floats16){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}

LANE_FUNCTION void store_f32(void *values, floats16 what) {
  float *to = values;
  _mm256_storeu_ps(to, what.low);
  _mm256_storeu_ps(to + 8, what.high);
}

LANE_FUNCTION __m256 widen_bf16(const uint16_t *from) {
  __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

LANE_FUNCTION floats16 load_bf16(const void *values) {
  const uint16_t *from = values;
  return (floats16){widen_bf16(from), widen_bf16(from + 8)};
}

/* To nearest even; NaN keeps its upper bits and becomes quiet. As sl_float_to_bf16. */
LANE_FUNCTION __m256i narrow_bf16(__m256 values) {
  __m256i bits = _mm256_castps_si256(values);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

LANE_FUNCTION void store_bf16(void *values, floats16 what) {
  __m256i packed = _mm256_packus_epi32(narrow_bf16(what.low), narrow_bf16(what.high));
  _mm256_storeu_si256((__m256i *)values, _mm256_permute4x64_epi64(packed, 0xd8));
}

LANE_FUNCTION floats16 load_f16(const void *values) {
  const uint16_t *from = values;
  return (floats16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
}

LANE_FUNCTION void store_f16(void *values, floats16 what) {
  uint16_t *to = values;
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(what.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(to + 8), _mm256_cvtps_ph(what.high, _MM_FROUND_TO_NEAREST_INT));
}

LANE_FUNCTION floats16 round_to_f16(floats16 x) {
  return (floats16){_mm256_cvtph_ps(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT)),
                    _mm256_cvtph_ps(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT))};
}

LANE_FUNCTION floats16 broadcast(float value) { return (floats16){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

LANE_FUNCTION floats16 add(floats16 x, floats16 y) {
  return (floats16){_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)};
}

LANE_FUNCTION floats16 subtract(floats16 x, floats16 y) {
  return (floats16){_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)};
}

LANE_FUNCTION floats16 multiply(floats16 x, floats16 y) {
  return (floats16){_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)};
}

#if defined(SL_EMULATED) /* SIMDe does not fuse where the processor cannot */
LANE_FUNCTION __m256 multiply_add_half(__m256 x, __m256 y, __m256 sum) {
  float a[8], b[8], c[8];
  _mm256_storeu_ps(a, x), _mm256_storeu_ps(b, y), _mm256_storeu_ps(c, sum);
  for (int i = 0; i < 8; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return _mm256_loadu_ps(c);
}
#else
#define multiply_add_half _mm256_fmadd_ps
#endif

LANE_FUNCTION floats16 multiply_add(floats16 x, floats16 y, floats16 sum) {
  return (floats16){multiply_add_half(x.low, y.low, sum.low), multiply_add_half(x.high, y.high, sum.high)};
}

LANE_FUNCTION ints16 broadcast_int(uint32_t value) {
  return (ints16){_mm256_set1_epi32((int)value), _mm256_set1_epi32((int)value)};
}

LANE_FUNCTION ints16 lane_numbers(void) {
  return (ints16){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

LANE_FUNCTION ints16 bits_of(floats16 x) { return (ints16){_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

LANE_FUNCTION floats16 floats_of(ints16 x) {
  return (floats16){_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}

LANE_FUNCTION floats16 to_floats(ints16 x) { return (floats16){_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

LANE_FUNCTION ints16 and_ints(ints16 x, ints16 y) {
  return (ints16){_mm256_and_si256(x.low, y.low), _mm256_and_si256(x.high, y.high)};
}

LANE_FUNCTION ints16 xor_ints(ints16 x, ints16 y) {
  return (ints16){_mm256_xor_si256(x.low, y.low), _mm256_xor_si256(x.high, y.high)};
}

LANE_FUNCTION ints16 add_ints(ints16 x, ints16 y) {
  return (ints16){_mm256_add_epi32(x.low, y.low), _mm256_add_epi32(x.high, y.high)};
}

LANE_FUNCTION ints16 multiply_ints(ints16 x, ints16 y) {
  return (ints16){_mm256_mullo_epi32(x.low, y.low), _mm256_mullo_epi32(x.high, y.high)};
}

LANE_FUNCTION ints16 shift_right(ints16 x, int bits) {
  return (ints16){_mm256_srli_epi32(x.low, bits), _mm256_srli_epi32(x.high, bits)};
}

LANE_FUNCTION ints16 absolute_bits(floats16 x) { return and_ints(bits_of(x), broadcast_int(0x7fffffffu)); }

LANE_FUNCTION floats16 cut_fraction(floats16 x) { /* |x| < 2^31 */
  return (floats16){_mm256_cvtepi32_ps(_mm256_cvttps_epi32(x.low)), _mm256_cvtepi32_ps(_mm256_cvttps_epi32(x.high))};
}

LANE_FUNCTION floats16 copy_sign(floats16 magnitude, floats16 sign) {
  __m256 bit = _mm256_set1_ps(-0.0f);
  return (floats16){_mm256_or_ps(magnitude.low, _mm256_and_ps(sign.low, bit)),
                    _mm256_or_ps(magnitude.high, _mm256_and_ps(sign.high, bit))};
}

LANE_FUNCTION mask16 lanes_below(floats16 x, floats16 y) {
  return (mask16){_mm256_cmp_ps(x.low, y.low, _CMP_LT_OQ), _mm256_cmp_ps(x.high, y.high, _CMP_LT_OQ)};
}

LANE_FUNCTION uint32_t mask_bits(mask16 mask) {
  return (uint32_t)_mm256_movemask_ps(mask.low) | (uint32_t)_mm256_movemask_ps(mask.high) << 8;
}

LANE_FUNCTION floats16 choose(mask16 mask, floats16 set, floats16 other) {
  return (floats16){_mm256_blendv_ps(other.low, set.low, mask.low), _mm256_blendv_ps(other.high, set.high, mask.high)};
}

LANE_FUNCTION float sum_lanes(floats16 x) {
  __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LANE_FUNCTION extremes no_largest(void) { return _mm256_setzero_si256(); }

LANE_FUNCTION extremes no_smallest(void) { return _mm256_set1_epi32(-1); }

LANE_FUNCTION extremes keep_largest(extremes largest, ints16 x) {
  return _mm256_max_epu32(largest, _mm256_max_epu32(x.low, x.high));
}

LANE_FUNCTION extremes keep_smallest(extremes smallest, ints16 x) {
  return _mm256_min_epu32(smallest, _mm256_min_epu32(x.low, x.high));
}

LANE_FUNCTION uint32_t largest_of(extremes x) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1)));
}

LANE_FUNCTION uint32_t smallest_of(extremes x) { return ~largest_of(_mm256_xor_si256(x, _mm256_set1_epi32(-1))); }

#include "accumulate/tiers/block.h"

const sl_accumulate_kernel sl_accumulate_avx2 = {"avx2", SL_ISA_AVX2, accumulate, measure, read};
