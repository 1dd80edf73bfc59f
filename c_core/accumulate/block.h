/* The block algorithm of accumulate, written once for all vector tiers. A tier includes this file after it has defined
 * a vocabulary of sixteen lanes, whatever its registers are:
 *   floats16, ints16 (32 bits a lane), doubles16
 *   load_f32 load_bf16 load_f16 (pointer) -> floats16,  store_f32 store_bf16 store_f16 (pointer, floats16)
 *   add multiply subtract (floats16, floats16),  broadcast (float)
 *   bits_of (floats16) -> ints16,  floats_of (ints16),  absolute_bits (floats16) -> ints16
 *   add_ints xor_ints multiply_ints max_unsigned and_ints (ints16, ints16),  shift_right (ints16, n),
 *   broadcast_int (uint32_t),  lane_numbers ()
 *   add_squares (doubles16, floats16),  sum_lanes (doubles16) by halves,  largest_lane (ints16)
 *   round_to_f16 (floats16): to nearest, as float32;  cut_fraction (floats16),  copy_sign (magnitude, sign)
 *   lanes_below (floats16, floats16) -> mask16,  mask_bits (mask16) -> uint32_t,  choose (mask16, if set, else)
 * Blocks with values that are not finite are left to the scalar tier, so nothing here needs to mask them. */
#ifndef SL_ACCUMULATE_BLOCK_H
#define SL_ACCUMULATE_BLOCK_H

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "accumulate/kernel.h"

#define SL_INLINE static inline __attribute__((always_inline))

enum { LANES = SL_ACCUMULATE_LANES };
static const uint32_t infinity_bits = 0x7f800000u;

/* Sums of squares and the largest magnitude; NaN and infinity show as a largest of at least infinity_bits. */
typedef struct measurement {
  doubles16 squares;
  ints16 largest;
} measurement;

SL_INLINE measurement measure_nothing(void) {
  measurement m;
  memset(&m, 0, sizeof m);
  return m;
}

SL_INLINE void measure_values(measurement *m, floats16 values) {
  m->squares = add_squares(m->squares, values);
  m->largest = max_unsigned(m->largest, absolute_bits(values));
}

SL_INLINE floats16 load(sl_dtype dtype, const void *values) {
  return dtype == SL_F32 ? load_f32(values) : dtype == SL_BF16 ? load_bf16(values) : load_f16(values);
}

SL_INLINE void store(sl_dtype dtype, void *values, floats16 what) {
  if (dtype == SL_F32) store_f32(values, what);
  else if (dtype == SL_BF16) store_bf16(values, what);
  else store_f16(values, what);
}

SL_INLINE size_t bytes_of(sl_dtype dtype, int64_t count) { return (size_t)count * (dtype == SL_F32 ? 4 : 2); }

/* The last elements of a short block are loaded and stored through a padded copy: zeros change no statistic. */
SL_INLINE floats16 load_some(sl_dtype dtype, const void *values, int64_t count) {
  float padded[LANES] = {0};
  memcpy(padded, values, bytes_of(dtype, count));
  return load(dtype, padded);
}

SL_INLINE void store_some(sl_dtype dtype, void *values, floats16 what, int64_t count) {
  float padded[LANES];
  store(dtype, padded, what);
  memcpy(values, padded, bytes_of(dtype, count));
}

SL_INLINE void take_gradient(sl_dtype dtype, const void *grad, int64_t count,
                             const measurement *m, sl_accumulate_stats *stats) {
  uint32_t largest = largest_lane(m->largest);
  if (largest >= infinity_bits) {
    sl_measure_values(dtype, grad, count, &stats->grad_sumsq, &stats->grad_amax, &stats->grad_nonfinite);
    return;
  }
  stats->grad_sumsq = sum_lanes(m->squares);
  stats->grad_amax = (double)sl_float_from_bits(largest);
}

SL_INLINE floats16 add_product(floats16 gradient, floats16 scale, bool overwrite, floats16 old) {
  floats16 product = multiply(gradient, scale);
  return overwrite ? product : add(old, product);
}

SL_INLINE void accumulate_f32(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                              sl_dtype grad_dtype, bool overwrite) {
  int64_t count = sl_block_count(args, block), first = block * SL_ACCUMULATE_BLOCK, i = 0;
  const char *grad = sl_offset(args->grad, first, grad_dtype);
  float *sums = sl_offset(args->accumulator, first, SL_F32);
  floats16 scale = broadcast((float)args->grad_scale);
  measurement of_grad = measure_nothing(), of_sums = measure_nothing();
  for (; i + LANES <= count; i += LANES) {
    floats16 gradient = load(grad_dtype, sl_offset(grad, i, grad_dtype));
    floats16 sum = add_product(gradient, scale, overwrite, overwrite ? gradient : load_f32(sums + i));
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
  }
  if (i < count) {
    floats16 gradient = load_some(grad_dtype, sl_offset(grad, i, grad_dtype), count - i);
    floats16 old = overwrite ? gradient : load_some(SL_F32, sums + i, count - i);
    floats16 sum = add_product(gradient, scale, overwrite, old);
    store_some(SL_F32, sums + i, sum, count - i);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
  }
  take_gradient(grad_dtype, grad, count, &of_grad, stats);
  if (largest_lane(of_sums.largest) >= infinity_bits) {
    double amax, nonfinite;
    sl_measure_values(SL_F32, sums, count, &stats->sum_sumsq, &amax, &nonfinite);
  } else {
    stats->sum_sumsq = sum_lanes(of_sums.squares);
  }
}

