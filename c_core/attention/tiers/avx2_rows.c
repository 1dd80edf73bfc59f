/* AVX2 overlay: few rows against token rows where they lie, four token rows at a time. */
#include <math.h>
#include <stdbool.h>

#include "attention/tiers/avx2.h"
#include "attention/tiers/avx2_math.h"
#include "runtime/tiers/simd_avx2.h"

#define INLINE static inline __attribute__((always_inline))

/* R, at most 2, is a constant wherever this is inlined, so that the sums stay in registers. */
INLINE void dot_four(sl_dtype dtype, const float *rows, int64_t row_stride, const int R, const void *const key[4],
                     int64_t channels, float *scores, int64_t score_stride, int64_t count) {
  __m256 sum[2][4];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 4; ++i) sum[r][i] = _mm256_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    __m256 row[2];
    for (int r = 0; r < R; ++r) row[r] = _mm256_loadu_ps(rows + r * row_stride + c);
    for (int i = 0; i < 4; ++i) {
      __m256 values = sl_avx2_load(dtype, sl_avx2_address(dtype, key[i], c));
      for (int r = 0; r < R; ++r) sum[r][i] = _mm256_fmadd_ps(row[r], values, sum[r][i]);
    }
  }
  for (int i = 0; i < 4 && c < channels; ++i) {
    __m256 values = sl_avx2_load_part(dtype, sl_avx2_address(dtype, key[i], c), channels - c);
    for (int r = 0; r < R; ++r) {
      __m256 row = sl_avx2_load_part(SL_F32, rows + r * row_stride + c, channels - c);
      sum[r][i] = _mm256_fmadd_ps(row, values, sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float four[4];
    _mm_storeu_ps(four, sl_avx2_add_lanes_of_four(sum[r]));
    memcpy(scores + r * score_stride, four, (size_t)(count < 4 ? count : 4) * sizeof(float));
  }
}

INLINE void dot_list(sl_dtype dtype, const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                     float *scores, int64_t score_stride) {
  const sl_token_rows *source = list->source;
  for (int64_t j = 0; j < list->count; j += 4) {
    int64_t count = list->count - j, r = 0;
    const void *key[4];
    for (int64_t i = 0; i < 4; ++i) {
      int32_t token = list->index[i < count ? j + i : j];
      key[i] = sl_avx2_address(dtype, source->data, token * source->token_stride);
      sl_attention_prefetch_row(list, dtype == SL_F32 ? 4 : 2, j + i);
    }
    for (; r + 2 <= row_count; r += 2) {
      dot_four(dtype, rows + r * row_stride, row_stride, 2, key, source->channels, scores + r * score_stride + j,
               score_stride, count);
    }
    if (r < row_count) {
      dot_four(dtype, rows + r * row_stride, row_stride, 1, key, source->channels, scores + r * score_stride + j,
               score_stride, count);
    }
  }
}

/* The channels from c on: V vectors of them, which stay in registers; or what is left of the last one. */
INLINE void add_channels(sl_dtype dtype, float *out, int64_t out_stride, const int R, const int V, const float *weights,
                         int64_t weight_stride, const sl_row_list *list, int64_t c, bool whole) {
  const sl_token_rows *source = list->source;
  int64_t left = source->channels - c;
  __m256 sum[2][8];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      const float *from = out + r * out_stride + c + 8 * i;
      sum[r][i] = whole ? _mm256_loadu_ps(from) : sl_avx2_load_part(SL_F32, from, left);
    }
  }
  for (int64_t j = 0; j < list->count; ++j) {
    if (c == 0) sl_attention_prefetch_row(list, dtype == SL_F32 ? 4 : 2, j);
    const void *value = sl_avx2_address(dtype, source->data, list->index[j] * source->token_stride + c);
    __m256 weight[2];
    for (int r = 0; r < R; ++r) weight[r] = _mm256_broadcast_ss(weights + r * weight_stride + j);
    for (int i = 0; i < V; ++i) {
      const void *from = sl_avx2_address(dtype, value, 8 * i);
      __m256 values = whole ? sl_avx2_load(dtype, from) : sl_avx2_load_part(dtype, from, left);
      for (int r = 0; r < R; ++r) sum[r][i] = _mm256_fmadd_ps(weight[r], values, sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) {
      float *to = out + r * out_stride + c + 8 * i;
      if (whole) {
        _mm256_storeu_ps(to, sum[r][i]);
      } else {
        sl_avx2_store_part(SL_F32, to, sum[r][i], left);
      }
    }
  }
}

