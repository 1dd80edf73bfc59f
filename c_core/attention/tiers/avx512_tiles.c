/* AVX-512 overlay: products and softmax of the forward with float elements, and the position mask. */
#include "runtime/tiers/simd.h"

#define WORD 1
#define ELEMENT_SIZE 4
#define multiply_add(sum, left, right) _mm512_fmadd_ps(left, right, sum)
#define store_elements(weights, j, values) _mm512_store_ps((float *)(weights) + (j), values)

#include "attention/tiers/avx512_multiply.h"
#include "attention/tiers/avx512_softmax.h"

void sl_avx512_multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *columns, int64_t depth, float *scores, int64_t score_stride) {
  multiply_nt(rows, lengths, left, left_stride, columns, depth, scores, score_stride);
}

void sl_avx512_multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  multiply_nn(rows, lengths, left, left_stride, depths, capacity, width, out, out_stride);
}

void sl_avx512_softmax_tile(const sl_softmax_tile *tile) { softmax_tile(tile); }

void sl_avx512_mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                         const int32_t *positions, const int32_t *lowest, const int32_t *highest) {
  const __m512 dropped = _mm512_set1_ps(-INFINITY);
  for (int64_t r = 0; r < rows; ++r) {
    __m512i low = _mm512_set1_epi32(lowest[r]), high = _mm512_set1_epi32(highest[r]);
    for (int64_t j = 0; j < lengths[r]; j += 16) {
      __m512i position = _mm512_loadu_si512((const void *)(positions + j));
      __mmask16 out = _mm512_cmpgt_epi32_mask(low, position) | _mm512_cmpgt_epi32_mask(position, high);
      float *score = scores + r * score_stride + j;
      _mm512_store_ps(score, _mm512_mask_blend_ps(out, _mm512_load_ps(score), dropped));
    }
  }
}
