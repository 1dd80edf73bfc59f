/* The products of the AVX-512 overlays, written once for both kinds of elements. A tier includes this file after it has
 * defined
 *   WORD                               elements in a 32-bit word: 1 (float) or 2 (bfloat16)
 *   multiply_add(sum, left, right)     sum + left * right, in each 32-bit lane; with 2 elements the sum of both
 * Operands are then rows of words, and everything below counts in words. */
#ifndef SL_ATTENTION_AVX512_MULTIPLY_H
#define SL_ATTENTION_AVX512_MULTIPLY_H

#include "attention/tiers/avx512.h"
#include "attention/tiers/avx512_math.h"

enum { ROWS = SL_AVX512_ROWS, PANEL = SL_AVX512_PANEL };

/* sum += left (12 rows) . right ([depth][32]): the loop in which all the time goes. Per step 24 multiply-adds, 2 loads
 * and 12 broadcasts: the two multiply-add pipes are the limit. Row r is base[r / 3] + r % 3 strides, which the
 * processor's addressing can do with 4 pointers; the sums stay in registers as all indices are constants. */
#define MULTIPLY(sum, VECTORS, left, left_stride, right, depth)                                   \
  do {                                                                                            \
    const int64_t stride_ = (left_stride);                                                        \
    const float *b_ = (right), *a_[4];                                                            \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) a_[i] = (left) + 3 * i * stride_;         \
    for (int64_t d_ = 0; d_ < (depth); ++d_, b_ += PANEL) {                                       \
      __m512 b0_ = _mm512_load_ps(b_), b1_ = (VECTORS) == 2 ? _mm512_load_ps(b_ + 16) : b0_;      \
      _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) {                                   \
        __m512 x_ = _mm512_set1_ps(a_[r / 3][r % 3 * stride_ + d_]);                              \
        sum[r][0] = multiply_add(sum[r][0], x_, b0_);                                             \
        if ((VECTORS) == 2) sum[r][(VECTORS) - 1] = multiply_add(sum[r][(VECTORS) - 1], x_, b1_); \
      }                                                                                           \
    }                                                                                             \
  } while (0)

static void multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                        const void *columns, int64_t depth, float *scores, int64_t score_stride) {
  if (rows <= 0) return;
  left_stride /= WORD, depth /= WORD;
  for (int64_t column = 0; column < lengths[0]; column += PANEL) {
    const float *right = (const float *)columns + column * depth;
    for (int64_t first = 0; first < rows && lengths[first] > column; first += ROWS) {
      const float *a = (const float *)left + first * left_stride;
      float *target = scores + first * score_stride + column;
      if (lengths[first] - column <= PANEL / 2) { /* the group ends in the first half of the panel */
        __m512 sum[ROWS][1];
        _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) sum[r][0] = _mm512_setzero_ps();
        MULTIPLY(sum, 1, a, left_stride, right, depth);
        _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) _mm512_store_ps(target + r * score_stride, sum[r][0]);
        continue;
      }
      __m512 sum[ROWS][2];
      _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
      MULTIPLY(sum, 2, a, left_stride, right, depth);
      _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) {
        _mm512_store_ps(target + r * score_stride, sum[r][0]);
        _mm512_store_ps(target + r * score_stride + 16, sum[r][1]);
      }
    }
  }
}

static void multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                        int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  left_stride /= WORD, capacity /= WORD;
  for (int64_t column = 0; column < width; column += PANEL) {
    const float *right = (const float *)depths + column * capacity;
    for (int64_t first = 0; first < rows && lengths[first] > 0; first += ROWS) {
      __m512 sum[ROWS][2];
      float *target = out + first * out_stride + column;
      _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) {
        sum[r][0] = _mm512_load_ps(target + r * out_stride);
        sum[r][1] = _mm512_load_ps(target + r * out_stride + 16);
      }
      MULTIPLY(sum, 2, (const float *)left + first * left_stride, left_stride, right,
               (lengths[first] + WORD - 1) / WORD);
      _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; ++r) {
        _mm512_store_ps(target + r * out_stride, sum[r][0]);
        _mm512_store_ps(target + r * out_stride + 16, sum[r][1]);
      }
    }
  }
}

#endif
