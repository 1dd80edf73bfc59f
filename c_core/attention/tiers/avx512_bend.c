/* AVX-512 overlay: what happens to scores between the product and the softmax. */
#include "attention/tiers/avx512.h"
#include "attention/tiers/avx512_math.h"

/* tanh to 3e-7 relative: below .625 by a minimax polynomial in x^2, for 1 - 2 / (e^2x + 1) cancels there. */
SL_INLINE __m512 hyperbolic_tangent(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 square = _mm512_mul_ps(x, x);
  __m512 p = _mm512_set1_ps(-5.717036560e-3f);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.065057900e-2f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-5.374349526e-2f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.333149125e-1f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-3.333328392e-1f));
  __m512 near_zero = _mm512_fmadd_ps(_mm512_mul_ps(x, square), p, x);
  __m512 size = _mm512_abs_ps(x);
  __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  /* min gives its second operand where one is NaN. */
  __m512 power = sl_avx512_exp2(_mm512_min_ps(_mm512_set1_ps(64.0f), _mm512_mul_ps(size, _mm512_set1_ps(2.88539008f))));
  __m512 far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, one)));
  __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  far = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(far), sign));
  return _mm512_mask_blend_ps(small, far, near_zero);
}

void sl_avx512_bend_tile(const sl_bend_tile *tile) {
  const __m512 one = _mm512_set1_ps(1.0f), scale = _mm512_set1_ps(tile->scale), slope = _mm512_set1_ps(tile->slope);
  const __m512 cap = _mm512_set1_ps(tile->softcap),
               per_cap = _mm512_set1_ps(tile->softcap > 0 ? tile->scale / tile->softcap : 0);
  for (int64_t r = 0; r < tile->rows; ++r) {
    int64_t row = r * tile->score_stride;
    __m512i position = _mm512_set1_epi32(tile->row_positions[r]);
    for (int64_t j = 0; j < tile->lengths[r]; j += 16) {
      __m512 score = _mm512_load_ps(tile->scores + row + j);
      if (tile->softcap > 0) {
        __m512 bent = hyperbolic_tangent(_mm512_mul_ps(score, per_cap));
        score = _mm512_mul_ps(bent, cap);
        if (tile->bend) _mm512_store_ps(tile->bend + row + j, _mm512_fnmadd_ps(bent, bent, one));
      } else {
        score = _mm512_mul_ps(score, scale);
      }
      if (tile->slope != 0) {
        __m512i key = _mm512_loadu_si512((const void *)(tile->key_positions + j));
        __m512 distance = _mm512_cvtepi32_ps(_mm512_abs_epi32(_mm512_sub_epi32(key, position)));
        score = _mm512_fnmadd_ps(slope, distance, score);
      }
      if (tile->mask) score = _mm512_add_ps(score, _mm512_load_ps(tile->mask + row + j));
      _mm512_store_ps(tile->scores + row + j, score);
    }
  }
}
