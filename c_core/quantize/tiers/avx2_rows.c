/* What the kernel tables of AVX2 and above share: everything but the multiplication. */
#include "quantize/tiers/avx2_rows.h"

#include "quantize/tiers/gate_loops.h"
#include "quantize/tiers/row_loops.h"
#include "runtime/tiers/simd_avx2.h"

void sl_quantize_avx2_load_row(sl_dtype dtype, const void *x, int64_t count, float *out) {
  const uint16_t *from = x;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, sl_avx2_load(dtype, from + i));
  for (; i < count; ++i) out[i] = sl_load_value(dtype, x, i);
}

void sl_quantize_avx2_measure_row(const float *x, int64_t count, uint32_t *amax_bits, double *sumsq) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 values = _mm256_loadu_ps(x + i);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
    __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
    __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
    low = _mm256_fmadd_pd(first, first, low), high = _mm256_fmadd_pd(second, second, high);
  }
  uint32_t lanes[8], most = 0;
  double sums[4], sum;
  _mm256_storeu_si256((__m256i *)lanes, largest);
  _mm256_storeu_pd(sums, _mm256_add_pd(low, high));
  for (int lane = 0; lane < 8; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (; i < count; ++i) {
    uint32_t bits = sl_float_bits(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
    sum += (double)x[i] * (double)x[i];
  }
  *amax_bits = most, *sumsq = sum;
}

void sl_quantize_avx2_measure_channels(const float *x, int64_t count, float *channel_amax) {
  sl_loop_measure_channels(x, count, channel_amax);
}

static __m256i quantize_eight(const float *x, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse)); /* to nearest even */
}

void sl_quantize_avx2_quantize_row(const float *x, int64_t count, float inverse, int32_t qmax, int16_t *q) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i most = _mm256_set1_epi16((int16_t)qmax), least = _mm256_set1_epi16((int16_t)-qmax);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    /* |x * inverse| is at most qmax and a rounding error: nothing saturates before it is clamped. */
    __m256i pair = _mm256_packs_epi32(quantize_eight(x + i, factor), quantize_eight(x + i + 8, factor));
    pair = _mm256_permute4x64_epi64(pair, 0xd8);
    pair = _mm256_max_epi16(_mm256_min_epi16(pair, most), least);
    _mm256_storeu_si256((__m256i *)(q + i), pair);
  }
  for (; i < count; ++i) q[i] = (int16_t)sl_round_to_integer(x[i], inverse, qmax);
}

void sl_quantize_avx2_narrow_row(const int16_t *q, int64_t count, int8_t *high, int8_t *low) {
  sl_loop_narrow_row(q, count, high, low);
}

int32_t sl_quantize_avx2_sum_row(const int8_t *q, int64_t count) { return sl_loop_sum_row(q, count); }

void sl_quantize_avx2_lstm_gates(const float *x, const float *h, int64_t size, float *cell, float *out) {
  sl_loop_lstm_gates(x, h, size, cell, out);
}

void sl_quantize_avx2_gru_gates(const float *x, const float *h, int64_t size, float *state) {
  sl_loop_gru_gates(x, h, size, state);
}
