/* Online softmax with the gate, of the AVX-512 overlays, written once for both kinds of elements. A tier includes this
 * file after it has defined
 *   ELEMENT_SIZE                           bytes of an element
 *   store_elements(weights, j, values)     16 floats to the elements j to j + 15 of a row, rounded to them
 * Lanes past a row's length are zeroed by a mask, not by a product, so that whatever stands in the scores there does no
 * harm. */
#ifndef SL_ATTENTION_AVX512_SOFTMAX_H
#define SL_ATTENTION_AVX512_SOFTMAX_H

#include <math.h>
#include <stdbool.h>

#include "attention/tiers/avx512.h"
#include "attention/tiers/avx512_math.h"

SL_INLINE void *row_of(const void *elements, int64_t stride, int64_t r) {
  return (char *)elements + r * stride * ELEMENT_SIZE;
}

static inline float row_maximum(const float *scores, int64_t length) {
  __m512 best = _mm512_set1_ps(-INFINITY);
  int64_t j = 0;
  for (; j + 16 <= length; j += 16) best = _mm512_max_ps(best, _mm512_load_ps(scores + j));
  if (j < length) {
    __mmask16 lanes = sl_avx512_first_lanes(length - j);
    best = _mm512_max_ps(best, _mm512_mask_blend_ps(lanes, best, _mm512_maskz_loadu_ps(lanes, scores + j)));
  }
  return sl_avx512_max_lanes(best);
}

/* Writes the weights of one row up to width and returns their sum before the gate. */
SL_INLINE float row_weights(const sl_softmax_tile *tile, int64_t r, void *weights, int64_t width, float shift_,
                            bool gated) {
  const float *scores = tile->scores + r * tile->score_stride;
  int64_t length = tile->lengths[r], j = 0;
  __m512 scale = _mm512_set1_ps(tile->scale_log2e), shift = _mm512_set1_ps(shift_), sum = _mm512_setzero_ps();
  __m512 a = _mm512_set1_ps(gated ? tile->exp_minus_a[r] : 0);
  for (; j < length; j += 16) {
    __mmask16 lanes = sl_avx512_first_lanes(length - j);
    __m512 score = _mm512_maskz_loadu_ps(lanes, scores + j);
    __m512 weight = _mm512_maskz_mov_ps(lanes, sl_avx512_exp2(_mm512_fmsub_ps(score, scale, shift)));
    sum = _mm512_add_ps(sum, weight);
    if (gated) {
      __m512 odds = _mm512_fmadd_ps(a, _mm512_load_ps(tile->exp_minus_b + j), _mm512_set1_ps(1.0f));
      weight = _mm512_maskz_mul_ps(lanes, weight, sl_avx512_reciprocal(odds));
    }
    store_elements(weights, j, weight);
  }
  for (; j < width; j += 16) store_elements(weights, j, _mm512_setzero_ps());
  return sl_avx512_add_lanes(sum);
}

/* Takes the maximum of the block into the row's state and returns the shift of its exponents. */
static inline float raise_maximum(const sl_softmax_tile *tile, int64_t r) {
  float old = tile->maximum[r];
  float maximum = row_maximum(tile->scores + r * tile->score_stride, tile->lengths[r]);
  if (!(maximum > old)) return old == -INFINITY ? 0.0f : tile->scale_log2e * old;
  float shift = tile->scale_log2e * maximum;
  tile->maximum[r] = maximum;
  __m512 shrink = sl_avx512_exp2(_mm512_set1_ps(tile->scale_log2e * old - shift));
  float *out = tile->out + r * tile->out_stride;
  for (int64_t c = 0; c < tile->out_width; c += 16) {
    _mm512_store_ps(out + c, _mm512_mul_ps(_mm512_load_ps(out + c), shrink));
  }
  tile->sum[r] *= _mm_cvtss_f32(_mm512_castps512_ps128(shrink));
  return shift;
}

static void softmax_tile(const sl_softmax_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += SL_AVX512_ROWS) {
    int64_t width = tile->lengths[first];
    for (int64_t r = first; r < first + SL_AVX512_ROWS; ++r) {
      void *weights = row_of(tile->weights, tile->weight_stride, r);
      if (tile->lengths[r] <= 0) {
        for (int64_t j = 0; j < width; j += 16) store_elements(weights, j, _mm512_setzero_ps());
        continue;
      }
      float shift = raise_maximum(tile, r);
      tile->sum[r] += tile->exp_minus_a ? row_weights(tile, r, weights, width, shift, true)
                                        : row_weights(tile, r, weights, width, shift, false);
    }
  }
}

#endif
