/* Eight values of any dtype as float32 and back, and 8 x 8 of them turned over: what AVX2 overlays share. */
#ifndef SL_RUNTIME_SIMD_AVX2_H
#define SL_RUNTIME_SIMD_AVX2_H

#include <stdint.h>
#include <string.h>

#include <sluice/types.h>

#include "runtime/tiers/simd.h"

#define SL_AVX2_INLINE static inline __attribute__((always_inline))

SL_AVX2_INLINE __m256 sl_avx2_load(sl_dtype dtype, const void *data) {
  if (dtype == SL_F32) return _mm256_loadu_ps(data);
  __m128i half = _mm_loadu_si128(data);
  if (dtype == SL_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The first count values, then zeros; nothing behind them is read. */
SL_AVX2_INLINE __m256 sl_avx2_load_part(sl_dtype dtype, const void *data, int64_t count) {
  if (count >= 8) return sl_avx2_load(dtype, data);
  if (count <= 0) return _mm256_setzero_ps();
  char copy[32] = {0};
  memcpy(copy, data, (size_t)count * (dtype == SL_F32 ? 4 : 2));
  return sl_avx2_load(dtype, copy);
}

/* float to bfloat16, to nearest even; NaN stays NaN. The results are the low 16 bits of each lane. */
SL_AVX2_INLINE __m256i sl_avx2_round_to_bf16(__m256 values) {
  __m256i bits = _mm256_castps_si256(values);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(result), 16);
}

SL_AVX2_INLINE void sl_avx2_store(sl_dtype dtype, void *data, __m256 values) {
  if (dtype == SL_F32) {
    _mm256_storeu_ps(data, values);
  } else if (dtype == SL_F16) {
    _mm_storeu_si128(data, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    __m256i half = sl_avx2_round_to_bf16(values);
    _mm_storeu_si128(data, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
}

SL_AVX2_INLINE void sl_avx2_store_part(sl_dtype dtype, void *data, __m256 values, int64_t count) {
  if (count >= 8) {
    sl_avx2_store(dtype, data, values);
  } else {
    char copy[32];
    sl_avx2_store(dtype, copy, values);
    memcpy(data, copy, (size_t)count * (dtype == SL_F32 ? 4 : 2));
  }
}

SL_AVX2_INLINE void sl_avx2_transpose(__m256 row[8]) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    row[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

#undef SL_AVX2_INLINE

#endif