/* As many channels at a time as there are registers for. */
INLINE void add_list(sl_dtype dtype, float *out, int64_t out_stride, const int R, const float *weights,
                     int64_t weight_stride, const sl_row_list *list) {
  int64_t channels = list->source->channels, c = 0;
  if (R == 1) {
    for (; c + 64 <= channels; c += 64) {
      add_channels(dtype, out, out_stride, R, 8, weights, weight_stride, list, c, true);
    }
  }
  for (; c + 32 <= channels; c += 32) add_channels(dtype, out, out_stride, R, 4, weights, weight_stride, list, c, true);
  for (; c + 8 <= channels; c += 8) add_channels(dtype, out, out_stride, R, 1, weights, weight_stride, list, c, true);
  if (c < channels) add_channels(dtype, out, out_stride, R, 1, weights, weight_stride, list, c, false);
}

INLINE void add_rows(sl_dtype dtype, float *out, int64_t out_stride, int64_t row_count, const float *weights,
                     int64_t weight_stride, const sl_row_list *list) {
  int64_t r = 0;
  for (; r + 2 <= row_count; r += 2) {
    add_list(dtype, out + r * out_stride, out_stride, 2, weights + r * weight_stride, weight_stride, list);
  }
  if (r < row_count) {
    add_list(dtype, out + r * out_stride, out_stride, 1, weights + r * weight_stride, weight_stride, list);
  }
}

/* All ones in the lanes of pairs that are kept: within the row, and their logit is not -inf. */
INLINE __m256 find_kept(const sl_weigh_row *row, int64_t j) {
  __m256 kept = _mm256_cmp_ps(_mm256_load_ps(row->logits + j), _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
  return _mm256_and_ps(kept, _mm256_castsi256_ps(sl_avx2_first_lanes(row->count - j)));
}

void sl_avx2_weigh_row(sl_weigh_row *row) {
  const __m256 dropped = _mm256_set1_ps(-INFINITY), one = _mm256_set1_ps(1.0f);
  const __m256 minus_log2e = _mm256_set1_ps(-1.44269504f);
  __m256 best = dropped, sum = _mm256_setzero_ps(), scale = _mm256_set1_ps(row->scale_log2e);
  for (int64_t j = 0; j < row->count; j += 8) {
    __m256 score = _mm256_blendv_ps(dropped, _mm256_load_ps(row->scores + j), find_kept(row, j));
    _mm256_store_ps(row->scores + j, score);
    best = _mm256_max_ps(best, score);
  }
  row->maximum = sl_avx2_max_lanes(best);
  __m256 shift = _mm256_set1_ps(row->maximum == -INFINITY ? 0 : row->scale_log2e * row->maximum);
  for (int64_t j = 0; j < row->count; j += 8) {
    __m256 weight = sl_avx2_exp2(_mm256_fmsub_ps(_mm256_load_ps(row->scores + j), scale, shift));
    sum = _mm256_add_ps(sum, weight);
    __m256 odds = sl_avx2_exp2(_mm256_mul_ps(_mm256_load_ps(row->logits + j), minus_log2e));
    weight = _mm256_div_ps(weight, _mm256_add_ps(odds, one));
    _mm256_store_ps(row->scores + j, _mm256_and_ps(weight, find_kept(row, j)));
  }
  row->sum = sl_avx2_add_lanes(sum);
}

#define AVX2_ROWS(suffix, dtype_)                                                                                   \
  void sl_avx2_dot_rows_##suffix(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list, \
                                 float *scores, int64_t score_stride) {                                             \
    dot_list(dtype_, rows, row_stride, row_count, list, scores, score_stride);                                      \
  }                                                                                                                 \
  void sl_avx2_add_rows_##suffix(float *out, int64_t out_stride, int64_t row_count, const float *weights,           \
                                 int64_t weight_stride, const sl_row_list *list) {                                  \
    add_rows(dtype_, out, out_stride, row_count, weights, weight_stride, list);                                     \
  }

AVX2_ROWS(f32, SL_F32)
AVX2_ROWS(bf16, SL_BF16)
AVX2_ROWS(f16, SL_F16)
