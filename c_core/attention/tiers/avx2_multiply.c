/* AVX2 overlay: the two products of the forward, 6 rows by 16 columns in 12 of the 16 registers. */
#include "attention/tiers/avx2.h"
#include "runtime/tiers/simd.h"

enum { ROWS = SL_AVX2_ROWS, PANEL = SL_AVX2_PANEL };

/* sum += left (6 rows) . right ([depth][16]): the loop in which all the time goes. Per step 12 multiply-adds, 2 loads
 * and 6 broadcasts: the two multiply-add pipes are the limit, and asking for what lies `ahead` is free (2 % faster).
 * The sums stay in registers because every index below is a constant once the loops over r are unrolled. */
#define MULTIPLY(sum, left, left_stride, right, depth, ahead)        \
  do {                                                               \
    const float *a_ = (left), *b_ = (right);                         \
    for (int64_t d_ = 0; d_ < (depth); ++d_, ++a_, b_ += PANEL) {    \
      __m256 b0_ = _mm256_load_ps(b_), b1_ = _mm256_load_ps(b_ + 8); \
      _mm_prefetch((const char *)(b_ + (ahead)), _MM_HINT_T0);       \
      _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) {       \
        __m256 x_ = _mm256_broadcast_ss(a_ + r * (left_stride));     \
        sum[r][0] = _mm256_fmadd_ps(x_, b0_, sum[r][0]);             \
        sum[r][1] = _mm256_fmadd_ps(x_, b1_, sum[r][1]);             \
      }                                                              \
    }                                                                \
  } while (0)

/* The same for the first 8 columns only: what a row group that ends in the first half of a panel wants. */
static inline void multiply_half(const float *left, int64_t left_stride, const float *right, int64_t depth,
                                 float *target, int64_t target_stride) {
  __m256 sum[ROWS];
  _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_setzero_ps();
  for (int64_t d = 0; d < depth; ++d, ++left, right += PANEL) {
    __m256 b = _mm256_load_ps(right);
    _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) {
      sum[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(left + r * left_stride), b, sum[r]);
    }
  }
  _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) _mm256_store_ps(target + r * target_stride, sum[r]);
}

void sl_avx2_multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *columns, int64_t depth, float *scores, int64_t score_stride) {
  if (rows <= 0) return;
  for (int64_t column = 0; column < lengths[0]; column += PANEL) {
    const float *right = (const float *)columns + column * depth;
    for (int64_t first = 0; first < rows && lengths[first] > column; first += ROWS) {
      const float *a = (const float *)left + first * left_stride;
      float *target = scores + first * score_stride + column;
      if (lengths[first] - column <= PANEL / 2) {
        multiply_half(a, left_stride, right, depth, target, score_stride);
        continue;
      }
      __m256 sum[ROWS][2];
      _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      MULTIPLY(sum, a, left_stride, right, depth, PANEL * depth);
      _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) {
        _mm256_store_ps(target + r * score_stride, sum[r][0]);
        _mm256_store_ps(target + r * score_stride + 8, sum[r][1]);
      }
    }
  }
}

void sl_avx2_multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  for (int64_t column = 0; column < width; column += PANEL) {
    const float *right = (const float *)depths + column * capacity;
    for (int64_t first = 0; first < rows && lengths[first] > 0; first += ROWS) {
      __m256 sum[ROWS][2];
      float *target = out + first * out_stride + column;
      _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) {
        sum[r][0] = _mm256_load_ps(target + r * out_stride);
        sum[r][1] = _mm256_load_ps(target + r * out_stride + 8);
      }
      MULTIPLY(sum, (const float *)left + first * left_stride, left_stride, right, lengths[first], PANEL * capacity);
      _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; ++r) {
        _mm256_store_ps(target + r * out_stride, sum[r][0]);
        _mm256_store_ps(target + r * out_stride + 8, sum[r][1]);
      }
    }
  }
}
