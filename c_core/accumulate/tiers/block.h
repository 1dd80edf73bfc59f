/* The block algorithm of accumulate, written once for all vector tiers. A tier includes this file after it has defined
 * a vocabulary of sixteen lanes, whatever its registers are:
 *   floats16, ints16 (32 bits a lane)
 *   load_f32 load_bf16 load_f16 (pointer) -> floats16,  store_f32 store_bf16 store_f16 (pointer, floats16)
 *   add multiply subtract (floats16, floats16),  multiply_add (x, y, sum) fused: x * y + sum,  broadcast (float)
 *   bits_of (floats16) -> ints16,  floats_of (ints16),  absolute_bits (floats16) -> ints16
 *   add_ints xor_ints multiply_ints and_ints (ints16, ints16),  shift_right (ints16, n),  broadcast_int (uint32_t),
 *   lane_numbers (),  sum_lanes (floats16) by halves
 *   extremes: the largest or smallest so far of any lane, in one register;  no_largest () no_smallest ()
 *   keep_largest keep_smallest (extremes, ints16) unsigned,  largest_of smallest_of (extremes) -> uint32_t
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

/* Sum of squares and the largest magnitude; NaN and infinity show as a largest of at least infinity_bits. */
typedef struct measurement {
  floats16 squares;
  extremes largest;
} measurement;

SL_INLINE measurement measure_nothing(void) { return (measurement){broadcast(0), no_largest()}; }

SL_INLINE void measure_values(measurement *m, floats16 values) {
  m->squares = multiply_add(values, values, m->squares);
  m->largest = keep_largest(m->largest, absolute_bits(values));
}

SL_INLINE floats16 load(sl_dtype dtype, const void *values) {
  return dtype == SL_F32 ? load_f32(values) : dtype == SL_BF16 ? load_bf16(values) : load_f16(values);
}

