/* Loops over rows that a compiler turns into vector code by itself: included by each tier's file, so that its flags
 * decide how wide. */
#ifndef SL_QUANTIZE_ROW_LOOPS_H
#define SL_QUANTIZE_ROW_LOOPS_H

#include "quantize/rounding.h"

static inline void sl_loop_measure_channels(const float *x, int64_t count, float *channel_amax) {
  for (int64_t i = 0; i < count; ++i) {
    float magnitude = fabsf(x[i]);
    channel_amax[i] = magnitude > channel_amax[i] ? magnitude : channel_amax[i];
  }
}

static inline void sl_loop_narrow_row(const int16_t *q, int64_t count, int8_t *high, int8_t *low) {
  if (!high) {
    for (int64_t i = 0; i < count; ++i) low[i] = (int8_t)q[i];
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    low[i] = (int8_t)(uint8_t)(q[i] & 0xff);
    high[i] = (int8_t)((q[i] + 128) >> 8);
  }
}

static inline int32_t sl_loop_sum_row(const int8_t *q, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

/* The values of one row of the output. */
static inline void sl_loop_finish_row(const sl_quantize_finish *finish, int64_t row, float *values) {
  int64_t place = finish->place ? finish->place[row] : row;
  const float *tile = finish->tile + place * finish->planes * SL_QUANTIZE_PANEL;
  const float *scale = finish->scale + row * finish->planes;
  for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) values[c] = finish->bias[c] + scale[0] * tile[c];
  if (finish->planes == 2) {
    for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) values[c] += scale[1] * tile[SL_QUANTIZE_PANEL + c];
  }
  for (int64_t j = 0; j < finish->outliers; ++j) {
    float x = finish->outlier[row * finish->outliers + j];
    const float *weight = finish->outlier_weight + j * SL_QUANTIZE_PANEL;
    for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) values[c] += x * weight[c];
  }
}

/* Where neighbours in memory are rows, blocks of 16 rows are turned over. */
static inline void sl_loop_finish_columns(const sl_quantize_finish *finish) {
  enum { BLOCK = 16 };
  for (int64_t first = 0; first < finish->rows; first += BLOCK) {
    float values[BLOCK][SL_QUANTIZE_PANEL];
    int64_t rows = finish->rows - first < BLOCK ? finish->rows - first : BLOCK;
    for (int64_t i = 0; i < rows; ++i) sl_loop_finish_row(finish, first + i, values[i]);
    for (int c = 0; c < finish->channels; ++c) {
      int64_t at = c * finish->channel_stride + first;
      if (finish->dtype == SL_F32) {
        for (int64_t i = 0; i < rows; ++i) ((float *)finish->out)[at + i] = values[i][c];
      } else {
        for (int64_t i = 0; i < rows; ++i) sl_store_value(finish->dtype, finish->out, at + i, values[i][c]);
      }
    }
  }
}

static inline void sl_loop_finish(const sl_quantize_finish *finish) {
  if (finish->row_stride == 1 && finish->channel_stride != 1) {
    sl_loop_finish_columns(finish);
    return;
  }
  for (int64_t row = 0; row < finish->rows; ++row) {
    float values[SL_QUANTIZE_PANEL];
    sl_loop_finish_row(finish, row, values);
    int64_t at = row * finish->row_stride;
    if (finish->dtype == SL_F32 && finish->channels == SL_QUANTIZE_PANEL) {
      float *out = (float *)finish->out + at;
      for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) out[c] = values[c];
    } else {
      for (int c = 0; c < finish->channels; ++c) sl_store_value(finish->dtype, finish->out, at + c, values[c]);
    }
  }
}

#endif
