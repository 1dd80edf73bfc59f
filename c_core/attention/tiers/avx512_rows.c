/* AVX-512 overlay: few rows against token rows where they lie, four token rows at a time. */
#include <math.h>
#include <stdbool.h>

#include "attention/tiers/avx512.h"
#include "attention/tiers/avx512_math.h"

/* R is a constant wherever this is inlined, so that the sums stay in registers. */
SL_INLINE void dot_four(sl_dtype dtype, const float *rows, int64_t row_stride, const int R, const void *const key[4],
                        int64_t channels, float *scores, int64_t score_stride, int64_t count) {
  __m512 sum[SL_ATTENTION_TEAM][4], keys[4];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    for (int i = 0; i < 4; ++i) keys[i] = sl_avx512_load(dtype, sl_avx512_address(dtype, key[i], c));
    for (int r = 0; r < R; ++r) {
      __m512 row = _mm512_loadu_ps(rows + r * row_stride + c);
      for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_fmadd_ps(row, keys[i], sum[r][i]);
    }
  }
  if (c < channels) {
    for (int i = 0; i < 4; ++i) {
      keys[i] = sl_avx512_load_part(dtype, sl_avx512_address(dtype, key[i], c), channels - c);
    }
    for (int r = 0; r < R; ++r) {
      __m512 row = sl_avx512_load_part(SL_F32, rows + r * row_stride + c, channels - c);
      for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_fmadd_ps(row, keys[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    sl_avx512_store_four(scores + r * score_stride, sl_avx512_add_lanes_of_four(sum[r]), count);
  }
}

SL_INLINE void dot_list(sl_dtype dtype, const float *rows, int64_t row_stride, const int R, const sl_row_list *list,
                        float *scores, int64_t score_stride) {
  const sl_token_rows *source = list->source;
  for (int64_t j = 0; j < list->count; j += 4) {
    int64_t count = list->count - j;
    const void *key[4];
    for (int64_t i = 0; i < 4; ++i) {
      int32_t token = list->index[i < count ? j + i : j];
      key[i] = sl_avx512_address(dtype, source->data, token * source->token_stride);
      sl_attention_prefetch_row(list, dtype == SL_F32 ? 4 : 2, j + i);
    }
    dot_four(dtype, rows, row_stride, R, key, source->channels, scores + j, score_stride, count);
  }
}

SL_INLINE void dot_rows(sl_dtype dtype, const float *rows, int64_t row_stride, int64_t row_count,
                        const sl_row_list *list, float *scores, int64_t score_stride) {
  switch (row_count) {
    case 1: dot_list(dtype, rows, row_stride, 1, list, scores, score_stride); break;
    case 2: dot_list(dtype, rows, row_stride, 2, list, scores, score_stride); break;
    case 3: dot_list(dtype, rows, row_stride, 3, list, scores, score_stride); break;
    default: dot_list(dtype, rows, row_stride, 4, list, scores, score_stride);
  }
}

/* The channels from c on: V vectors of them, which stay in registers; the last one by mask. first: of this list. */
SL_INLINE void add_channels(sl_dtype dtype, float *out, int64_t out_stride, const int R, const int V,
                            const float *weights, int64_t weight_stride, const sl_row_list *list, int64_t c,
                            bool whole) {
  const sl_token_rows *source = list->source;
  int64_t left = source->channels - c;
  __m512 sum[SL_ATTENTION_TEAM][8];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      const float *from = out + r * out_stride + c + 16 * i;
      sum[r][i] = whole ? _mm512_loadu_ps(from) : sl_avx512_load_part(SL_F32, from, left);
    }
  }
  for (int64_t j = 0; j < list->count; ++j) {
    if (c == 0) sl_attention_prefetch_row(list, dtype == SL_F32 ? 4 : 2, j);
    const void *value = sl_avx512_address(dtype, source->data, list->index[j] * source->token_stride + c);
    __m512 weight[SL_ATTENTION_TEAM];
    for (int r = 0; r < R; ++r) weight[r] = _mm512_set1_ps(weights[r * weight_stride + j]);
    for (int i = 0; i < V; ++i) {
      const void *from = sl_avx512_address(dtype, value, 16 * i);
      __m512 values = whole ? sl_avx512_load(dtype, from) : sl_avx512_load_part(dtype, from, left);
      for (int r = 0; r < R; ++r) sum[r][i] = _mm512_fmadd_ps(weight[r], values, sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float *to = out + r * out_stride + c + 16 * i;
      if (whole) {
        _mm512_storeu_ps(to, sum[r][i]);
      } else {
        _mm512_mask_storeu_ps(to, sl_avx512_first_lanes(left), sum[r][i]);
      }
    }
  }
}

/* As many channels at a time as there are registers for. */
SL_INLINE void add_list(sl_dtype dtype, float *out, int64_t out_stride, const int R, const float *weights,
                        int64_t weight_stride, const sl_row_list *list) {
  int64_t channels = list->source->channels, c = 0;
  if (R <= 2) {
    for (; c + 128 <= channels; c += 128) {
      add_channels(dtype, out, out_stride, R, 8, weights, weight_stride, list, c, true);
    }
  }
  for (; c + 64 <= channels; c += 64) add_channels(dtype, out, out_stride, R, 4, weights, weight_stride, list, c, true);
  for (; c < channels; c += 16) add_channels(dtype, out, out_stride, R, 1, weights, weight_stride, list, c, false);
}

SL_INLINE void add_rows(sl_dtype dtype, float *out, int64_t out_stride, int64_t row_count, const float *weights,
                        int64_t weight_stride, const sl_row_list *list) {
  switch (row_count) {
    case 1: add_list(dtype, out, out_stride, 1, weights, weight_stride, list); break;
    case 2: add_list(dtype, out, out_stride, 2, weights, weight_stride, list); break;
    case 3: add_list(dtype, out, out_stride, 3, weights, weight_stride, list); break;
    default: add_list(dtype, out, out_stride, 4, weights, weight_stride, list);
  }
}

/* Dropped scores become -inf. Lanes past the row are dropped as well, by a mask. */
static float drop_pairs(sl_weigh_row *row) {
  const __m512 dropped = _mm512_set1_ps(-INFINITY);
  __m512 best = dropped;
  for (int64_t j = 0; j < row->count; j += 16) {
    __mmask16 kept = _mm512_cmp_ps_mask(_mm512_load_ps(row->logits + j), dropped, _CMP_NEQ_UQ);
    kept &= sl_avx512_first_lanes(row->count - j);
    __m512 score = _mm512_mask_blend_ps(kept, dropped, _mm512_load_ps(row->scores + j));
    _mm512_store_ps(row->scores + j, score);
    best = _mm512_max_ps(best, score);
  }
  return sl_avx512_max_lanes(best);
}

void sl_avx512_weigh_row(sl_weigh_row *row) {
  row->maximum = drop_pairs(row);
  float raise = row->maximum == -INFINITY ? 0 : row->scale_log2e * row->maximum;
  const __m512 minus_log2e = _mm512_set1_ps(-1.44269504f), one = _mm512_set1_ps(1.0f);
  __m512 scale = _mm512_set1_ps(row->scale_log2e), shift = _mm512_set1_ps(raise), sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < row->count; j += 16) {
    __m512 logit = _mm512_load_ps(row->logits + j);
    __mmask16 kept = _mm512_cmp_ps_mask(logit, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    kept &= sl_avx512_first_lanes(row->count - j);
    __m512 weight = sl_avx512_exp2(_mm512_fmsub_ps(_mm512_load_ps(row->scores + j), scale, shift));
    sum = _mm512_add_ps(sum, weight);
    __m512 odds = sl_avx512_exp2(_mm512_mul_ps(logit, minus_log2e));
    weight = _mm512_maskz_mul_ps(kept, weight, sl_avx512_reciprocal(_mm512_add_ps(odds, one)));
    _mm512_store_ps(row->scores + j, weight);
  }
  row->sum = sl_avx512_add_lanes(sum);
}

#define AVX512_ROWS(suffix, dtype_)                                                                                   \
  void sl_avx512_dot_rows_##suffix(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list, \
                                   float *scores, int64_t score_stride) {                                             \
    dot_rows(dtype_, rows, row_stride, row_count, list, scores, score_stride);                                        \
  }                                                                                                                   \
  void sl_avx512_add_rows_##suffix(float *out, int64_t out_stride, int64_t row_count, const float *weights,           \
                                   int64_t weight_stride, const sl_row_list *list) {                                  \
    add_rows(dtype_, out, out_stride, row_count, weights, weight_stride, list);                                       \
  }

AVX512_ROWS(f32, SL_F32)
AVX512_ROWS(bf16, SL_BF16)
AVX512_ROWS(f16, SL_F16)
