/* Rows of activations: measured, their widths chosen, outlier channels found, quantised. */
#include "quantize/rows.h"

#include <stddef.h>
#include <string.h>

#include "runtime/executor.h"

/* Rows in a task. */
enum { TASK_ROWS = 8 };

void sl_take_rows_workspace(sl_rows *rows, sl_arena *arena) {
  int64_t workers = sl_executor_workers(rows->executor);
  bool outliers = rows->outlier_ratio > 0;
  rows->measures = sl_arena_take(arena, rows->rows, sizeof(sl_row_measure));
  rows->values = sl_arena_take(arena, workers * rows->columns, sizeof(float));
  rows->channel_amax = sl_arena_take(arena, outliers ? workers * rows->columns : 0, sizeof(float));
  rows->outlier_channels = sl_arena_take(arena, outliers ? sl_most_outliers(rows->columns) : 0, sizeof(int64_t));
}

/* The row as float32, with zeros at outlier channels. */
static const float *read_row(const sl_rows *rows, int64_t worker, int64_t row, float *outlier_values) {
  const char *x = (const char *)rows->x + row * rows->columns * (int64_t)sl_value_size(rows->dtype);
  float *values = rows->values + worker * rows->columns;
  if (rows->dtype == SL_F32 && rows->outliers == 0) return (const float *)x;
  if (rows->dtype == SL_F32) {
    memcpy(values, x, (size_t)rows->columns * sizeof(float));
  } else {
    rows->kernel->load_row(rows->dtype, x, rows->columns, values);
  }
  for (int64_t i = 0; i < rows->outliers; ++i) {
    int64_t channel = rows->outlier_channels[i];
    if (outlier_values) outlier_values[i] = values[channel];
    values[channel] = 0;
  }
  return values;
}

/* An infinity in a channel that is left out must not go unseen. */
static bool outliers_are_finite(const sl_rows *rows, int64_t row) {
  for (int64_t i = 0; i < rows->outliers; ++i) {
    if (!isfinite(sl_load_value(rows->dtype, rows->x, row * rows->columns + rows->outlier_channels[i]))) return false;
  }
  return true;
}

static void measure_task(void *context, int64_t worker, int64_t task) {
  const sl_rows *rows = context;
  int64_t end = (task + 1) * TASK_ROWS < rows->rows ? (task + 1) * TASK_ROWS : rows->rows;
  for (int64_t row = task * TASK_ROWS; row < end; ++row) {
    const float *values = read_row(rows, worker, row, NULL);
    sl_row_measure *measure = &rows->measures[row];
    rows->kernel->measure_row(values, rows->columns, &measure->amax_bits, &measure->sumsq);
    if (!outliers_are_finite(rows, row)) measure->amax_bits = 0x7f800000u;
    if (rows->outlier_ratio > 0 && rows->outliers == 0 && sl_measure_is_finite(measure)) {
      rows->kernel->measure_channels(values, rows->columns, rows->channel_amax + worker * rows->columns);
    }
  }
}

/* Root mean square of what channels reach, the `most` highest left out. Floats from 0 up are in the order of their
 * bits, so the lowest of the highest is found bit by bit. */
static double usual_amax(const float *channel_amax, int64_t columns, int64_t most) {
  uint32_t lowest = 0;
  int64_t above = 0;
  for (uint32_t bit = UINT32_C(1) << 30; bit > 0; bit >>= 1) {
    float candidate = sl_float_from_bits(lowest | bit);
    int64_t count = 0;
    for (int64_t channel = 0; channel < columns; ++channel) count += channel_amax[channel] >= candidate;
    if (count >= most) lowest |= bit;
  }
  double sumsq = 0, limit = sl_float_from_bits(lowest);
  for (int64_t channel = 0; channel < columns; ++channel) {
    double amax = channel_amax[channel];
    if (amax >= limit) {
      ++above;
    } else {
      sumsq += amax * amax;
    }
  }
  sumsq += limit * limit * (double)(above - most); /* equal ones of which some are left out */
  return sqrt(sumsq / (double)(columns - most));
}

