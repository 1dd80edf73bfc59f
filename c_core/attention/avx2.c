/* AVX2 overlay: what depends on the dtype (packing, storing, the unpacked products), and the three tables.
 * Half-precision values are widened to float as they are packed, which is exact; one 6 x 16 kernel serves all. */
#include "attention/avx2.h"

#include <string.h>

#include "attention/avx2_math.h"
#include "runtime/number.h"

enum { ROWS = SL_AVX2_ROWS, PANEL = SL_AVX2_PANEL };
#define INLINE static inline __attribute__((always_inline))

INLINE const void *address(sl_dtype dtype, const void *data, int64_t index) {
  return (const char *)data + index * (dtype == SL_F32 ? 4 : 2);
}

INLINE __m256 load8(sl_dtype dtype, const void *data) {
  if (dtype == SL_F32) return _mm256_loadu_ps(data);
  __m128i half = _mm_loadu_si128(data);
  if (dtype == SL_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The first count values, then zeros; nothing behind them is read. */
INLINE __m256 load_part(sl_dtype dtype, const void *data, int64_t count) {
  if (count >= 8) return load8(dtype, data);
  if (count <= 0) return _mm256_setzero_ps();
  char copy[32] = {0};
  memcpy(copy, data, (size_t)count * (dtype == SL_F32 ? 4 : 2));
  return load8(dtype, copy);
}

/* float to bfloat16, to nearest even; NaN stays NaN. The results are the low 16 bits of each lane. */
INLINE __m256i round_to_bf16(__m256 values) {
  __m256i bits = _mm256_castps_si256(values);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(result), 16);
}

INLINE void store8(sl_dtype dtype, void *data, __m256 values) {
  if (dtype == SL_F32) {
    _mm256_storeu_ps(data, values);
  } else if (dtype == SL_F16) {
    _mm_storeu_si128(data, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    __m256i half = round_to_bf16(values);
    _mm_storeu_si128(data, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
}

INLINE void store_part(sl_dtype dtype, void *data, __m256 values, int64_t count) {
  if (count >= 8) {
    store8(dtype, data, values);
  } else {
    char copy[32];
    store8(dtype, copy, values);
    memcpy(data, copy, (size_t)count * (dtype == SL_F32 ? 4 : 2));
  }
}

INLINE void transpose8(__m256 row[8]) {
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

INLINE void pack_rows(sl_dtype dtype, float *packed, int64_t packed_stride, const sl_token_rows *source,
                      const int32_t *index, int64_t count, float factor) {
  __m256 scale = _mm256_set1_ps(factor);
  for (int64_t r = 0; r < sl_round_up(count, ROWS); ++r, packed += packed_stride) {
    int64_t channels = r < count ? source->channels : 0;
    const void *row = r < count ? address(dtype, source->data, index[r] * source->token_stride) : NULL;
    for (int64_t c = 0; c < packed_stride; c += 8) {
      __m256 values = channels > c ? load_part(dtype, address(dtype, row, c), channels - c) : _mm256_setzero_ps();
      _mm256_store_ps(packed + c, _mm256_mul_ps(values, scale));
    }
  }
}

INLINE void pack_columns(sl_dtype dtype, float *packed, const sl_token_rows *source, const int32_t *index,
                         int64_t count) {
  int64_t channels = source->channels;
  for (int64_t first = 0; first < count; first += PANEL, packed += channels * PANEL) {
    for (int64_t part = 0; part < PANEL; part += 8) {
      const void *row[8];
      for (int i = 0; i < 8; ++i) {
        int64_t token = first + part + i;
        row[i] = token < count ? address(dtype, source->data, index[token] * source->token_stride) : NULL;
      }
      for (int64_t c = 0; c < channels; c += 8) {
        __m256 block[8];
        for (int i = 0; i < 8; ++i) {
          block[i] = row[i] ? load_part(dtype, address(dtype, row[i], c), channels - c) : _mm256_setzero_ps();
        }
        transpose8(block);
        for (int64_t i = 0; i < 8 && c + i < channels; ++i) _mm256_store_ps(packed + (c + i) * PANEL + part, block[i]);
      }
    }
  }
}

INLINE void pack_depths(sl_dtype dtype, float *packed, int64_t capacity, const sl_token_rows *source,
                        const int32_t *index, int64_t count) {
  int64_t channels = source->channels;
  for (int64_t t = 0; t < count; ++t) {
    const void *row = address(dtype, source->data, index[t] * source->token_stride);
    float *target = packed + t * PANEL;
    for (int64_t c = 0; c < channels; c += PANEL, target += capacity * PANEL) {
      _mm256_store_ps(target, load_part(dtype, address(dtype, row, c), channels - c));
      _mm256_store_ps(target + 8, channels > c + 8 ? load_part(dtype, address(dtype, row, c + 8), channels - c - 8)
                                                   : _mm256_setzero_ps());
    }
  }
}

INLINE void store_rows(sl_dtype dtype, void *target, int64_t token_stride, int64_t channels, const int32_t *index,
                       int64_t count, const float *out, int64_t out_stride, const float *factors) {
  for (int64_t r = 0; r < count; ++r) {
    __m256 factor = _mm256_broadcast_ss(factors + r);
    for (int64_t c = 0; c < channels; c += 8) {
      __m256 values = _mm256_mul_ps(factor, _mm256_load_ps(out + r * out_stride + c));
      store_part(dtype, (char *)target + (index[r] * token_stride + c) * (dtype == SL_F32 ? 4 : 2), values,
                 channels - c);
    }
  }
}

INLINE void dot_rows(sl_dtype dtype, const float *row, const sl_token_rows *source, const int32_t *index, int64_t count,
                     float *scores) {
  int64_t channels = source->channels, whole = channels & ~INT64_C(7);
  __m256 tail = load_part(SL_F32, row + whole, channels - whole);
  for (int64_t j = 0; j < count; ++j) {
    const void *key = address(dtype, source->data, index[j] * source->token_stride);
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      even = _mm256_fmadd_ps(_mm256_loadu_ps(row + c), load8(dtype, address(dtype, key, c)), even);
      odd = _mm256_fmadd_ps(_mm256_loadu_ps(row + c + 8), load8(dtype, address(dtype, key, c + 8)), odd);
    }
    if (c < whole) even = _mm256_fmadd_ps(_mm256_loadu_ps(row + c), load8(dtype, address(dtype, key, c)), even);
    if (whole < channels)
      odd = _mm256_fmadd_ps(tail, load_part(dtype, address(dtype, key, whole), channels - whole), odd);
    scores[j] = sl_avx2_add_lanes(_mm256_add_ps(even, odd));
  }
}

INLINE void add_rows(sl_dtype dtype, float *out, const float *weights, const sl_token_rows *source,
                     const int32_t *index, int64_t count) {
  int64_t channels = source->channels;
  for (int64_t j = 0; j < count; ++j) {
    const void *value = address(dtype, source->data, index[j] * source->token_stride);
    __m256 weight = _mm256_broadcast_ss(weights + j);
    for (int64_t c = 0; c < channels; c += 8) {
      __m256 sum = load_part(SL_F32, out + c, channels - c);
      sum = _mm256_fmadd_ps(weight, load_part(dtype, address(dtype, value, c), channels - c), sum);
      store_part(SL_F32, out + c, sum, channels - c);
    }
  }
}

#define AVX2_TABLE(suffix, dtype_)                                                                                    \
  static void pack_rows_##suffix(void *packed, int64_t packed_stride, const sl_token_rows *source,                    \
                                 const int32_t *index, int64_t count, float factor) {                                 \
    pack_rows(dtype_, packed, packed_stride, source, index, count, factor);                                           \
  }                                                                                                                   \
  static void pack_columns_##suffix(void *packed, const sl_token_rows *source, const int32_t *index, int64_t count) { \
    pack_columns(dtype_, packed, source, index, count);                                                               \
  }                                                                                                                   \
  static void pack_depths_##suffix(void *packed, int64_t capacity, const sl_token_rows *source, const int32_t *index, \
                                   int64_t count) {                                                                   \
    pack_depths(dtype_, packed, capacity, source, index, count);                                                      \
  }                                                                                                                   \
  static void store_rows_##suffix(void *target, int64_t token_stride, int64_t channels, const int32_t *index,         \
                                  int64_t count, const float *out, int64_t out_stride, const float *factors) {        \
    store_rows(dtype_, target, token_stride, channels, index, count, out, out_stride, factors);                       \
  }                                                                                                                   \
  static void dot_rows_##suffix(const float *row, const sl_token_rows *source, const int32_t *index, int64_t count,   \
                                float *scores) {                                                                      \
    dot_rows(dtype_, row, source, index, count, scores);                                                              \
  }                                                                                                                   \
  static void add_rows_##suffix(float *out, const float *weights, const sl_token_rows *source, const int32_t *index,  \
                                int64_t count) {                                                                      \
    add_rows(dtype_, out, weights, source, index, count);                                                             \
  }                                                                                                                   \
  const sl_attention_kernel sl_attention_avx2_##suffix##_6x16 = {                                                     \
      .name = "avx2_" #suffix "_6x16",                                                                                \
      .isa = SL_ISA_AVX2,                                                                                             \
      .dtype = dtype_,                                                                                                \
      .row_tile = ROWS,                                                                                               \
      .panel = PANEL,                                                                                                 \
      .depth_step = 1,                                                                                                \
      .element_size = sizeof(float),                                                                                  \
      .pack_rows = pack_rows_##suffix,                                                                                \
      .pack_columns = pack_columns_##suffix,                                                                          \
      .pack_depths = pack_depths_##suffix,                                                                            \
      .multiply_nt = sl_avx2_multiply_nt,                                                                             \
      .multiply_nn = sl_avx2_multiply_nn,                                                                             \
      .multiply_tn = sl_avx2_multiply_tn,                                                                             \
      .mask_tile = sl_avx2_mask_tile,                                                                                 \
      .softmax_tile = sl_avx2_softmax_tile,                                                                           \
      .softmax_gradient_tile = sl_avx2_softmax_gradient_tile,                                                         \
      .store_rows = store_rows_##suffix,                                                                              \
      .dot_rows = dot_rows_##suffix,                                                                                  \
      .add_rows = add_rows_##suffix,                                                                                  \
  }

AVX2_TABLE(f32, SL_F32);
AVX2_TABLE(bf16, SL_BF16);
AVX2_TABLE(f16, SL_F16);
