/* AVX-512 overlay: what only the backward needs, the transposed product and the gradient of softmax and gate. */
#include <math.h>
#include <stdbool.h>

#include "attention/tiers/avx512.h"
#include "attention/tiers/avx512_math.h"

enum { ROWS = SL_AVX512_ROWS, PANEL = SL_AVX512_PANEL };

/* out (count <= KEYS rows of 32 channels) += left^T . right over depth rows: the register tile of the forward's
 * products, with keys as its rows. The keys of one row of left are neighbours, so nothing needs to be transposed. */
#define MULTIPLY_TN(KEYS, count, left, left_stride, right, depth, out, out_stride)                    \
  do {                                                                                                \
    const float *a_ = (left), *b_ = (right);                                                          \
    __m512 sum_[KEYS][2];                                                                             \
    _Pragma("GCC unroll 12") for (int i = 0; i < KEYS; ++i) {                                         \
      sum_[i][0] = i < (count) ? _mm512_load_ps((out) + i * (out_stride)) : _mm512_setzero_ps();      \
      sum_[i][1] = i < (count) ? _mm512_load_ps((out) + i * (out_stride) + 16) : _mm512_setzero_ps(); \
    }                                                                                                 \
    for (int64_t d_ = 0; d_ < (depth); ++d_, a_ += (left_stride), b_ += PANEL) {                      \
      __m512 b0_ = _mm512_load_ps(b_), b1_ = _mm512_load_ps(b_ + 16);                                 \
      _Pragma("GCC unroll 12") for (int i = 0; i < KEYS; ++i) {                                       \
        __m512 x_ = _mm512_set1_ps(a_[i]);                                                            \
        sum_[i][0] = _mm512_fmadd_ps(x_, b0_, sum_[i][0]);                                            \
        sum_[i][1] = _mm512_fmadd_ps(x_, b1_, sum_[i][1]);                                            \
      }                                                                                               \
    }                                                                                                 \
    _Pragma("GCC unroll 12") for (int i = 0; i < KEYS; ++i) {                                         \
      if (i >= (count)) break;                                                                        \
      _mm512_store_ps((out) + i * (out_stride), sum_[i][0]);                                          \
      _mm512_store_ps((out) + i * (out_stride) + 16, sum_[i][1]);                                     \
    }                                                                                                 \
  } while (0)

/* A panel of 32 keys is cut into 12 + 12 + 8, so that no group of keys reaches into the next panel, where left is not
 * known to be 0 for the rows that end in this one. */
void sl_avx512_multiply_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  if (rows <= 0) return;
  int64_t keys = lengths[0];
  for (int64_t column = 0; column < width; column += PANEL) {
    const float *right = (const float *)depths + column * capacity;
    int64_t depth = rows;
    for (int64_t panel = 0; panel < keys; panel += PANEL) {
      for (int64_t key = panel; key < panel + PANEL && key < keys; key += 12) {
        while (lengths[depth - 1] <= key) --depth;
        const float *a = (const float *)left + key;
        float *target = out + key * out_stride + column;
        int64_t count = keys - key;
        if (key < panel + 24)
          MULTIPLY_TN(12, count, a, left_stride, right, depth, target, out_stride);
        else
          MULTIPLY_TN(8, count, a, left_stride, right, depth, target, out_stride);
      }
    }
  }
}

/* One row of length > 0. Lanes past its length are zeroed by a mask, not by a product, so that whatever stands in the
 * scores there does no harm. The gate's 1 - g is odds * g. */
SL_INLINE void row_gradient(const sl_softmax_gradient_tile *tile, int64_t r, float *weights, float *score_gradient,
                            bool gated) {
  const float *scores = tile->scores + r * tile->score_stride;
  const float *dout_values = tile->dout_values + r * tile->score_stride;
  __m512 scale = _mm512_set1_ps(tile->scale_log2e), lse = _mm512_set1_ps(tile->lse_log2[r]);
  __m512 mean = _mm512_set1_ps(tile->mean[r]), da = _mm512_setzero_ps();
  __m512 exp_minus_a = _mm512_set1_ps(gated ? tile->exp_minus_a[r] : 0);
  int64_t length = tile->lengths[r];
  for (int64_t j = 0; j < length; j += 16) {
    __mmask16 lanes = sl_avx512_first_lanes(length - j);
    __m512 score = _mm512_maskz_loadu_ps(lanes, scores + j), e = _mm512_maskz_loadu_ps(lanes, dout_values + j);
    __m512 weight = _mm512_maskz_mov_ps(lanes, sl_avx512_exp2(_mm512_fmsub_ps(score, scale, lse)));
    __m512 from_mean = _mm512_mul_ps(weight, mean);
    if (gated) {
      __m512 odds = _mm512_mul_ps(exp_minus_a, _mm512_load_ps(tile->exp_minus_b + j));
      __m512 gate = sl_avx512_reciprocal(_mm512_add_ps(odds, _mm512_set1_ps(1.0f)));
      weight = _mm512_maskz_mul_ps(lanes, weight, gate);
      __m512 dz = _mm512_maskz_mul_ps(lanes, _mm512_mul_ps(weight, e), _mm512_mul_ps(odds, gate));
      da = _mm512_add_ps(da, dz);
      _mm512_storeu_ps(tile->db + j, _mm512_add_ps(_mm512_loadu_ps(tile->db + j), dz));
    }
    _mm512_store_ps(weights + j, weight);
    _mm512_store_ps(score_gradient + j, _mm512_maskz_mov_ps(lanes, _mm512_fmsub_ps(weight, e, from_mean)));
  }
  if (gated) tile->da[r] += sl_avx512_add_lanes(da);
}

void sl_avx512_softmax_gradient_tile(const sl_softmax_gradient_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += ROWS) {
    int64_t width = sl_round_up(tile->lengths[first], PANEL);
    for (int64_t r = first; r < first + ROWS; ++r) {
      float *weights = (float *)tile->weights + r * tile->weight_stride;
      float *score_gradient = (float *)tile->score_gradient + r * tile->weight_stride;
      int64_t length = tile->lengths[r];
      if (length > 0 && tile->lse_log2[r] == -INFINITY) length = 0;
      if (length > 0 && tile->exp_minus_a)
        row_gradient(tile, r, weights, score_gradient, true);
      else if (length > 0)
        row_gradient(tile, r, weights, score_gradient, false);
      for (int64_t j = sl_round_up(length, 16); j < width; j += 16) {
        _mm512_store_ps(weights + j, _mm512_setzero_ps());
        _mm512_store_ps(score_gradient + j, _mm512_setzero_ps());
      }
    }
  }
}
