/* AVX-512 overlay (F, BW, DQ, VL): what depends on the dtype (packing, storing, the unpacked products), and the three
 * tables. Half-precision values are widened to float as they are packed, which is exact; one 12 x 32 kernel for all. */
#include "attention/tiers/avx512.h"

#include <stddef.h>

#include "attention/tiers/avx512_math.h"

enum { ROWS = SL_AVX512_ROWS, PANEL = SL_AVX512_PANEL };

SL_INLINE void store_values(sl_dtype dtype, void *data, __m512 values, int64_t count) {
  __mmask16 lanes = sl_avx512_first_lanes(count);
  if (dtype == SL_F32) {
    _mm512_mask_storeu_ps(data, lanes, values);
  } else if (dtype == SL_F16) {
    _mm256_mask_storeu_epi16(data, lanes, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    _mm256_mask_storeu_epi16(data, lanes, sl_avx512_round_to_bf16(values));
  }
}

SL_INLINE void pack_rows(sl_dtype dtype, float *packed, int64_t packed_stride, const sl_token_rows *source,
                         const int32_t *index, int64_t count, float factor) {
  __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < sl_round_up(count, ROWS); ++r, packed += packed_stride) {
    int64_t channels = r < count ? source->channels : 0;
    const void *row = r < count ? sl_avx512_address(dtype, source->data, index[r] * source->token_stride) : NULL;
    for (int64_t c = 0; c < packed_stride; c += 16) {
      __m512 values = channels > c ? sl_avx512_load_part(dtype, sl_avx512_address(dtype, row, c), channels - c)
                                   : _mm512_setzero_ps();
      _mm512_store_ps(packed + c, _mm512_mul_ps(values, scale));
    }
  }
}

SL_INLINE void pack_columns(sl_dtype dtype, float *packed, const sl_token_rows *source, const int32_t *index,
                            int64_t count) {
  int64_t channels = source->channels;
  for (int64_t first = 0; first < count; first += PANEL, packed += channels * PANEL) {
    for (int64_t part = 0; part < PANEL; part += 16) {
      for (int64_t c = 0; c < channels; c += 16) {
        __m512 block[16];
        for (int i = 0; i < 16; ++i) {
          int64_t token = first + part + i;
          block[i] = token < count
                         ? sl_avx512_load_part(
                               dtype, sl_avx512_address(dtype, source->data, index[token] * source->token_stride + c),
                               channels - c)
                         : _mm512_setzero_ps();
        }
        sl_avx512_transpose(block);
        for (int64_t i = 0; i < 16 && c + i < channels; ++i) _mm512_store_ps(packed + (c + i) * PANEL + part, block[i]);
      }
    }
  }
}

SL_INLINE void pack_depths(sl_dtype dtype, float *packed, int64_t capacity, const sl_token_rows *source,
                           const int32_t *index, int64_t count) {
  int64_t channels = source->channels;
  for (int64_t t = 0; t < count; ++t) {
    const void *row = sl_avx512_address(dtype, source->data, index[t] * source->token_stride);
    float *target = packed + t * PANEL;
    for (int64_t c = 0; c < channels; c += PANEL, target += capacity * PANEL) {
      _mm512_store_ps(target, sl_avx512_load_part(dtype, sl_avx512_address(dtype, row, c), channels - c));
      _mm512_store_ps(target + 16, channels > c + 16 ? sl_avx512_load_part(dtype, sl_avx512_address(dtype, row, c + 16),
                                                                           channels - c - 16)
                                                     : _mm512_setzero_ps());
    }
  }
}

SL_INLINE void store_rows(sl_dtype dtype, void *target, int64_t token_stride, int64_t channels, const int32_t *index,
                          int64_t count, const float *out, int64_t out_stride, const float *factors) {
  for (int64_t r = 0; r < count; ++r) {
    __m512 factor = _mm512_set1_ps(factors[r]);
    for (int64_t c = 0; c < channels; c += 16) {
      __m512 values = _mm512_mul_ps(factor, _mm512_load_ps(out + r * out_stride + c));
      store_values(dtype, sl_avx512_address(dtype, target, index[r] * token_stride + c), values, channels - c);
    }
  }
}

#define AVX512_TABLE(suffix, dtype_)                                                                                  \
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
  void sl_avx512_store_rows_##suffix(void *target, int64_t token_stride, int64_t channels, const int32_t *index,      \
                                     int64_t count, const float *out, int64_t out_stride, const float *factors) {     \
    store_rows(dtype_, target, token_stride, channels, index, count, out, out_stride, factors);                       \
  }                                                                                                                   \
  const sl_attention_kernel sl_attention_avx512_##suffix##_12x32 = {                                                  \
      .name = "avx512_" #suffix "_12x32",                                                                             \
      .isa = SL_ISA_AVX512,                                                                                           \
      .dtype = dtype_,                                                                                                \
      .row_tile = ROWS,                                                                                               \
      .panel = PANEL,                                                                                                 \
      .depth_step = 1,                                                                                                \
      .element_size = sizeof(float),                                                                                  \
      .pack_rows = pack_rows_##suffix,                                                                                \
      .pack_columns = pack_columns_##suffix,                                                                          \
      .pack_depths = pack_depths_##suffix,                                                                            \
      .multiply_nt = sl_avx512_multiply_nt,                                                                           \
      .multiply_nn = sl_avx512_multiply_nn,                                                                           \
      .multiply_tn = sl_avx512_multiply_tn,                                                                           \
      .mask_tile = sl_avx512_mask_tile,                                                                               \
      .bend_tile = sl_avx512_bend_tile,                                                                               \
      .softmax_tile = sl_avx512_softmax_tile,                                                                         \
      .softmax_gradient_tile = sl_avx512_softmax_gradient_tile,                                                       \
      .store_rows = sl_avx512_store_rows_##suffix,                                                                    \
      .dot_rows = sl_avx512_dot_rows_##suffix,                                                                        \
      .add_rows = sl_avx512_add_rows_##suffix,                                                                        \
      .weigh_row = sl_avx512_weigh_row,                                                                               \
  }

AVX512_TABLE(f32, SL_F32);
AVX512_TABLE(bf16, SL_BF16);
AVX512_TABLE(f16, SL_F16);
