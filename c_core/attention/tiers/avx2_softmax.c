/* AVX2 overlay: online softmax with the gate, and the position mask. */
#include <math.h>

#include "attention/tiers/avx2.h"
#include "attention/tiers/avx2_math.h"

enum { ROWS = SL_AVX2_ROWS };

static inline float row_maximum(const float *scores, int64_t length) {
  __m256 best = _mm256_set1_ps(-INFINITY);
  int64_t j = 0;
  for (; j + 8 <= length; j += 8) best = _mm256_max_ps(best, _mm256_load_ps(scores + j));
  if (j < length) {
    __m256 lanes = _mm256_castsi256_ps(sl_avx2_first_lanes(length - j));
    best = _mm256_max_ps(best, _mm256_blendv_ps(best, _mm256_load_ps(scores + j), lanes));
  }
  return sl_avx2_max_lanes(best);
}

/* exp2(scale * score - shift), and the same times the gate. */
static inline __m256 weigh(__m256 score, __m256 scale, __m256 shift) {
  return sl_avx2_exp2(_mm256_fmsub_ps(score, scale, shift));
}

static inline __m256 gate(__m256 weight, __m256 exp_minus_a, const float *exp_minus_b) {
  __m256 denominator = _mm256_fmadd_ps(exp_minus_a, _mm256_load_ps(exp_minus_b), _mm256_set1_ps(1.0f));
  return _mm256_div_ps(weight, denominator);
}

/* Writes the weights of one row up to width and returns their sum before the gate. Lanes past the row's length are
 * zeroed by a mask, not by a product, so that whatever stands in the scores there does no harm. */
static inline float row_weights(const float *scores, float *weights, int64_t length, int64_t width, float scale_,
                                float shift_, const float *exp_minus_a, const float *exp_minus_b) {
  __m256 scale = _mm256_set1_ps(scale_), shift = _mm256_set1_ps(shift_), sum = _mm256_setzero_ps();
  __m256 a = exp_minus_a ? _mm256_broadcast_ss(exp_minus_a) : _mm256_setzero_ps();
  int64_t j = 0;
  if (exp_minus_a) {
    for (; j + 8 <= length; j += 8) {
      __m256 weight = weigh(_mm256_load_ps(scores + j), scale, shift);
      sum = _mm256_add_ps(sum, weight);
      _mm256_store_ps(weights + j, gate(weight, a, exp_minus_b + j));
    }
  } else {
    for (; j + 8 <= length; j += 8) {
      __m256 weight = weigh(_mm256_load_ps(scores + j), scale, shift);
      sum = _mm256_add_ps(sum, weight);
      _mm256_store_ps(weights + j, weight);
    }
  }
  if (j < length) {
    __m256 lanes = _mm256_castsi256_ps(sl_avx2_first_lanes(length - j));
    __m256 weight = _mm256_and_ps(lanes, weigh(_mm256_load_ps(scores + j), scale, shift));
    sum = _mm256_add_ps(sum, weight);
    if (exp_minus_a) weight = _mm256_and_ps(lanes, gate(weight, a, exp_minus_b + j));
    _mm256_store_ps(weights + j, weight);
    j += 8;
  }
  for (; j < width; j += 8) _mm256_store_ps(weights + j, _mm256_setzero_ps());
  return sl_avx2_add_lanes(sum);
}

/* Takes the maximum of the block into the row's state and returns the shift of its exponents. */
static inline float raise_maximum(const sl_softmax_tile *tile, int64_t r) {
  float old = tile->maximum[r];
  float maximum = row_maximum(tile->scores + r * tile->score_stride, tile->lengths[r]);
  if (!(maximum > old)) return old == -INFINITY ? 0.0f : tile->scale_log2e * old;
  float shift = tile->scale_log2e * maximum;
  tile->maximum[r] = maximum;
  __m256 shrink = sl_avx2_exp2(_mm256_set1_ps(tile->scale_log2e * old - shift));
  float *out = tile->out + r * tile->out_stride;
  for (int64_t c = 0; c < tile->out_width; c += 8) {
    _mm256_store_ps(out + c, _mm256_mul_ps(_mm256_load_ps(out + c), shrink));
  }
  tile->sum[r] *= _mm256_cvtss_f32(shrink);
  return shift;
}

void sl_avx2_softmax_tile(const sl_softmax_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += ROWS) {
    int64_t width = tile->lengths[first];
    for (int64_t r = first; r < first + ROWS; ++r) {
      float *weights = (float *)tile->weights + r * tile->weight_stride;
      if (tile->lengths[r] <= 0) {
        for (int64_t j = 0; j < width; j += 8) _mm256_store_ps(weights + j, _mm256_setzero_ps());
        continue;
      }
      float shift = raise_maximum(tile, r);
      tile->sum[r] +=
          row_weights(tile->scores + r * tile->score_stride, weights, tile->lengths[r], width, tile->scale_log2e, shift,
                      tile->exp_minus_a ? tile->exp_minus_a + r : NULL, tile->exp_minus_b);
    }
  }
}

void sl_avx2_mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                       const int32_t *positions, const int32_t *lowest, const int32_t *highest) {
  const __m256 dropped = _mm256_set1_ps(-INFINITY);
  for (int64_t r = 0; r < rows; ++r) {
    __m256i low = _mm256_set1_epi32(lowest[r]), high = _mm256_set1_epi32(highest[r]);
    for (int64_t j = 0; j < lengths[r]; j += 8) {
      __m256i position = _mm256_loadu_si256((const __m256i *)(positions + j));
      __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(low, position), _mm256_cmpgt_epi32(position, high));
      float *score = scores + r * score_stride + j;
      _mm256_store_ps(score, _mm256_blendv_ps(_mm256_load_ps(score), dropped, _mm256_castsi256_ps(out)));
    }
  }
}