static void find_outliers(sl_rows *rows) {
  int64_t workers = sl_executor_workers(rows->executor), columns = rows->columns, found = 0;
  int64_t most = sl_most_outliers(columns);
  double amax = sl_float_from_bits(rows->whole.amax_bits), ratio = rows->outlier_ratio;
  /* Most often no channel can be one: the largest square of a channel is at least its mean square. */
  double others = rows->whole.sumsq / (double)rows->finite - (double)most * amax * amax;
  if (columns == most || others * ratio * ratio >= amax * amax * (double)(columns - most)) return;
  for (int64_t worker = 1; worker < workers; ++worker) {
    rows->kernel->measure_channels(rows->channel_amax + worker * columns, columns, rows->channel_amax);
  }
  double limit = ratio * usual_amax(rows->channel_amax, columns, most);
  for (int64_t channel = 0; channel < columns; ++channel) {
    if (!(rows->channel_amax[channel] > limit)) continue;
    if (found == most) return;
    rows->outlier_channels[found++] = channel;
  }
  rows->outliers = found;
}

static void summarise(sl_rows *rows) {
  sl_row_measure whole = {0, 0};
  rows->finite = 0;
  for (int64_t row = 0; row < rows->rows; ++row) {
    const sl_row_measure *measure = &rows->measures[row];
    if (!sl_measure_is_finite(measure)) continue;
    ++rows->finite;
    if (measure->amax_bits > whole.amax_bits) whole.amax_bits = measure->amax_bits;
    whole.sumsq += measure->sumsq;
  }
  rows->whole = whole;
  if (rows->per_token) return;
  rows->whole_bits = sl_choose_bits(rows->activation_bits, rows->target_sqnr, sl_float_from_bits(whole.amax_bits),
                                    whole.sumsq, rows->finite * rows->columns);
}

static void end_measure(void *context) {
  sl_rows *rows = context;
  summarise(rows);
  if (rows->outlier_ratio > 0 && rows->finite > 0) find_outliers(rows);
}

/* What the tensor is without the outlier channels. */
static void measure_rest_task(void *context, int64_t worker, int64_t task) {
  if (((const sl_rows *)context)->outliers > 0) measure_task(context, worker, task);
}
static void end_measure_rest(void *context) {
  if (((const sl_rows *)context)->outliers > 0) summarise(context);
}

int sl_list_measure_stages(sl_rows *rows, sl_stage stages[SL_MEASURE_STAGES]) {
  bool find = rows->outlier_ratio > 0;
  rows->outliers = 0;
  if (rows->columns == 0) { /* nothing to measure: the width is that of zeros */
    rows->whole_bits = sl_choose_bits(rows->activation_bits, rows->target_sqnr, 0, 0, 0);
    return 0;
  }
  if (rows->per_token && !find) return 0;
  if (find) {
    size_t bytes = (size_t)(sl_executor_workers(rows->executor) * rows->columns) * sizeof(float);
    memset(rows->channel_amax, 0, bytes);
  }
  int64_t tasks = sl_ceil_divide(rows->rows, TASK_ROWS);
  stages[0] = (sl_stage){tasks, measure_task, end_measure, rows};
  stages[1] = (sl_stage){tasks, measure_rest_task, end_measure_rest, rows};
  return find && !rows->per_token ? 2 : 1;
}

int sl_quantize_row(const sl_rows *rows, int64_t worker, int64_t row, int16_t *q, float *scale, float *outlier_values) {
  const float *values = read_row(rows, worker, row, outlier_values);
  sl_row_measure measure;
  if (rows->per_token && rows->outliers == 0 && rows->outlier_ratio > 0 && rows->columns > 0) {
    measure = rows->measures[row]; /* nothing was left out, so it still holds */
  } else {
    rows->kernel->measure_row(values, rows->columns, &measure.amax_bits, &measure.sumsq);
  }
  if (!sl_measure_is_finite(&measure) || !outliers_are_finite(rows, row)) {
    memset(q, 0, (size_t)rows->columns * sizeof(int16_t));
    *scale = NAN;
    return 0;
  }
  int bits = rows->whole_bits;
  float amax = sl_float_from_bits(rows->per_token ? measure.amax_bits : rows->whole.amax_bits);
  if (rows->per_token) {
    bits = sl_choose_bits(rows->activation_bits, rows->target_sqnr, amax, measure.sumsq, rows->columns);
  }
  rows->kernel->quantize_row(values, rows->columns, sl_inverse_scale(amax, bits), sl_largest_integer(bits), q);
  for (int64_t i = 0; i < rows->outliers; ++i) q[rows->outlier_channels[i]] = 0;
  *scale = sl_forward_scale(amax, bits);
  return bits;
}