/* Sixteen words of the contract's w, for elements 32 j .. 32 j + 31. */
SL_INLINE ints16 random_words(uint64_t key, uint32_t j) {
  ints16 word = add_ints(lane_numbers(), broadcast_int(16 * j + (uint32_t)key));
  word = xor_ints(word, shift_right(word, 16));
  word = multiply_ints(word, broadcast_int(0x7FEB352Du));
  word = xor_ints(word, broadcast_int((uint32_t)(key >> 32)));
  word = xor_ints(word, shift_right(word, 15));
  word = multiply_ints(word, broadcast_int(0x846CA68Bu));
  return xor_ints(word, shift_right(word, 16));
}

/* Where |x| is below the normal range of float16, more than 13 bits are cut off: the second line of the contract. */
SL_INLINE floats16 round_stochastically(floats16 x, mask16 small, ints16 random) {
  floats16 rounded = floats_of(and_ints(add_ints(bits_of(x), random), broadcast_int(~UINT32_C(0x1FFF))));
  if (!mask_bits(small)) return rounded;
  floats16 units = add(multiply(floats_of(absolute_bits(x)), broadcast(0x1p24f)),
                       multiply(to_floats(random), broadcast(0x1p-13f)));
  return choose(small, copy_sign(multiply(cut_fraction(units), broadcast(0x1p-24f)), x), rounded);
}

typedef struct rounding {
  doubles16 squares; /* of the errors */
  int64_t underflow;
} rounding;

SL_INLINE floats16 round_lanes(floats16 x, bool stochastic, ints16 random, rounding *r) {
  floats16 magnitude = floats_of(absolute_bits(x));
  mask16 small = lanes_below(magnitude, broadcast(0x1p-14f));
  floats16 rounded = stochastic ? round_stochastically(x, small, random) : round_to_f16(x);
  if (mask_bits(small)) {
    uint32_t zero = mask_bits(lanes_below(magnitude, broadcast(0x1p-149f)));
    r->underflow += __builtin_popcount(mask_bits(small) & ~zero);
  }
  r->squares = add_squares(r->squares, subtract(rounded, x));
  return rounded;
}

/* Scales the sums of a block, a multiple of 32 of them because zeros were appended, rounds and stores them. */
SL_INLINE void round_block(const sl_accumulate_args *args, int64_t block, const float *sums, int exponent,
                           bool stochastic, sl_accumulate_stats *stats) {
  int64_t count = sl_block_count(args, block);
  uint16_t *stored = sl_offset(args->accumulator, block * SL_ACCUMULATE_BLOCK, SL_F16);
  floats16 scale = broadcast(sl_power_of_two(-exponent));
  uint64_t key = sl_block_key(args->seed, block);
  rounding r;
  memset(&r, 0, sizeof r);
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    ints16 words = stochastic ? random_words(key, (uint32_t)(i / (2 * LANES))) : broadcast_int(0);
    floats16 low = round_lanes(multiply(load_f32(sums + i), scale), stochastic,
                               and_ints(words, broadcast_int(0x1FFF)), &r);
    floats16 high = round_lanes(multiply(load_f32(sums + i + LANES), scale), stochastic, shift_right(words, 19), &r);
    if (i + 2 * LANES <= count) {
      store_f16(stored + i, low);
      store_f16(stored + i + LANES, high);
    } else {
      int64_t left = count - i;
      store_some(SL_F16, stored + i, low, left < LANES ? left : LANES);
      if (left > LANES) store_some(SL_F16, stored + i + LANES, high, left - LANES);
    }
  }
  stats->error_sumsq = ldexp(sum_lanes(r.squares), 2 * exponent);
  stats->underflow = (double)r.underflow;
  args->exponents[block] = (int8_t)exponent;
}

