/* Functions of the kernel table that AVX2 and the tiers above it share: see kernel.h. */
#ifndef SL_QUANTIZE_AVX2_ROWS_H
#define SL_QUANTIZE_AVX2_ROWS_H

#include "quantize/kernel.h"

void sl_quantize_avx2_load_row(sl_dtype dtype, const void *x, int64_t count, float *out);
void sl_quantize_avx2_measure_row(const float *x, int64_t count, uint32_t *amax_bits, double *sumsq);
void sl_quantize_avx2_measure_channels(const float *x, int64_t count, float *channel_amax);
void sl_quantize_avx2_quantize_row(const float *x, int64_t count, float inverse, int32_t qmax, int16_t *q);
void sl_quantize_avx2_narrow_row(const int16_t *q, int64_t count, int8_t *high, int8_t *low);
int32_t sl_quantize_avx2_sum_row(const int8_t *q, int64_t count);
void sl_quantize_avx2_finish(const sl_quantize_finish *finish);
void sl_quantize_avx2_lstm_gates(const float *x, const float *h, int64_t size, float *cell, float *out);
void sl_quantize_avx2_gru_gates(const float *x, const float *h, int64_t size, float *state);

#endif