SL_INLINE void store(sl_dtype dtype, void *values, floats16 what) {
  if (dtype == SL_F32)
    store_f32(values, what);
  else if (dtype == SL_BF16)
    store_bf16(values, what);
  else
    store_f16(values, what);
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

/* The statistics of a block: from the lanes where they can be trusted, else by looking at the values once more. */
SL_INLINE void take_measurement(sl_dtype dtype, const void *values, int64_t count, const measurement *m,
                                sl_accumulate_stats *stats) {
  uint32_t largest = largest_of(m->largest);
  float sumsq = sum_lanes(m->squares);
  if (largest && !sl_trusted(sumsq)) {
    sl_measure_values(dtype, values, count, &stats->grad_sumsq, &stats->grad_amax, &stats->grad_nonfinite);
    return;
  }
  stats->grad_sumsq = (double)sumsq;
  stats->grad_amax = (double)sl_float_from_bits(largest);
}

/* How far ahead of the loads memory is asked for, in bytes. The statistics hang on what is loaded, and while they wait
 * no further loads are begun; asked for in advance, lines are there when the loads come. A float16 block is rounded
 * without touching memory, so there the next block is asked for. Both distances are the best of those tried. */
enum { PREFETCH_DISTANCE = 384, PREFETCH_DISTANCE_F16 = 3072 };

SL_INLINE void prefetch(const void *address, int distance) {
  __builtin_prefetch((const void *)((uintptr_t)address + (uintptr_t)distance));
}

/* Sum of squares of a block's sums; infinity if one is not finite. */
SL_INLINE double measure_sums(const float *sums, int64_t count, floats16 squares) {
  float sumsq = sum_lanes(squares);
  if (sl_trusted(sumsq)) return (double)sumsq;
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= sl_float_bits(sums[i]) << 1;
  if (!any) return 0;
  double exact, amax, nonfinite;
  sl_measure_values(SL_F32, sums, count, &exact, &amax, &nonfinite);
  return nonfinite > 0 ? (double)INFINITY : exact;
}

SL_INLINE void accumulate_f32(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                              sl_dtype grad_dtype, bool overwrite) {
  int64_t count = sl_block_count(args, block), first = block * SL_ACCUMULATE_BLOCK, i = 0;
  const char *grad = sl_offset(args->grad, first, grad_dtype);
  float *sums = sl_offset(args->accumulator, first, SL_F32);
  floats16 scale = broadcast((float)args->grad_scale);
  measurement of_grad = measure_nothing();
  floats16 squares = broadcast(0);
  for (; i + LANES <= count; i += LANES) {
    floats16 gradient = load(grad_dtype, sl_offset(grad, i, grad_dtype));
    floats16 sum = multiply(gradient, scale);
    if (!overwrite) sum = add(load_f32(sums + i), sum);
    prefetch(sl_offset(grad, i, grad_dtype), PREFETCH_DISTANCE);
    prefetch(sums + i, PREFETCH_DISTANCE);
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    squares = multiply_add(sum, sum, squares);
  }
  if (i < count) {
    floats16 gradient = load_some(grad_dtype, sl_offset(grad, i, grad_dtype), count - i);
    floats16 sum = multiply(gradient, scale);
    if (!overwrite) sum = add(load_some(SL_F32, sums + i, count - i), sum);
    store_some(SL_F32, sums + i, sum, count - i);
    measure_values(&of_grad, gradient);
    squares = multiply_add(sum, sum, squares);
  }
  take_measurement(grad_dtype, grad, count, &of_grad, stats);
  stats->sum_sumsq = measure_sums(sums, count, squares);
}

static const uint32_t random_step = 0x9E3779B1u;

/* Sixteen words of the contract's w, from low32(z) + (16 j + lane) * random_step. */
SL_INLINE ints16 mix_words(ints16 word) {
  word = xor_ints(word, shift_right(word, 16));
  word = multiply_ints(word, broadcast_int(0x7FEB352Du));
  return xor_ints(word, shift_right(word, 15));
}

SL_INLINE floats16 round_stochastically(floats16 x, ints16 random) {
  return floats_of(and_ints(add_ints(bits_of(x), random), broadcast_int(~UINT32_C(0x1FFF))));
}

/* Below the normal range of float16 more than 13 bits are cut off: the second line of the contract. */
SL_INLINE floats16 round_small(floats16 x, ints16 random) {
  floats16 units =
      add(multiply(floats_of(absolute_bits(x)), broadcast(0x1p24f)), multiply(to_floats(random), broadcast(0x1p-13f)));
  return copy_sign(multiply(cut_fraction(units), broadcast(0x1p-24f)), x);
}

typedef struct rounding {
  floats16 squares; /* of the errors */
  int64_t underflow;
} rounding;

SL_INLINE floats16 round_lanes(floats16 x, bool stochastic, bool some_small, ints16 random, rounding *r) {
  floats16 rounded = stochastic ? round_stochastically(x, random) : round_to_f16(x);
  if (some_small) {
    floats16 magnitude = floats_of(absolute_bits(x));
    mask16 small = lanes_below(magnitude, broadcast(0x1p-14f));
    if (stochastic) rounded = choose(small, round_small(x, random), rounded);
    r->underflow += __builtin_popcount(mask_bits(small) & ~mask_bits(lanes_below(magnitude, broadcast(0x1p-149f))));
  }
  floats16 error = subtract(rounded, x);
  r->squares = multiply_add(error, error, r->squares);
  return rounded;
}

/* Scales the sums of a block, a multiple of 32 of them because zeros were appended, rounds and stores them. */
SL_INLINE void round_block(const sl_accumulate_args *args, int64_t block, const float *sums, int exponent,
                           bool stochastic, bool some_small, sl_accumulate_stats *stats) {
  int64_t count = sl_block_count(args, block);
  uint16_t *stored = sl_offset(args->accumulator, block * SL_ACCUMULATE_BLOCK, SL_F16);
  floats16 scale = broadcast(sl_power_of_two(-exponent));
  ints16 word = add_ints(multiply_ints(lane_numbers(), broadcast_int(random_step)),
                         broadcast_int((uint32_t)sl_block_key(args->seed, block)));
  rounding r = {broadcast(0), 0};
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    ints16 random = mix_words(word);
    floats16 low = round_lanes(multiply(load_f32(sums + i), scale), stochastic, some_small,
                               and_ints(random, broadcast_int(0x1FFF)), &r);
    floats16 high =
        round_lanes(multiply(load_f32(sums + i + LANES), scale), stochastic, some_small, shift_right(random, 19), &r);
    word = add_ints(word, broadcast_int(16 * random_step));
    if (i + 2 * LANES <= count) {
      store_f16(stored + i, low);
      store_f16(stored + i + LANES, high);
    } else {
      int64_t left = count - i;
      store_some(SL_F16, stored + i, low, left < LANES ? left : LANES);
      if (left > LANES) store_some(SL_F16, stored + i + LANES, high, left - LANES);
    }
  }
  stats->error_sumsq = ldexp((double)sum_lanes(r.squares), 2 * exponent);
  stats->underflow = (double)r.underflow;
  args->exponents[block] = (int8_t)exponent;
}

/* The smallest magnitude other than 0 of a block, as its bits less 1: zero becomes the largest number. */
SL_INLINE extremes keep_smallest_magnitude(extremes smallest, floats16 values) {
  return keep_smallest(smallest, add_ints(absolute_bits(values), broadcast_int(UINT32_MAX)));
}

/* Whether such a magnitude is below 2^-14 once scaled by 2^-exponent. */
SL_INLINE bool is_small(uint32_t smallest, int exponent) {
  int power = exponent - 14; /* of two; at least -140, which is a subnormal float */
  uint32_t bits = power >= -126 ? (uint32_t)(power + 127) << 23 : UINT32_C(1) << (power + 149);
  return smallest + 1 < bits && smallest != UINT32_MAX;
}

/* First the sums, into memory that stays in the first-level cache, then the exponent, then the rounding. Old sums times
 * their scale are exact, so that they may be fused with the addition. */
