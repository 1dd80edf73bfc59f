/* The arithmetic of the collectives: what ops/sluice/comm.h says under REDUCTION, for buffers of one process. */
#ifndef SL_COMM_REDUCE_H
#define SL_COMM_REDUCE_H

#include <sluice/comm.h>

/* out[i] = in[0][i] o in[1][i] o ... o in[sources - 1][i], in this order.
 *
 * The sum of bfloat16 and float16 is a float32, rounded to nearest even at the end; every other dtype is its own. No
 * multiply-add is fused, so every tier gives the same bits, except that which NaN a NaN is depends on the tier.
 * AVG          divides the sum by sources, in the type of the sum; integers after wrapping around, towards zero.
 * PREMUL_SUM   multiplies by factor, rounded to the type of the sum.
 * MIN, MAX     of a zero and a zero of the other sign is the first of the two.
 * Booleans are true if any bit is set; results are 0 or 1. */
typedef struct sl_reduce_args {
  void *out;             /* [count]; may be one of in, and must not overlap any of them otherwise */
  const void *const *in; /* [sources], each [count] of dtype, at any address */
  int sources;           /* 1 .. SL_COMM_MAX_SIZE */
  size_t count;
  sl_dtype dtype;
  sl_reduce_op op;
  double factor; /* of SL_REDUCE_PREMUL_SUM; not read otherwise */
} sl_reduce_args;

/* The arguments are valid: sl_reduce_validate() has passed. */
void sl_reduce(const sl_reduce_args *args);

/* The same in scalar C without tricks: what sl_reduce() is tested against. */
void sl_reduce_reference(const sl_reduce_args *args);

/* Refused, with SL_UNSUPPORTED: BAND, BOR, BXOR of floating point; PREMUL_SUM of anything else, and AVG of booleans.
 * With SL_INVALID_ARGUMENT: no such dtype or op, and a factor that isn't finite in the type of the sum. */
sl_status sl_reduce_validate(sl_dtype dtype, sl_reduce_op op, double factor);

/* "sum", "avg", ..., for messages; never NULL. */
const char *sl_reduce_op_name(sl_reduce_op op);

/* memcpy whose stores bypass the caches where the tier can: for what this processor won't read again soon. Done, as far
 * as other threads are concerned, before any later store. */
void sl_copy_streaming(void *out, const void *in, size_t bytes);

#endif
