/* Weights to and from their packed form. */
#include <stddef.h>
#include <string.h>

#include "quantize/rounding.h"
#include "quantize/validate.h"
#include "runtime/status.h"

sl_status sl_packed_weight_size(const sl_quantized_weight *weight, int64_t *bytes, int64_t *scale_groups,
                                int64_t *padded_features) {
  SL_REQUIRE(bytes && scale_groups && padded_features, SL_INVALID_ARGUMENT,
             "bytes, scale_groups and padded_features must not be NULL");
  SL_CHECK(sl_quantize_validate_weight(weight, false));
  *padded_features = sl_padded_outputs(weight);
  *scale_groups = sl_scale_groups(weight);
  *bytes = sl_panel_bytes(weight, sl_padded_inputs(weight)) * (*padded_features / SL_QUANTIZE_PANEL);
  return SL_OK;
}

/* Values of one output channel. */
typedef struct channel_values {
  sl_dtype dtype;
  const void *values;
  int64_t first; /* index of its input 0 */
} channel_values;

static float load(const channel_values *channel, int64_t input) {
  return sl_load_value(channel->dtype, channel->values, channel->first + input);
}

static double squared_error(const channel_values *channel, int64_t begin, int64_t end, float scale) {
  double error = 0;
  for (int64_t k = begin; k < end; ++k) {
    float x = load(channel, k);
    double difference = x - (double)scale * sl_round_to_integer(x, 1 / scale, 7);
    error += difference * difference;
  }
  return error;
}

static float choose_scale(const channel_values *channel, int64_t begin, int64_t end, int bits) {
  float amax = 0;
  for (int64_t k = begin; k < end; ++k) amax = fmaxf(amax, fabsf(load(channel, k)));
  float scale = sl_forward_scale(amax, bits);
  if (bits == 8 || scale == 0) return scale;
  float best = scale;
  double least = squared_error(channel, begin, end, scale);
  for (int step = 19; step >= 10; --step) {
    float candidate = scale * ((float)step / 20);
    double error = squared_error(channel, begin, end, candidate);
    if (error < least) least = error, best = candidate;
  }
  return best;
}

/* The place of an input in the bytes of its channel: as sl_packed_weight() reads it. */
static void store_weight(uint8_t *channel_bytes, int bits, int64_t input, int q) {
  static const int position[4] = {0, 2, 1, 3};
  if (bits == 8) {
    channel_bytes[input / 4 * 64 + position[input % 4]] = (uint8_t)(int8_t)q;
  } else {
    uint8_t *pair = &channel_bytes[input / 8 * 64 + input % 4];
    *pair = input % 8 < 4 ? (uint8_t)((*pair & 0xf0) | (q + 8)) : (uint8_t)((*pair & 0x0f) | ((q + 8) << 4));
  }
}

sl_status sl_pack_weight(const sl_quantized_weight *weight, sl_dtype dtype, const void *values, void *packed,
                         float *scale) {
  int64_t bytes, scale_groups, padded;
  SL_CHECK(sl_packed_weight_size(weight, &bytes, &scale_groups, &padded));
  SL_CHECK(sl_quantize_validate_dtype("weight", dtype));
  int64_t count = weight->out_features * weight->in_features;
  SL_REQUIRE((values && packed) || count == 0, SL_INVALID_ARGUMENT, "weight or packed is NULL, expected data");
  SL_REQUIRE(scale || padded == 0, SL_INVALID_ARGUMENT, "scale is NULL, expected data");
  for (int64_t i = 0; i < count; ++i) {
    float value = sl_load_value(dtype, values, i);
    SL_REQUIRE(isfinite(value), SL_INVALID_ARGUMENT, "weight has %g at output %lld, input %lld, expected finite values",
               (double)value, (long long)(i / weight->in_features), (long long)(i % weight->in_features));
  }
  if (bytes > 0) memset(packed, weight->bits == 8 ? 0 : 0x88, (size_t)bytes);
  if (padded > 0) memset(scale, 0, (size_t)(scale_groups * padded) * sizeof(float));
  int64_t outputs = sl_group_outputs(weight), padded_outputs = sl_group_panels(weight) * SL_QUANTIZE_PANEL;
  int64_t panel_bytes = sl_panel_bytes(weight, sl_padded_inputs(weight)), inputs = sl_scale_inputs(weight);
  for (int64_t output = 0; output < weight->out_features; ++output) {
    channel_values channel = {dtype, values, output * weight->in_features};
    int64_t column = output / outputs * padded_outputs + output % outputs;
    uint8_t *channel_bytes =
        (uint8_t *)packed + column / SL_QUANTIZE_PANEL * panel_bytes + column % SL_QUANTIZE_PANEL * 4;
    for (int64_t group = 0; group < scale_groups; ++group) {
      int64_t begin = group * inputs, end = begin + inputs;
      if (end > weight->in_features) end = weight->in_features;
      float unit = choose_scale(&channel, begin, end, weight->bits);
      scale[group * padded + column] = unit;
      for (int64_t k = begin; k < end && unit != 0; ++k) {
        int q = sl_round_to_integer(load(&channel, k), 1 / unit, sl_largest_integer(weight->bits));
        store_weight(channel_bytes, weight->bits, k, q);
      }
    }
  }
  return SL_OK;
}

sl_status sl_unpack_weight(const sl_quantized_weight *weight, float *values) {
  SL_CHECK(sl_quantize_validate_weight(weight, true));
  SL_REQUIRE(values || weight->out_features * weight->in_features == 0, SL_INVALID_ARGUMENT,
             "values is NULL, expected memory");
  int64_t outputs = sl_group_outputs(weight);
  for (int64_t output = 0; output < weight->out_features; ++output) {
    int64_t group = output / outputs, channel = output % outputs;
    for (int64_t k = 0; k < weight->in_features; ++k) {
      values[output * weight->in_features + k] =
          sl_packed_scale(weight, group, channel, k) * (float)sl_packed_weight(weight, group, channel, k);
    }
  }
  return SL_OK;
}