/* First the sums, into memory that stays in the first-level cache, then the exponent, then the rounding. */
SL_INLINE void accumulate_f16(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                              sl_dtype grad_dtype, bool overwrite) {
  _Alignas(64) float sums[SL_ACCUMULATE_BLOCK];
  int64_t count = sl_block_count(args, block), first = block * SL_ACCUMULATE_BLOCK, i = 0;
  const char *grad = sl_offset(args->grad, first, grad_dtype);
  const uint16_t *stored = sl_offset(args->accumulator, first, SL_F16);
  floats16 scale = broadcast((float)args->grad_scale);
  floats16 old_scale = broadcast(overwrite ? 1 : sl_power_of_two(args->exponents[block]));
  measurement of_grad = measure_nothing(), of_sums = measure_nothing();
  for (; i + LANES <= count; i += LANES) {
    floats16 gradient = load(grad_dtype, sl_offset(grad, i, grad_dtype));
    floats16 old = overwrite ? gradient : multiply(load_f16(stored + i), old_scale);
    floats16 sum = add_product(gradient, scale, overwrite, old);
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
  }
  if (i < count) {
    floats16 gradient = load_some(grad_dtype, sl_offset(grad, i, grad_dtype), count - i);
    floats16 old = overwrite ? gradient : multiply(load_some(SL_F16, stored + i, count - i), old_scale);
    floats16 sum = add_product(gradient, scale, overwrite, old);
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
    i += LANES;
  }
  if (i % (2 * LANES)) store_f32(sums + i, broadcast(0));
  uint32_t largest = largest_lane(of_sums.largest);
  if (largest >= infinity_bits) { /* nothing has been written yet */
    sl_accumulate_scalar.accumulate(args, block, stats);
    return;
  }
  take_gradient(grad_dtype, grad, count, &of_grad, stats);
  stats->sum_sumsq = sum_lanes(of_sums.squares);
  if (args->stochastic) round_block(args, block, sums, sl_choose_exponent(largest), true, stats);
  else round_block(args, block, sums, sl_choose_exponent(largest), false, stats);
}

SL_INLINE void accumulate_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                               sl_dtype grad_dtype) {
  if (args->dtype == SL_F32 && args->overwrite) accumulate_f32(args, block, stats, grad_dtype, true);
  else if (args->dtype == SL_F32) accumulate_f32(args, block, stats, grad_dtype, false);
  else if (args->overwrite) accumulate_f16(args, block, stats, grad_dtype, true);
  else accumulate_f16(args, block, stats, grad_dtype, false);
}

/* Each type gets its own loop: the switches below are outside of them. */
static void accumulate(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->grad_dtype == SL_F32) accumulate_from(args, block, stats, SL_F32);
  else if (args->grad_dtype == SL_BF16) accumulate_from(args, block, stats, SL_BF16);
  else accumulate_from(args, block, stats, SL_F16);
}

SL_INLINE void measure_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                            sl_dtype dtype) {
  int64_t count = sl_block_count(args, block), i = 0;
  const char *grad = sl_offset(args->grad, block * SL_ACCUMULATE_BLOCK, dtype);
  measurement m = measure_nothing();
  for (; i + LANES <= count; i += LANES) measure_values(&m, load(dtype, sl_offset(grad, i, dtype)));
  if (i < count) measure_values(&m, load_some(dtype, sl_offset(grad, i, dtype), count - i));
  take_gradient(dtype, grad, count, &m, stats);
}

static void measure(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->grad_dtype == SL_F32) measure_from(args, block, stats, SL_F32);
  else if (args->grad_dtype == SL_BF16) measure_from(args, block, stats, SL_BF16);
  else measure_from(args, block, stats, SL_F16);
}

/* What was written is measured by reading it back, so that rounding to the type of out is in the statistics. */
SL_INLINE void read_into(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats, sl_dtype dtype,
                         sl_dtype out_dtype) {
  int64_t count = sl_block_count(args, block), first = block * SL_ACCUMULATE_BLOCK, i = 0;
  const char *values = sl_offset(args->accumulator, first, dtype);
  char *out = sl_offset(args->out, first, out_dtype);
  floats16 block_scale = broadcast(dtype == SL_F16 ? sl_power_of_two(args->exponents[block]) : 1);
  floats16 scale = broadcast((float)args->scale);
  measurement m = measure_nothing();
  for (; i < count; i += LANES) {
    int64_t left = count - i < LANES ? count - i : LANES;
    const void *source = sl_offset(values, i, dtype);
    void *target = sl_offset(out, i, out_dtype);
    floats16 value = left == LANES ? load(dtype, source) : load_some(dtype, source, left);
    value = multiply(multiply(value, block_scale), scale);
    if (left == LANES) store(out_dtype, target, value);
    else store_some(out_dtype, target, value, left);
    if (out_dtype != SL_F32) value = left == LANES ? load(out_dtype, target) : load_some(out_dtype, target, left);
    measure_values(&m, value);
  }
  take_gradient(out_dtype, out, count, &m, stats);
}

SL_INLINE void read_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats, sl_dtype dtype) {
  if (args->out_dtype == SL_F32) read_into(args, block, stats, dtype, SL_F32);
  else if (args->out_dtype == SL_BF16) read_into(args, block, stats, dtype, SL_BF16);
  else read_into(args, block, stats, dtype, SL_F16);
}

static void read(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->dtype == SL_F32) read_from(args, block, stats, SL_F32);
  else read_from(args, block, stats, SL_F16);
}

#endif