SL_INLINE void accumulate_f16(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                              sl_dtype grad_dtype, bool overwrite) {
  _Alignas(64) float sums[SL_ACCUMULATE_BLOCK];
  int64_t count = sl_block_count(args, block), first = block * SL_ACCUMULATE_BLOCK, i = 0;
  const char *grad = sl_offset(args->grad, first, grad_dtype);
  const uint16_t *stored = sl_offset(args->accumulator, first, SL_F16);
  floats16 scale = broadcast((float)args->grad_scale);
  floats16 old_scale = broadcast(overwrite ? 1 : sl_power_of_two(args->exponents[block]));
  measurement of_grad = measure_nothing(), of_sums = measure_nothing();
  extremes smallest = no_smallest();
  for (; i + LANES <= count; i += LANES) {
    floats16 gradient = load(grad_dtype, sl_offset(grad, i, grad_dtype));
    floats16 sum = multiply(gradient, scale);
    if (!overwrite) sum = multiply_add(load_f16(stored + i), old_scale, sum);
    prefetch(sl_offset(grad, i, grad_dtype), PREFETCH_DISTANCE_F16);
    prefetch(stored + i, PREFETCH_DISTANCE_F16);
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
    smallest = keep_smallest_magnitude(smallest, sum);
  }
  if (i < count) {
    floats16 gradient = load_some(grad_dtype, sl_offset(grad, i, grad_dtype), count - i);
    floats16 sum = multiply(gradient, scale);
    if (!overwrite) sum = multiply_add(load_some(SL_F16, stored + i, count - i), old_scale, sum);
    store_f32(sums + i, sum);
    measure_values(&of_grad, gradient);
    measure_values(&of_sums, sum);
    smallest = keep_smallest_magnitude(smallest, sum);
    i += LANES;
  }
  if (i % (2 * LANES)) store_f32(sums + i, broadcast(0));
  uint32_t largest = largest_of(of_sums.largest);
  if (largest >= infinity_bits) { /* nothing has been written yet */
    sl_accumulate_scalar.accumulate(args, block, stats);
    return;
  }
  take_measurement(grad_dtype, grad, count, &of_grad, stats);
  stats->sum_sumsq = measure_sums(sums, count, of_sums.squares);
  int exponent = sl_choose_exponent(largest);
  bool some_small = is_small(smallest_of(smallest), exponent);
  if (args->stochastic && some_small)
    round_block(args, block, sums, exponent, true, true, stats);
  else if (args->stochastic)
    round_block(args, block, sums, exponent, true, false, stats);
  else if (some_small)
    round_block(args, block, sums, exponent, false, true, stats);
  else
    round_block(args, block, sums, exponent, false, false, stats);
}

SL_INLINE void accumulate_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats,
                               sl_dtype grad_dtype) {
  if (args->dtype == SL_F32 && args->overwrite)
    accumulate_f32(args, block, stats, grad_dtype, true);
  else if (args->dtype == SL_F32)
    accumulate_f32(args, block, stats, grad_dtype, false);
  else if (args->overwrite)
    accumulate_f16(args, block, stats, grad_dtype, true);
  else
    accumulate_f16(args, block, stats, grad_dtype, false);
}

/* Each type gets its own loop: the switches below are outside of them. */
static void accumulate(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->grad_dtype == SL_F32)
    accumulate_from(args, block, stats, SL_F32);
  else if (args->grad_dtype == SL_BF16)
    accumulate_from(args, block, stats, SL_BF16);
  else
    accumulate_from(args, block, stats, SL_F16);
}

SL_INLINE void measure_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats, sl_dtype dtype) {
  int64_t count = sl_block_count(args, block), i = 0;
  const char *grad = sl_offset(args->grad, block * SL_ACCUMULATE_BLOCK, dtype);
  measurement m = measure_nothing();
  for (; i + LANES <= count; i += LANES) measure_values(&m, load(dtype, sl_offset(grad, i, dtype)));
  if (i < count) measure_values(&m, load_some(dtype, sl_offset(grad, i, dtype), count - i));
  take_measurement(dtype, grad, count, &m, stats);
}

static void measure(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->grad_dtype == SL_F32)
    measure_from(args, block, stats, SL_F32);
  else if (args->grad_dtype == SL_BF16)
    measure_from(args, block, stats, SL_BF16);
  else
    measure_from(args, block, stats, SL_F16);
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
    if (left == LANES)
      store(out_dtype, target, value);
    else
      store_some(out_dtype, target, value, left);
    if (out_dtype != SL_F32) value = left == LANES ? load(out_dtype, target) : load_some(out_dtype, target, left);
    measure_values(&m, value);
  }
  take_measurement(out_dtype, out, count, &m, stats);
}

SL_INLINE void read_from(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats, sl_dtype dtype) {
  if (args->out_dtype == SL_F32)
    read_into(args, block, stats, dtype, SL_F32);
  else if (args->out_dtype == SL_BF16)
    read_into(args, block, stats, dtype, SL_BF16);
  else
    read_into(args, block, stats, dtype, SL_F16);
}

static void read(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats) {
  memset(stats, 0, sizeof *stats);
  if (args->dtype == SL_F32)
    read_from(args, block, stats, SL_F32);
  else
    read_from(args, block, stats, SL_F16);
}

#endif
