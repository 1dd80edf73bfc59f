/* The formula of sluice/accumulate.h in scalar C, no tricks: the specification, and the tier every machine has. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "accumulate/kernel.h"

static const float smallest_normal = 0x1p-14f; /* of float16 */

static float load(sl_dtype dtype, const void *data, int64_t index) {
  switch (dtype) {
    case SL_F32: return ((const float *)data)[index];
    case SL_BF16: return sl_bf16_to_float(((const uint16_t *)data)[index]);
    default: return sl_f16_to_float(((const uint16_t *)data)[index]);
  }
}

static void store(sl_dtype dtype, void *data, int64_t index, float value) {
  switch (dtype) {
    case SL_F32: ((float *)data)[index] = value; break;
    case SL_BF16: ((uint16_t *)data)[index] = sl_float_to_bf16(value); break;
    default: ((uint16_t *)data)[index] = sl_float_to_f16(value); break;
  }
}

static float add_lanes(float *lanes) {
  for (int width = SL_ACCUMULATE_LANES / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

static double add_wide_lanes(double *lanes) {
  for (int width = SL_ACCUMULATE_LANES / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

void sl_measure_values(sl_dtype dtype, const void *values, int64_t count, double *sumsq, double *amax,
                       double *nonfinite) {
  float lanes[SL_ACCUMULATE_LANES] = {0};
  double wide[SL_ACCUMULATE_LANES] = {0};
  *amax = *nonfinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    float value = load(dtype, values, i);
    if (!isfinite(value)) {
      *nonfinite += 1;
      continue;
    }
    lanes[i % SL_ACCUMULATE_LANES] = fmaf(value, value, lanes[i % SL_ACCUMULATE_LANES]);
    wide[i % SL_ACCUMULATE_LANES] += (double)value * (double)value;
    if (fabsf(value) > *amax) *amax = fabsf(value);
  }
  float sum = add_lanes(lanes);
  *sumsq = *nonfinite == 0 && sl_trusted(sum) ? sum : add_wide_lanes(wide);
}

/* r of the contract, for element p of its block. */
static uint32_t random_bits(uint64_t key, int64_t p) {
  uint32_t m = (uint32_t)(p % 32), word = (uint32_t)key + ((uint32_t)(p / 32) * 16 + m % 16) * UINT32_C(0x9E3779B1);
  word ^= word >> 16;
  word *= UINT32_C(0x7FEB352D);
  word ^= word >> 15;
  return m < 16 ? word & 0x1FFF : word >> 19;
}

static float round_stochastically(float x, uint32_t random) {
  if (fabsf(x) >= smallest_normal) return sl_float_from_bits((sl_float_bits(x) + random) & ~UINT32_C(0x1FFF));
  float units = fabsf(x) * 0x1p24f + (float)random * 0x1p-13f;
  return copysignf((float)(int32_t)units * 0x1p-24f, x);
}

/* Rounds the sums of a block into float16 and writes what the rounding did to stats. */
static void round_block(const sl_accumulate_args *args, int64_t block, const float *sums, bool finite,
                        uint32_t amax_bits, sl_accumulate_stats *stats) {
  int64_t first = block * SL_ACCUMULATE_BLOCK, count = sl_block_count(args, block);
  int exponent = sl_choose_exponent(amax_bits);
  uint64_t key = sl_block_key(args->seed, block);
  float lanes[SL_ACCUMULATE_LANES] = {0};
  for (int64_t i = 0; i < count; ++i) {
    float x = sums[i] * sl_power_of_two(-exponent);
    float rounded =
        args->stochastic && finite ? round_stochastically(x, random_bits(key, i)) : sl_f16_to_float(sl_float_to_f16(x));
    store(SL_F16, args->accumulator, first + i, rounded);
    if (!isfinite(sums[i])) continue;
    float error = rounded - x;
    lanes[i % SL_ACCUMULATE_LANES] = fmaf(error, error, lanes[i % SL_ACCUMULATE_LANES]);
    if (x != 0 && fabsf(x) < smallest_normal) stats->underflow += 1;
  }
  stats->error_sumsq = ldexp((double)add_lanes(lanes), 2 * exponent);
  args->exponents[block] = (int8_t)exponent;
}

static void accumulate(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  int64_t first = block * SL_ACCUMULATE_BLOCK, count = sl_block_count(args, block);
  float grad_scale = (float)args->grad_scale, sums[SL_ACCUMULATE_BLOCK];
  float old_scale = args->dtype == SL_F16 && !args->overwrite ? sl_power_of_two(args->exponents[block]) : 1;
  memset(stats, 0, sizeof *stats);
  sl_measure_values(args->grad_dtype, sl_offset(args->grad, first, args->grad_dtype), count, &stats->grad_sumsq,
                    &stats->grad_amax, &stats->grad_nonfinite);
  for (int64_t i = 0; i < count; ++i) {
    float product = load(args->grad_dtype, args->grad, first + i) * grad_scale;
    sums[i] = args->overwrite ? product : load(args->dtype, args->accumulator, first + i) * old_scale + product;
  }
  double amax, nonfinite;
  sl_measure_values(SL_F32, sums, count, &stats->sum_sumsq, &amax, &nonfinite);
  if (nonfinite > 0) stats->sum_sumsq = (double)INFINITY;
  if (args->dtype == SL_F32) {
    memcpy(sl_offset(args->accumulator, first, SL_F32), sums, (size_t)count * sizeof *sums);
  } else {
    round_block(args, block, sums, nonfinite == 0, sl_float_bits((float)amax), stats);
  }
}

static void measure(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  sl_measure_values(args->grad_dtype, sl_offset(args->grad, block * SL_ACCUMULATE_BLOCK, args->grad_dtype),
                    sl_block_count(args, block), &stats->grad_sumsq, &stats->grad_amax, &stats->grad_nonfinite);
}

static void read(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  int64_t first = block * SL_ACCUMULATE_BLOCK, count = sl_block_count(args, block);
  float block_scale = args->dtype == SL_F16 ? sl_power_of_two(args->exponents[block]) : 1;
  memset(stats, 0, sizeof *stats);
  for (int64_t i = first; i < first + count; ++i) {
    float value = load(args->dtype, args->accumulator, i) * block_scale;
    store(args->out_dtype, args->out, i, value * (float)args->scale);
  }
  sl_measure_values(args->out_dtype, sl_offset(args->out, first, args->out_dtype), count, &stats->grad_sumsq,
                    &stats->grad_amax, &stats->grad_nonfinite);
}

const sl_accumulate_kernel sl_accumulate_scalar = {"scalar", SL_ISA_SCALAR, accumulate, measure, read};
