/* The formula of sluice/prune.h in scalar C, no tricks: the specification, and the tier every machine has. */
#include <math.h>

#include "prune/kernel.h"
#include "runtime/number.h"

double sl_prune_magnitude(sl_dtype dtype, const void *data, int64_t index) {
  switch (dtype) {
    case SL_F64: return fabs(((const double *)data)[index]);
    case SL_F32: return fabs((double)((const float *)data)[index]);
    case SL_BF16: return fabs((double)sl_bf16_to_float(((const uint16_t *)data)[index]));
    default: return fabs((double)sl_f16_to_float(((const uint16_t *)data)[index]));
  }
}

double sl_prune_add_spaced(sl_dtype dtype, const void *values, int64_t count, int64_t stride) {
  double lanes[SL_PRUNE_LANES] = {0};
  for (int64_t i = 0; i < count; ++i) lanes[i % SL_PRUNE_LANES] += sl_prune_magnitude(dtype, values, i * stride);
  return sl_prune_add_lanes(lanes);
}

static double add_run(sl_dtype dtype, const void *values, int64_t count) {
  return sl_prune_add_spaced(dtype, values, count, 1);
}

static void add_to_each(sl_dtype dtype, const void *values, int64_t count, double *sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += sl_prune_magnitude(dtype, values, i);
}

const sl_prune_kernel sl_prune_scalar = {"scalar", SL_ISA_SCALAR, add_run, add_to_each};
