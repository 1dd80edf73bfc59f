/* AVX2 overlay: what depends on the dtype (packing, storing, the unpacked products), and the three tables.
 * Half-precision values are widened to float as they are packed, which is exact; one 6 x 16 kernel serves all. */
#include "attention/tiers/avx2.h"

#include <string.h>

#include "attention/tiers/avx2_math.h"
#include "runtime/number.h"
#include "runtime/tiers/simd_avx2.h"

enum { ROWS = SL_AVX2_ROWS, PANEL = SL_AVX2_PANEL };
#define INLINE static inline __attribute__((always_inline))

INLINE void pack_rows(sl_dtype dtype, float *packed, int64_t packed_stride, const sl_token_rows *source,
                      const int32_t *index, int64_t count, float factor) {
  __m256 scale = _mm256_set1_ps(factor);
  for (int64_t r = 0; r < sl_round_up(count, ROWS); ++r, packed += packed_stride) {
    int64_t channels = r < count ? source->channels : 0;
    const void *row = r < count ? sl_avx2_address(dtype, source->data, index[r] * source->token_stride) : NULL;
    for (int64_t c = 0; c < packed_stride; c += 8) {
      __m256 values =
          channels > c ? sl_avx2_load_part(dtype, sl_avx2_address(dtype, row, c), channels - c) : _mm256_setzero_ps();
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
        row[i] = token < count ? sl_avx2_address(dtype, source->data, index[token] * source->token_stride) : NULL;
      }
      for (int64_t c = 0; c < channels; c += 8) {
        __m256 block[8];
        for (int i = 0; i < 8; ++i) {
          block[i] =
              row[i] ? sl_avx2_load_part(dtype, sl_avx2_address(dtype, row[i], c), channels - c) : _mm256_setzero_ps();
        }
        sl_avx2_transpose(block);
        for (int64_t i = 0; i < 8 && c + i < channels; ++i) _mm256_store_ps(packed + (c + i) * PANEL + part, block[i]);
      }
    }
  }
}

INLINE void pack_depths(sl_dtype dtype, float *packed, int64_t capacity, const sl_token_rows *source,
                        const int32_t *index, int64_t count) {
  int64_t channels = source->channels;
  for (int64_t t = 0; t < count; ++t) {
    const void *row = sl_avx2_address(dtype, source->data, index[t] * source->token_stride);
    float *target = packed + t * PANEL;
    for (int64_t c = 0; c < channels; c += PANEL, target += capacity * PANEL) {
      _mm256_store_ps(target, sl_avx2_load_part(dtype, sl_avx2_address(dtype, row, c), channels - c));
      _mm256_store_ps(target + 8, channels > c + 8
                                      ? sl_avx2_load_part(dtype, sl_avx2_address(dtype, row, c + 8), channels - c - 8)
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
      sl_avx2_store_part(dtype, (char *)target + (index[r] * token_stride + c) * (dtype == SL_F32 ? 4 : 2), values,
                         channels - c);
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
      .bend_tile = sl_avx2_bend_tile,                                                                                 \
      .softmax_tile = sl_avx2_softmax_tile,                                                                           \
      .softmax_gradient_tile = sl_avx2_softmax_gradient_tile,                                                         \
      .store_rows = store_rows_##suffix,                                                                              \
      .dot_rows = sl_avx2_dot_rows_##suffix,                                                                          \
      .add_rows = sl_avx2_add_rows_##suffix,                                                                          \
      .weigh_row = sl_avx2_weigh_row,                                                                                 \
  }

AVX2_TABLE(f32, SL_F32);
AVX2_TABLE(bf16, SL_BF16);
AVX2_TABLE(f16, SL_F16);
