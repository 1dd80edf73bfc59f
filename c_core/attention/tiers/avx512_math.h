/* Vector helpers of the AVX-512 overlays: exp2, sigmoid of a split logit, tails, transposition. */
#ifndef SL_ATTENTION_AVX512_MATH_H
#define SL_ATTENTION_AVX512_MATH_H

#include <sluice/types.h>
#include <stdint.h>

#include "runtime/tiers/simd.h"

#define SL_INLINE static inline __attribute__((always_inline))

/* The first count lanes (count may be any number). */
SL_INLINE __mmask16 sl_avx512_first_lanes(int64_t count) {
  return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

SL_INLINE void *sl_avx512_address(sl_dtype dtype, const void *data, int64_t index) {
  return (char *)data + index * (dtype == SL_F32 ? 4 : 2);
}

/* 16 values of a dtype. */
SL_INLINE __m512 sl_avx512_load(sl_dtype dtype, const void *data) {
  if (dtype == SL_F32) return _mm512_loadu_ps(data);
  __m256i half = _mm256_loadu_si256(data);
  if (dtype == SL_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The first count values (at most 16), then zeros; nothing behind them is read. */
SL_INLINE __m512 sl_avx512_load_part(sl_dtype dtype, const void *data, int64_t count) {
  __mmask16 lanes = sl_avx512_first_lanes(count);
  if (dtype == SL_F32) return _mm512_maskz_loadu_ps(lanes, data);
  __m256i half = _mm256_maskz_loadu_epi16(lanes, data);
  if (dtype == SL_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* 2^x for x <= 127: relative error below 1.7e-7; 0 for x < -126.5 and for -inf; NaN stays NaN.
 * Adding 1.5 * 2^23 + 127 rounds x to an integer n and leaves n + 127 in the low bits, which shifted are the float 2^n;
 * n = -127 gives 0. The rest, in [-.5, .5], goes through a minimax polynomial. The clamp keeps NaN. */
SL_INLINE __m512 sl_avx512_exp2(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f + 127.0f);
  x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);
  __m512 shifted = _mm512_add_ps(x, magic);
  __m512 rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
  __m512 p = _mm512_set1_ps(1.326472720e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.671512640e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.550733743e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.402224209e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.931469776e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_mul_ps(p, power);
}

/* 1 / x for 1 <= x < 2^126: the 14-bit estimate and one Newton step. */
SL_INLINE __m512 sl_avx512_reciprocal(__m512 x) {
  __m512 r = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
}

SL_INLINE float sl_avx512_add_lanes(__m512 values) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps(values, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* The sums of four vectors' lanes; each of one vector's lanes alone, in one order. */
SL_INLINE __m128 sl_avx512_add_lanes_of_four(const __m512 values[4]) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(values[i]), _mm512_extractf32x8_ps(values[i], 1));
  }
  __m256 first = _mm256_add_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
  __m256 second = _mm256_add_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
  __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* The first count of four floats. */
SL_INLINE void sl_avx512_store_four(float *target, __m128 values, int64_t count) {
  if (count >= 4) {
    _mm_storeu_ps(target, values);
  } else {
    float four[4];
    _mm_storeu_ps(four, values);
    for (int64_t i = 0; i < count; ++i) target[i] = four[i];
  }
}

SL_INLINE float sl_avx512_max_lanes(__m512 values) {
  __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps(values, 1));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/* float to bfloat16, to nearest even, subnormals included; NaN stays NaN. */
SL_INLINE __m256i sl_avx512_round_to_bf16(__m512 values) {
  __m512i bits = _mm512_castps_si512(values);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}

/* 16 rows of 16 words become 16 columns: first 4 x 4 words within each 128-bit lane, then 4 x 4 lanes. */
SL_INLINE void sl_avx512_transpose(__m512 row[16]) {
  __m512 quad[16];
  for (int i = 0; i < 16; i += 4) {
    __m512 low0 = _mm512_unpacklo_ps(row[i], row[i + 1]), high0 = _mm512_unpackhi_ps(row[i], row[i + 1]);
    __m512 low2 = _mm512_unpacklo_ps(row[i + 2], row[i + 3]), high2 = _mm512_unpackhi_ps(row[i + 2], row[i + 3]);
    quad[i] = _mm512_shuffle_ps(low0, low2, 0x44);
    quad[i + 1] = _mm512_shuffle_ps(low0, low2, 0xee);
    quad[i + 2] = _mm512_shuffle_ps(high0, high2, 0x44);
    quad[i + 3] = _mm512_shuffle_ps(high0, high2, 0xee);
  }
  for (int k = 0; k < 4; ++k) {
    __m512 low0 = _mm512_shuffle_f32x4(quad[k], quad[k + 4], 0x44);
    __m512 high0 = _mm512_shuffle_f32x4(quad[k], quad[k + 4], 0xee);
    __m512 low8 = _mm512_shuffle_f32x4(quad[k + 8], quad[k + 12], 0x44);
    __m512 high8 = _mm512_shuffle_f32x4(quad[k + 8], quad[k + 12], 0xee);
    row[k] = _mm512_shuffle_f32x4(low0, low8, 0x88);
    row[k + 4] = _mm512_shuffle_f32x4(low0, low8, 0xdd);
    row[k + 8] = _mm512_shuffle_f32x4(high0, high8, 0x88);
    row[k + 12] = _mm512_shuffle_f32x4(high0, high8, 0xdd);
  }
}

#endif
