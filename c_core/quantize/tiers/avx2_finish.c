/* The last step of a product on AVX2 and above: scales, bias and outlier channels, in the output's type and layout. By
 * hand, since gcc 12 takes the loops of row_loops.h apart into single values: a fifth of a product of 64 rows. */
#include "quantize/tiers/avx2_rows.h"
#include "runtime/tiers/simd_avx2.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8 };

/* The sixteen channels of a row. */
typedef struct row_values {
  __m256 half[2];
} row_values;

INLINE row_values finish_row(const sl_quantize_finish *finish, int64_t row) {
  int64_t place = finish->place ? finish->place[row] : row;
  const float *tile = finish->tile + place * finish->planes * SL_QUANTIZE_PANEL;
  __m256 left = _mm256_loadu_ps(finish->bias), right = _mm256_loadu_ps(finish->bias + LANES);
  for (int plane = 0; plane < finish->planes; ++plane, tile += SL_QUANTIZE_PANEL) {
    __m256 scale = _mm256_set1_ps(finish->scale[row * finish->planes + plane]);
    left = _mm256_fmadd_ps(scale, _mm256_loadu_ps(tile), left);
    right = _mm256_fmadd_ps(scale, _mm256_loadu_ps(tile + LANES), right);
  }
  const float *x = finish->outlier ? finish->outlier + row * finish->outliers : NULL;
  const float *weight = finish->outlier_weight;
  for (int64_t j = 0; j < finish->outliers; ++j, weight += SL_QUANTIZE_PANEL) {
    __m256 value = _mm256_set1_ps(x[j]);
    left = _mm256_fmadd_ps(value, _mm256_loadu_ps(weight), left);
    right = _mm256_fmadd_ps(value, _mm256_loadu_ps(weight + LANES), right);
  }
  return (row_values){{left, right}};
}

INLINE void *element_of(const sl_quantize_finish *finish, int64_t index) {
  return (char *)finish->out + index * (finish->dtype == SL_F32 ? 4 : 2);
}

INLINE void finish_rows(const sl_quantize_finish *finish) {
  for (int64_t row = 0; row < finish->rows; ++row) {
    row_values values = finish_row(finish, row);
    void *out = element_of(finish, row * finish->row_stride);
    sl_avx2_store_part(finish->dtype, out, values.half[0], finish->channels);
    if (finish->channels <= LANES) continue;
    out = element_of(finish, row * finish->row_stride + LANES);
    sl_avx2_store_part(finish->dtype, out, values.half[1], finish->channels - LANES);
  }
}

/* Where neighbours in memory are rows, eight of them are turned over. */
INLINE void finish_columns(const sl_quantize_finish *finish) {
  for (int64_t first = 0; first < finish->rows; first += LANES) {
    int64_t rows = finish->rows - first < LANES ? finish->rows - first : LANES;
    __m256 block[2][LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      row_values values = finish_row(finish, i < rows ? first + i : first);
      block[0][i] = values.half[0], block[1][i] = values.half[1];
    }
    for (int half = 0; half < 2; ++half) {
      sl_avx2_transpose(block[half]);
      for (int c = 0; c < LANES && half * LANES + c < finish->channels; ++c) {
        void *out = element_of(finish, (half * LANES + c) * finish->channel_stride + first);
        sl_avx2_store_part(finish->dtype, out, block[half][c], rows);
      }
    }
  }
}

void sl_quantize_avx2_finish(const sl_quantize_finish *finish) {
  if (finish->row_stride == 1 && finish->channel_stride != 1) {
    finish_columns(finish);
  } else {
    finish_rows(finish);
  }
}
