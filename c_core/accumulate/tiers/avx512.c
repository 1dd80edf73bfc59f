/* The AVX-512 tier (F, BW, DQ, VL): sixteen lanes are one register. */
#include <math.h>

#include "accumulate/kernel.h"
#include "runtime/tiers/simd.h"

#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef __m512 floats16;
typedef __m512i ints16;
typedef __m512i extremes;
typedef __mmask16 mask16;

LANE_FUNCTION floats16 load_f32(const void *values) { return _mm512_loadu_ps(values); }

LANE_FUNCTION void store_f32(void *values, floats16 what) { _mm512_storeu_ps(values, what); }

LANE_FUNCTION floats16 load_bf16(const void *values) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

/* To nearest even; NaN keeps its upper bits and becomes quiet. As sl_float_to_bf16. */
LANE_FUNCTION void store_bf16(void *values, floats16 what) {
  __m512i bits = _mm512_castps_si512(what);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  __mmask16 nan = _mm512_cmp_ps_mask(what, what, _CMP_UNORD_Q);
  __m512i words = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256((__m256i *)values, _mm512_cvtepi32_epi16(words));
}

LANE_FUNCTION floats16 load_f16(const void *values) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)values));
}

LANE_FUNCTION void store_f16(void *values, floats16 what) {
  _mm256_storeu_si256((__m256i *)values, _mm512_cvtps_ph(what, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

LANE_FUNCTION floats16 round_to_f16(floats16 x) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

LANE_FUNCTION floats16 broadcast(float value) { return _mm512_set1_ps(value); }

LANE_FUNCTION floats16 add(floats16 x, floats16 y) { return _mm512_add_ps(x, y); }

LANE_FUNCTION floats16 subtract(floats16 x, floats16 y) { return _mm512_sub_ps(x, y); }

LANE_FUNCTION floats16 multiply(floats16 x, floats16 y) { return _mm512_mul_ps(x, y); }

#if defined(SL_EMULATED) /* SIMDe does not fuse where the processor cannot */
LANE_FUNCTION floats16 multiply_add(floats16 x, floats16 y, floats16 sum) {
  float a[16], b[16], c[16];
  _mm512_storeu_ps(a, x), _mm512_storeu_ps(b, y), _mm512_storeu_ps(c, sum);
  for (int i = 0; i < 16; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return _mm512_loadu_ps(c);
}
#else
LANE_FUNCTION floats16 multiply_add(floats16 x, floats16 y, floats16 sum) { return _mm512_fmadd_ps(x, y, sum); }
#endif

LANE_FUNCTION ints16 broadcast_int(uint32_t value) { return _mm512_set1_epi32((int)value); }

LANE_FUNCTION ints16 lane_numbers(void) {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

LANE_FUNCTION ints16 bits_of(floats16 x) { return _mm512_castps_si512(x); }

LANE_FUNCTION floats16 floats_of(ints16 x) { return _mm512_castsi512_ps(x); }

LANE_FUNCTION floats16 to_floats(ints16 x) { return _mm512_cvtepi32_ps(x); }

LANE_FUNCTION ints16 and_ints(ints16 x, ints16 y) { return _mm512_and_si512(x, y); }

LANE_FUNCTION ints16 xor_ints(ints16 x, ints16 y) { return _mm512_xor_si512(x, y); }

LANE_FUNCTION ints16 add_ints(ints16 x, ints16 y) { return _mm512_add_epi32(x, y); }

LANE_FUNCTION ints16 multiply_ints(ints16 x, ints16 y) { return _mm512_mullo_epi32(x, y); }

LANE_FUNCTION ints16 shift_right(ints16 x, unsigned bits) { return _mm512_srli_epi32(x, bits); }

LANE_FUNCTION ints16 absolute_bits(floats16 x) { return and_ints(bits_of(x), broadcast_int(0x7fffffffu)); }

LANE_FUNCTION floats16 cut_fraction(floats16 x) { /* |x| < 2^31 */ return _mm512_cvtepi32_ps(_mm512_cvttps_epi32(x)); }

LANE_FUNCTION floats16 copy_sign(floats16 magnitude, floats16 sign) {
  return floats_of(_mm512_or_si512(bits_of(magnitude), and_ints(bits_of(sign), broadcast_int(0x80000000u))));
}

LANE_FUNCTION mask16 lanes_below(floats16 x, floats16 y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }

LANE_FUNCTION uint32_t mask_bits(mask16 mask) { return mask; }

LANE_FUNCTION floats16 choose(mask16 mask, floats16 set, floats16 other) {
  return _mm512_mask_blend_ps(mask, other, set);
}

LANE_FUNCTION float sum_lanes(floats16 x) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LANE_FUNCTION extremes no_largest(void) { return _mm512_setzero_si512(); }

LANE_FUNCTION extremes no_smallest(void) { return _mm512_set1_epi32(-1); }

LANE_FUNCTION extremes keep_largest(extremes largest, ints16 x) { return _mm512_max_epu32(largest, x); }

LANE_FUNCTION extremes keep_smallest(extremes smallest, ints16 x) { return _mm512_min_epu32(smallest, x); }

LANE_FUNCTION uint32_t largest_of(extremes x) {
  __m256i eight = _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1)));
}

LANE_FUNCTION uint32_t smallest_of(extremes x) { return ~largest_of(_mm512_xor_si512(x, _mm512_set1_epi32(-1))); }

#include "accumulate/tiers/block.h"

const sl_accumulate_kernel sl_accumulate_avx512 = {"avx512", SL_ISA_AVX512, accumulate, measure, read};
