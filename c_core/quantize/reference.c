/* The formulas of ops/sluice/quantize.h in scalar C, one output at a time: the specification. */
#include <stddef.h>
#include <stdlib.h>

#include "quantize/conv2d.h"
#include "quantize/rows.h"
#include "quantize/validate.h"
#include "runtime/status.h"

/* The values of x that share a scale: a row, a tensor, an image or, transposed, a channel. */
typedef struct value_set {
  sl_dtype dtype;
  const void *x;
  int64_t rows, columns;
  const bool *left_out; /* [columns], NULL: none */
} value_set;

typedef struct value_measure {
  float amax;
  double sumsq;
  int64_t finite_rows;
} value_measure;

static float value_at(const value_set *set, int64_t row, int64_t column) {
  if (set->left_out && set->left_out[column]) return 0;
  return sl_load_value(set->dtype, set->x, row * set->columns + column);
}

static bool row_is_finite(const value_set *set, int64_t row) {
  for (int64_t column = 0; column < set->columns; ++column) {
    if (!isfinite(sl_load_value(set->dtype, set->x, row * set->columns + column))) return false;
  }
  return true;
}

/* Rows from first on; those that aren't finite don't count. */
static value_measure measure(const value_set *set, int64_t first, int64_t rows) {
  value_measure result = {0, 0, 0};
  for (int64_t row = first; row < first + rows; ++row) {
    if (!row_is_finite(set, row)) continue;
    ++result.finite_rows;
    for (int64_t column = 0; column < set->columns; ++column) {
      float x = value_at(set, row, column);
      result.amax = fmaxf(result.amax, fabsf(x));
      result.sumsq += (double)x * (double)x;
    }
  }
  return result;
}

static int choose_bits(const value_set *set, const value_measure *values, int32_t activation_bits, double target_sqnr) {
  return sl_choose_bits(activation_bits, target_sqnr, values->amax, values->sumsq, values->finite_rows * set->columns);
}

sl_status sl_quantize_dynamic_reference(const sl_quantize_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_quantize(args, true));
  value_set set = {args->dtype, args->x, args->rows, args->columns, NULL};
  value_measure whole = measure(&set, 0, args->rows);
  int whole_bits = choose_bits(&set, &whole, args->activation_bits, args->target_sqnr);
  if (!args->per_token) {
    bool finite = whole.finite_rows == args->rows;
    args->scale[0] = finite ? sl_forward_scale(whole.amax, whole_bits) : NAN;
    args->bits[0] = (int8_t)(finite ? whole_bits : 0);
  }
  for (int64_t row = 0; row < args->rows; ++row) {
    value_measure own = measure(&set, row, 1), *values = args->per_token ? &own : &whole;
    int bits = args->per_token ? choose_bits(&set, &own, args->activation_bits, args->target_sqnr) : whole_bits;
    bool finite = own.finite_rows == 1;
    if (args->per_token) {
      args->scale[row] = finite ? sl_forward_scale(own.amax, bits) : NAN;
      args->bits[row] = (int8_t)(finite ? bits : 0);
    }
    float inverse = sl_inverse_scale(values->amax, bits);
    for (int64_t column = 0; column < args->columns; ++column) {
      int32_t q = finite ? sl_round_to_integer(value_at(&set, row, column), inverse, sl_largest_integer(bits)) : 0;
      int64_t at = row * args->columns + column;
      if (args->activation_bits > 0 && args->activation_bits <= 8) {
        ((int8_t *)args->q)[at] = (int8_t)q;
      } else {
        ((int16_t *)args->q)[at] = (int16_t)q;
      }
    }
  }
  return SL_OK;
}

/* Largest value of a column in the rows that are finite. */
static float channel_amax(const value_set *set, int64_t column) {
  float amax = 0;
  for (int64_t row = 0; row < set->rows; ++row) {
    if (row_is_finite(set, row)) amax = fmaxf(amax, fabsf(value_at(set, row, column)));
  }
  return amax;
}

static int compare_floats(const void *a, const void *b) {
  float left = *(const float *)a, right = *(const float *)b;
  return (left > right) - (left < right);
}

/* Marks the outlier channels in left_out. sorted: [columns]. */
static void find_outliers(value_set *set, double outlier_ratio, float *sorted, bool *left_out) {
  int64_t found = 0, rest = set->columns - sl_most_outliers(set->columns);
  double sumsq = 0;
  for (int64_t column = 0; column < set->columns; ++column) sorted[column] = channel_amax(set, column);
  qsort(sorted, (size_t)set->columns, sizeof(float), compare_floats);
  for (int64_t i = 0; i < rest; ++i) sumsq += (double)sorted[i] * (double)sorted[i];
  double limit = rest > 0 ? outlier_ratio * sqrt(sumsq / (double)rest) : INFINITY;
  for (int64_t column = 0; column < set->columns; ++column) {
    left_out[column] = outlier_ratio > 0 && channel_amax(set, column) > limit;
    found += left_out[column];
  }
  for (int64_t column = 0; column < set->columns && found > sl_most_outliers(set->columns); ++column) {
    left_out[column] = false;
  }
  set->left_out = left_out;
}

