/* Vector helpers of the AVX2 overlay: exp2, sigmoid of a split logit, tails. */
#ifndef SL_ATTENTION_AVX2_MATH_H
#define SL_ATTENTION_AVX2_MATH_H

#include <sluice/types.h>
#include <stdint.h>

#include "runtime/tiers/simd.h"

static inline const void *sl_avx2_address(sl_dtype dtype, const void *data, int64_t index) {
  return (const char *)data + index * (dtype == SL_F32 ? 4 : 2);
}

/* All ones in the first count lanes (count may be any number). */
static inline __m256i sl_avx2_first_lanes(int64_t count) {
  int32_t limit = count < 0 ? 0 : count > 8 ? 8 : (int32_t)count;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* 2^x for x <= 127: relative error below 1.7e-7; 0 for x < -126.5 and for -inf; NaN stays NaN.
 * Adding 1.5 * 2^23 + 127 rounds x to an integer n and leaves n + 127 in the low bits, which shifted are the float 2^n;
 * n = -127 gives 0. The rest, in [-.5, .5], goes through a minimax polynomial. The clamp keeps NaN. */
static inline __m256 sl_avx2_exp2(__m256 x) {
  const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);
  x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
  __m256 shifted = _mm256_add_ps(x, magic);
  __m256 rest = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  __m256 p = _mm256_set1_ps(1.326472720e-3f);
  p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(9.671512640e-3f));
  p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(5.550733743e-2f));
  p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(2.402224209e-1f));
  p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(6.931469776e-1f));
  p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.0f));
  return _mm256_mul_ps(p, power);
}

/* 1 / x for 1 <= x < 2^126: the 12-bit estimate and one Newton step. */
static inline __m256 sl_avx2_reciprocal(__m256 x) {
  __m256 r = _mm256_rcp_ps(x);
  return _mm256_mul_ps(r, _mm256_fnmadd_ps(x, r, _mm256_set1_ps(2.0f)));
}

static inline float sl_avx2_add_lanes(__m256 values) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* The sums of four vectors' lanes; each of one vector's lanes alone, in one order. */
static inline __m128 sl_avx2_add_lanes_of_four(const __m256 values[4]) {
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(values[0], values[1]), _mm256_hadd_ps(values[2], values[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

static inline float sl_avx2_max_lanes(__m256 values) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

#endif
