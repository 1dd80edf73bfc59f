/* The reductions of floating point, written once for all vector tiers. A tier includes this file after it has defined a
 * vocabulary of two registers, whatever their size is:
 *   values                  two registers, of float, or of double where dtype is SL_F64
 *   VALUES_BYTES            of both together
 *   load (dtype, pointer)   store (dtype, pointer, values)    at any address, from and to the type in memory. The order
 *                           of the elements in the registers is the tier's affair: load and store agree on it
 *   broadcast (wide, double)       wide: of doubles
 *   add multiply divide (wide, values, values)
 *   keep_smallest keep_largest (wide, values so far, values): NaN if either is, of equal ones the one so far */
#ifndef SL_COMM_LANES_H
#define SL_COMM_LANES_H

#include <string.h>

#include "comm/kernel.h"

#define SL_INLINE static inline __attribute__((always_inline))

/* Memory that load() reads and store() writes. */
SL_INLINE size_t bytes_of_values(sl_dtype dtype) {
  return dtype == SL_BF16 || dtype == SL_F16 ? VALUES_BYTES / 2 : VALUES_BYTES;
}

SL_INLINE values fold(sl_dtype dtype, sl_reduce_op op, values sum, values x) {
  bool wide = dtype == SL_F64;
  switch (op) {
    case SL_REDUCE_PRODUCT: return multiply(wide, sum, x);
    case SL_REDUCE_MIN: return keep_smallest(wide, sum, x);
    case SL_REDUCE_MAX: return keep_largest(wide, sum, x);
    default: return add(wide, sum, x);
  }
}

/* The result at this offset; of the last, short part through a padded copy. The sources are folded within the loop over
 * elements, so that out is written once, and nothing is written before all sources were read there. */
SL_INLINE values reduce_values(sl_dtype dtype, sl_reduce_op op, const char *const *in, int sources, size_t offset,
                               size_t bytes, values constant) {
  bool wide = dtype == SL_F64;
  values sum = constant;
  for (int source = 0; source < sources; ++source) {
    const char *from = in[source] + offset;
    char padded[VALUES_BYTES];
    if (bytes < bytes_of_values(dtype)) {
      memset(padded, 0, sizeof padded);
      from = memcpy(padded, from, bytes);
    }
    values x = load(dtype, from);
    if (op == SL_REDUCE_PREMUL_SUM) x = multiply(wide, x, constant);
    sum = source ? fold(dtype, op, sum, x) : x;
  }
  return op == SL_REDUCE_AVG ? divide(wide, sum, constant) : sum;
}

SL_INLINE void reduce_sources(const sl_reduce_args *args, sl_dtype dtype, sl_reduce_op op, const char *const *in,
                              int sources) {
  size_t bytes = args->count * sl_dtype_size(dtype), step = bytes_of_values(dtype), offset = 0;
  values constant = broadcast(dtype == SL_F64, op == SL_REDUCE_AVG ? (double)args->sources : args->factor);
  char *out = args->out;
  for (; offset + step <= bytes; offset += step) {
    store(dtype, out + offset, reduce_values(dtype, op, in, sources, offset, step, constant));
  }
  if (offset < bytes) {
    char padded[VALUES_BYTES];
    store(dtype, padded, reduce_values(dtype, op, in, sources, offset, bytes - offset, constant));
    memcpy(out + offset, padded, bytes - offset);
  }
}

/* Two and four sources get loops of their own, unrolled over the sources, whose addresses stay in registers. */
SL_INLINE void reduce_op(const sl_reduce_args *args, sl_dtype dtype, sl_reduce_op op) {
  if (args->sources == 2) {
    const char *in[] = {args->in[0], args->in[1]};
    reduce_sources(args, dtype, op, in, 2);
  } else if (args->sources == 4) {
    const char *in[] = {args->in[0], args->in[1], args->in[2], args->in[3]};
    reduce_sources(args, dtype, op, in, 4);
  } else {
    reduce_sources(args, dtype, op, (const char *const *)args->in, args->sources);
  }
}

SL_INLINE void reduce_dtype(const sl_reduce_args *args, sl_dtype dtype) {
  switch (args->op) {
    case SL_REDUCE_AVG: reduce_op(args, dtype, SL_REDUCE_AVG); break;
    case SL_REDUCE_PRODUCT: reduce_op(args, dtype, SL_REDUCE_PRODUCT); break;
    case SL_REDUCE_MIN: reduce_op(args, dtype, SL_REDUCE_MIN); break;
    case SL_REDUCE_MAX: reduce_op(args, dtype, SL_REDUCE_MAX); break;
    case SL_REDUCE_PREMUL_SUM: reduce_op(args, dtype, SL_REDUCE_PREMUL_SUM); break;
    default: reduce_op(args, dtype, SL_REDUCE_SUM); break;
  }
}

/* Each dtype, op and number of sources gets its own loop: the switches are outside of them. */
static void reduce_f32(const sl_reduce_args *args) { reduce_dtype(args, SL_F32); }
static void reduce_bf16(const sl_reduce_args *args) { reduce_dtype(args, SL_BF16); }
static void reduce_f16(const sl_reduce_args *args) { reduce_dtype(args, SL_F16); }
static void reduce_f64(const sl_reduce_args *args) { reduce_dtype(args, SL_F64); }

static void reduce(const sl_reduce_args *args) {
  switch (args->dtype) {
    case SL_F32: reduce_f32(args); break;
    case SL_BF16: reduce_bf16(args); break;
    case SL_F16: reduce_f16(args); break;
    case SL_F64: reduce_f64(args); break;
    default: reduce_integers(args); break;
  }
}

#endif
