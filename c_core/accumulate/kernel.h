/* The kernel table: what one instruction-set tier supplies for accumulate. Each function works on one block of
 * SL_ACCUMULATE_BLOCK elements (the last may be shorter), so that a float16 block stays in the first-level cache
 * between its sums and its rounding, and a call through the table costs nothing. */
#ifndef SL_ACCUMULATE_KERNEL_H
#define SL_ACCUMULATE_KERNEL_H

#include <sluice/accumulate.h>

#include "runtime/number.h"

/* Writes the statistics of block number `block` to stats. The args are valid. */
typedef void (*sl_accumulate_block)(const sl_accumulate_args *args, int64_t block, sl_accumulate_stats *stats);

typedef struct sl_accumulate_kernel {
  const char *name;
  sl_isa isa;
  sl_accumulate_block accumulate; /* sl_accumulate */
  sl_accumulate_block measure;    /* sl_measure_gradient */
  sl_accumulate_block read;       /* sl_read_accumulator */
} sl_accumulate_kernel;

/* The kernel number i of kernels.def, NULL behind the last. */
const sl_accumulate_kernel *sl_accumulate_list_kernels(int number);

extern const sl_accumulate_kernel sl_accumulate_scalar;

/* Sums of squares are kept in so many float lanes, element i of a block in lane i % 16, by fused multiply-adds, and
 * added up by halves: every tier can do so, and gets the same bits. Where that is not sl_trusted, because squares
 * overflowed or vanished, or a value was not finite, the block's sum is redone in lanes of doubles, over its finite
 * values. */
enum { SL_ACCUMULATE_LANES = 16 };
static inline bool sl_trusted(float sum) { return sum >= 0x1p-80f && sum <= 0x1.fffffep127f; }

/* Sum of squares, largest magnitude and count of what is not finite, of any elements: the slow way, used by the
 * overlays for a block in which something is not finite. */
void sl_measure_values(sl_dtype dtype, const void *values, int64_t count, double *sumsq, double *amax,
                       double *nonfinite);

SL_SHARED_INLINE int64_t sl_count_blocks(int64_t count) {
  return count / SL_ACCUMULATE_BLOCK + (count % SL_ACCUMULATE_BLOCK != 0);
}

/* Elements of this block. */
SL_SHARED_INLINE int64_t sl_block_count(const sl_accumulate_args *args, int64_t block) {
  int64_t left = args->count - block * SL_ACCUMULATE_BLOCK;
  return left < SL_ACCUMULATE_BLOCK ? left : SL_ACCUMULATE_BLOCK;
}

/* data + index elements. */
static inline void *sl_offset(const void *data, int64_t index, sl_dtype dtype) {
  return (char *)data + index * (dtype == SL_F32 ? 4 : 2);
}

/* 2^exponent for -126 <= exponent <= 127. */
SL_SHARED_INLINE float sl_power_of_two(int exponent) { return sl_float_from_bits((uint32_t)(127 + exponent) << 23); }

/* The e of the contract, from the bits of amax. */
SL_SHARED_INLINE int sl_choose_exponent(uint32_t amax_bits) {
  int exponent = (int)(amax_bits >> 23) - 127 - 14;
  return exponent < -126 ? -126 : exponent; /* at most 254 - 127 - 14 = 113 */
}

/* The key of a block's random numbers: low and high half of splitmix64's output. */
SL_SHARED_INLINE uint64_t sl_block_key(uint64_t seed, int64_t block) {
  uint64_t z = seed + ((uint64_t)block + 1) * UINT64_C(0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  return z ^ (z >> 31);
}

#endif