/* sum over segments of scale * sum of q * w, and what was left out, for one output. */
static double multiply_row(const sl_linear_dynamic_args *args, const value_set *set, int64_t row, int64_t output,
                           float amax, int bits) {
  const sl_quantized_weight *weight = &args->weight;
  double scale = (double)sl_forward_scale(amax, bits), integers = 0, side = 0;
  float inverse = sl_inverse_scale(amax, bits);
  int64_t end;
  for (int64_t begin = 0; begin < set->columns; begin = end) {
    end = sl_segment_end(weight, begin);
    int64_t sum = 0;
    for (int64_t k = begin; k < end && k < set->columns; ++k) {
      int w = sl_packed_weight(weight, 0, output, k);
      sum += (int64_t)sl_round_to_integer(value_at(set, row, k), inverse, sl_largest_integer(bits)) * w;
      if (!set->left_out || !set->left_out[k]) continue;
      float x = sl_load_value(set->dtype, set->x, row * set->columns + k);
      side += (double)x * (double)(sl_packed_scale(weight, 0, output, k) * (float)w);
    }
    integers += (double)sl_packed_scale(weight, 0, output, begin) * (double)sum;
  }
  return scale * integers + side;
}

sl_status sl_linear_dynamic_reference(const sl_linear_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_linear(args, true));
  const sl_quantized_weight *weight = &args->weight;
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  float *sorted = sl_arena_take(&arena, weight->in_features, sizeof(float));
  bool *left_out = sl_arena_take(&arena, weight->in_features, sizeof(bool));
  SL_REQUIRE((sorted && left_out) || weight->in_features == 0, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace_size, arena.used);
  value_set set = {args->dtype, args->x, args->rows, weight->in_features, NULL};
  if (weight->in_features > 0) find_outliers(&set, args->outlier_ratio, sorted, left_out);
  value_measure whole = measure(&set, 0, args->rows);
  for (int64_t row = 0; row < args->rows; ++row) {
    value_measure own = measure(&set, row, 1), *values = args->per_token ? &own : &whole;
    int bits = choose_bits(&set, values, args->activation_bits, args->target_sqnr);
    bool finite = own.finite_rows == 1;
    args->bits[row] = (int8_t)(finite ? bits : 0);
    for (int64_t output = 0; output < weight->out_features; ++output) {
      double bias = args->bias ? (double)args->bias[output] : 0;
      double value = finite ? bias + multiply_row(args, &set, row, output, values->amax, bits) : (double)NAN;
      sl_store_value(args->dtype, args->out, row * weight->out_features + output, (float)value);
    }
  }
  return SL_OK;
}

/* Index of an element of an image in its memory. */
static int64_t element_of(bool channels_last, int64_t channels, int64_t height, int64_t width, int64_t c, int64_t y,
                          int64_t x) {
  return channels_last ? (y * width + x) * channels + c : (c * height + y) * width + x;
}

static double multiply_window(const sl_conv2d_dynamic_args *args, const value_set *set, int64_t image, int64_t output,
                              int64_t top, int64_t left, float amax, int bits) {
  const sl_quantized_weight *weight = &args->weight;
  int64_t channels = args->channels / weight->groups, outputs = sl_group_outputs(weight), group = output / outputs;
  float inverse = sl_inverse_scale(amax, bits);
  double total = 0;
  for (int64_t i = 0; i < weight->in_features; ++i) {
    int64_t c = group * channels + i % channels;
    int64_t y = top + i / channels / args->kernel[1] * args->dilation[0];
    int64_t x = left + i / channels % args->kernel[1] * args->dilation[1];
    if (y < 0 || y >= args->height || x < 0 || x >= args->width) continue;
    int64_t at = element_of(args->channels_last, args->channels, args->height, args->width, c, y, x);
    int32_t q = sl_round_to_integer(value_at(set, image, at), inverse, sl_largest_integer(bits));
    total += (double)sl_packed_scale(weight, group, output % outputs, i) * q *
             sl_packed_weight(weight, group, output % outputs, i);
  }
  return (double)sl_forward_scale(amax, bits) * total;
}

sl_status sl_conv2d_dynamic_reference(const sl_conv2d_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_conv2d(args, true));
  int64_t height = sl_conv2d_out_size(args, 0), width = sl_conv2d_out_size(args, 1);
  int64_t outputs = args->weight.out_features;
  value_set set = {args->dtype, args->x, args->images, args->channels * args->height * args->width, NULL};
  for (int64_t image = 0; image < args->images; ++image) {
    value_measure values = measure(&set, image, 1);
    int bits = choose_bits(&set, &values, args->activation_bits, args->target_sqnr);
    bool finite = values.finite_rows == 1;
    args->bits[image] = (int8_t)(finite ? bits : 0);
    for (int64_t i = 0; i < outputs * height * width; ++i) {
      int64_t output = i / (height * width), y = i / width % height, x = i % width;
      int64_t top = y * args->stride[0] - args->padding[0], left = x * args->stride[1] - args->padding[1];
      double value = args->bias ? (double)args->bias[output] : 0;
      value += finite ? multiply_window(args, &set, image, output, top, left, values.amax, bits) : (double)NAN;
      int64_t at = element_of(args->channels_last, outputs, height, width, output, y, x);
      sl_store_value(args->dtype, args->out, image * outputs * height * width + at, (float)value);
    }
  }
  return SL_OK;
}

sl_status sl_lookup_weight_reference(const sl_lookup_weight_args *args) {
  SL_CHECK(sl_quantize_validate_lookup(args));
  const sl_quantized_weight *weight = &args->weight;
  for (int64_t i = 0; i < args->count; ++i) {
    for (int64_t k = 0; k < weight->in_features; ++k) {
      args->values[i * weight->in_features + k] =
          sl_packed_scale(weight, 0, args->rows[i], k) * (float)sl_packed_weight(weight, 0, args->rows[i], k);
    }
  }
  return SL_OK;
}
