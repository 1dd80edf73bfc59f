/* Rows of a packed weight: the lookup of an embedding whose table is also a linear layer. */
#include <stddef.h>

#include "quantize/rounding.h"
#include "quantize/rows.h"
#include "quantize/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum { TASK_VALUES = 16384 }; /* of one task, about: 64 kB written */

typedef struct lookup_run {
  const sl_lookup_weight_args *args;
  int64_t task_rows;
} lookup_run;

/* Inputs first to end of a channel whose bytes begin at channel_bytes; all have this scale. first is a multiple of
 * SL_QUANTIZE_DEPTH, as groups of inputs are. */
static void read_bytes(const uint8_t *channel_bytes, int64_t first, int64_t end, float scale, float *values) {
  static const int position[4] = {0, 2, 1, 3};
  for (int64_t k = first; k < end; ++k) {
    values[k] = scale * (float)(int8_t)channel_bytes[k / 4 * 64 + position[k % 4]];
  }
}

static void read_halves(const uint8_t *channel_bytes, int64_t first, int64_t end, float scale, float *values) {
  for (int64_t k = first; k < end; ++k) {
    uint8_t pair = channel_bytes[k / 8 * 64 + k % 4];
    values[k] = scale * (float)((k % 8 < 4 ? pair & 15 : pair >> 4) - 8);
  }
}

static void lookup_task(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const lookup_run *run = context;
  const sl_lookup_weight_args *args = run->args;
  const sl_quantized_weight *weight = &args->weight;
  int64_t end = (task + 1) * run->task_rows, inputs = sl_scale_inputs(weight);
  int64_t panel_bytes = sl_panel_bytes(weight, sl_padded_inputs(weight));
  for (int64_t i = task * run->task_rows; i < end && i < args->count; ++i) {
    int64_t row = args->rows[i], panel = row / SL_QUANTIZE_PANEL, channel = row % SL_QUANTIZE_PANEL;
    const uint8_t *channel_bytes = (const uint8_t *)weight->packed + panel * panel_bytes + channel * 4;
    float *values = args->values + i * weight->in_features;
    for (int64_t first = 0; first < weight->in_features; first += inputs) {
      int64_t last = first + inputs < weight->in_features ? first + inputs : weight->in_features;
      float scale = sl_packed_scale(weight, 0, row, first);
      (weight->bits == 8 ? read_bytes : read_halves)(channel_bytes, first, last, scale, values);
    }
  }
}

sl_status sl_lookup_weight(const sl_lookup_weight_args *args) {
  SL_CHECK(sl_quantize_validate_lookup(args));
  if (args->count == 0 || args->weight.in_features == 0) return SL_OK;
  lookup_run run = {args, TASK_VALUES / args->weight.in_features + 1};
  sl_run_tasks(sl_executor_for(args->executor, args->count * args->weight.in_features),
               sl_ceil_divide(args->count, run.task_rows), lookup_task, &run);
  return SL_OK;
}
