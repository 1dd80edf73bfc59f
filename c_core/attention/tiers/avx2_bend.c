/* AVX2 overlay: what happens to scores between the product and the softmax. */
#include "attention/tiers/avx2.h"
#include "attention/tiers/avx2_math.h"

/* tanh to 3e-7 relative: below .625 by a minimax polynomial in x^2, for 1 - 2 / (e^2x + 1) cancels there. */
static inline __m256 hyperbolic_tangent(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f), sign_bit = _mm256_set1_ps(-0.0f);
  __m256 square = _mm256_mul_ps(x, x);
  __m256 p = _mm256_set1_ps(-5.717036560e-3f);
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(2.065057900e-2f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(-5.374349526e-2f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(1.333149125e-1f));
  p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(-3.333328392e-1f));
  __m256 near_zero = _mm256_fmadd_ps(_mm256_mul_ps(x, square), p, x);
  __m256 size = _mm256_andnot_ps(sign_bit, x);
  __m256 small = _mm256_cmp_ps(size, _mm256_set1_ps(0.625f), _CMP_LT_OQ);
  /* min gives its second operand where one is NaN. */
  __m256 power = sl_avx2_exp2(_mm256_min_ps(_mm256_set1_ps(64.0f), _mm256_mul_ps(size, _mm256_set1_ps(2.88539008f))));
  __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(power, one)));
  far = _mm256_or_ps(far, _mm256_and_ps(sign_bit, x));
  return _mm256_blendv_ps(far, near_zero, small);
}

void sl_avx2_bend_tile(const sl_bend_tile *tile) {
  const __m256 one = _mm256_set1_ps(1.0f), scale = _mm256_set1_ps(tile->scale), slope = _mm256_set1_ps(tile->slope);
  const __m256 cap = _mm256_set1_ps(tile->softcap),
               per_cap = _mm256_set1_ps(tile->softcap > 0 ? tile->scale / tile->softcap : 0);
  for (int64_t r = 0; r < tile->rows; ++r) {
    int64_t row = r * tile->score_stride;
    __m256i position = _mm256_set1_epi32(tile->row_positions[r]);
    for (int64_t j = 0; j < tile->lengths[r]; j += 8) {
      __m256 score = _mm256_load_ps(tile->scores + row + j);
      if (tile->softcap > 0) {
        __m256 bent = hyperbolic_tangent(_mm256_mul_ps(score, per_cap));
        score = _mm256_mul_ps(bent, cap);
        if (tile->bend) _mm256_store_ps(tile->bend + row + j, _mm256_fnmadd_ps(bent, bent, one));
      } else {
        score = _mm256_mul_ps(score, scale);
      }
      if (tile->slope != 0) {
        __m256i key = _mm256_loadu_si256((const __m256i *)(tile->key_positions + j));
        __m256 distance = _mm256_cvtepi32_ps(_mm256_abs_epi32(_mm256_sub_epi32(key, position)));
        score = _mm256_fnmadd_ps(slope, distance, score);
      }
      if (tile->mask) score = _mm256_add_ps(score, _mm256_load_ps(tile->mask + row + j));
      _mm256_store_ps(tile->scores + row + j, score);
    }
  }
}
