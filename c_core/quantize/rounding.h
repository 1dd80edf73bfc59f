/* The rules of rounding and of choosing a width, as ops/sluice/quantize.h has them, and the layout of packed
 * weights. */
#ifndef SL_QUANTIZE_ROUNDING_H
#define SL_QUANTIZE_ROUNDING_H

#include <math.h>

#include "quantize/kernel.h"
#include "runtime/number.h"

static inline int32_t sl_largest_integer(int bits) { return bits == 4 ? 7 : bits == 7 ? 63 : bits == 8 ? 127 : 32639; }

/* What x is multiplied by: qmax / amax, or 0 for what is too small to be divided by. */
static inline float sl_inverse_scale(float amax, int bits) {
  return amax >= 0x1p-110f ? (float)sl_largest_integer(bits) / amax : 0;
}
static inline float sl_forward_scale(float amax, int bits) {
  return amax >= 0x1p-110f ? amax / (float)sl_largest_integer(bits) : 0;
}

static inline int32_t sl_round_to_integer(float x, float inverse, int32_t qmax) {
  float q = rintf(x * inverse);
  if (q > (float)qmax) return qmax;
  if (q < (float)-qmax) return -qmax;
  return (int32_t)q;
}

/* The width of a row (or tensor) of so many finite values. */
static inline int sl_choose_bits(int32_t activation_bits, double target_sqnr, float amax, double sumsq, int64_t count) {
  if (activation_bits > 0) return (int)activation_bits;
  if (activation_bits == SL_BITS_BY_AMAX) return amax < 0.1f ? 8 : 16;
  double wanted = pow(10, target_sqnr / 10) * (double)amax * (double)amax * (double)count;
  static const int widths[] = {4, 7, 8};
  for (int i = 0; i < 3; ++i) {
    double qmax = sl_largest_integer(widths[i]);
    if (12 * qmax * qmax * sumsq >= wanted) return widths[i];
  }
  return 16;
}

static inline int64_t sl_round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static inline int64_t sl_ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

/* Sizes that follow from a weight's. */
static inline int64_t sl_padded_inputs(const sl_quantized_weight *weight) {
  return sl_round_up(weight->in_features, SL_QUANTIZE_DEPTH);
}
static inline int64_t sl_group_outputs(const sl_quantized_weight *weight) {
  return weight->out_features / weight->groups;
}
static inline int64_t sl_group_panels(const sl_quantized_weight *weight) {
  return sl_ceil_divide(sl_group_outputs(weight), SL_QUANTIZE_PANEL);
}
static inline int64_t sl_padded_outputs(const sl_quantized_weight *weight) {
  return weight->groups * sl_group_panels(weight) * SL_QUANTIZE_PANEL;
}
/* Inputs that share a scale. */
static inline int64_t sl_scale_inputs(const sl_quantized_weight *weight) {
  return weight->group_size ? weight->group_size : weight->in_features > 0 ? weight->in_features : 1;
}
static inline int64_t sl_scale_groups(const sl_quantized_weight *weight) {
  int64_t groups = sl_ceil_divide(weight->in_features, sl_scale_inputs(weight));
  return groups > 0 ? groups : 1;
}
/* Bytes from input 0 of a panel to this one, a multiple of SL_QUANTIZE_DEPTH. */
static inline int64_t sl_panel_bytes(const sl_quantized_weight *weight, int64_t inputs) {
  return inputs * SL_QUANTIZE_PANEL * weight->bits / 8;
}

/* The segment that starts at input begin ends here: at the end of its group, after SL_QUANTIZE_SEGMENT inputs, or at
 * the padded end. */
static inline int64_t sl_segment_end(const sl_quantized_weight *weight, int64_t begin) {
  int64_t inputs = sl_scale_inputs(weight), group_end = (begin / inputs + 1) * inputs;
  int64_t end = begin + SL_QUANTIZE_SEGMENT < group_end ? begin + SL_QUANTIZE_SEGMENT : group_end;
  return end < weight->in_features ? end : sl_padded_inputs(weight);
}
static inline int64_t sl_count_segments(const sl_quantized_weight *weight) {
  int64_t count = 0;
  for (int64_t k = 0; k < weight->in_features; k = sl_segment_end(weight, k)) ++count;
  return count;
}

/* The integer of one output channel (of its group of channels) and input. */
static inline int sl_packed_weight(const sl_quantized_weight *weight, int64_t group, int64_t output, int64_t input) {
  int64_t panel = group * sl_group_panels(weight) + output / SL_QUANTIZE_PANEL, channel = output % SL_QUANTIZE_PANEL;
  const uint8_t *bytes = (const uint8_t *)weight->packed + panel * sl_panel_bytes(weight, sl_padded_inputs(weight));
  if (weight->bits == 8) {
    static const int position[4] = {0, 2, 1, 3};
    return (int8_t)bytes[input / 4 * 64 + channel * 4 + position[input % 4]];
  }
  uint8_t pair = bytes[input / 8 * 64 + channel * 4 + input % 4];
  return (input % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}
static inline float sl_packed_scale(const sl_quantized_weight *weight, int64_t group, int64_t output, int64_t input) {
  int64_t column = group * sl_group_panels(weight) * SL_QUANTIZE_PANEL + output;
  return weight->scale[input / sl_scale_inputs(weight) * sl_padded_outputs(weight) + column];
}

static inline size_t sl_value_size(sl_dtype dtype) { return dtype == SL_F32 ? 4 : 2; }
static inline float sl_load_value(sl_dtype dtype, const void *data, int64_t index) {
  if (dtype == SL_F32) return ((const float *)data)[index];
  uint16_t bits = ((const uint16_t *)data)[index];
  return dtype == SL_BF16 ? sl_bf16_to_float(bits) : sl_f16_to_float(bits);
}
static inline void sl_store_value(sl_dtype dtype, void *data, int64_t index, float value) {
  if (dtype == SL_F32) {
    ((float *)data)[index] = value;
  } else {
    ((uint16_t *)data)[index] = dtype == SL_BF16 ? sl_float_to_bf16(value) : sl_float_to_f16(value);
  }
}

#endif
