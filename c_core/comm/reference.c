/* The reductions of comm/reduce.h in scalar C, one element after the other: the specification. */
#include <string.h>

#include "comm/reduce.h"
#include "runtime/number.h"

static const char *element(const sl_reduce_args *args, int source, size_t index) {
  return (const char *)args->in[source] + index * sl_dtype_size(args->dtype);
}

static float load_float(sl_dtype dtype, const char *from) {
  float value;
  uint16_t half;
  if (dtype == SL_F32) {
    memcpy(&value, from, sizeof value);
    return value;
  }
  memcpy(&half, from, sizeof half);
  return dtype == SL_BF16 ? sl_bf16_to_float(half) : sl_f16_to_float(half);
}

static void store_float(sl_dtype dtype, char *to, float value) {
  uint16_t half = dtype == SL_BF16 ? sl_float_to_bf16(value) : sl_float_to_f16(value);
  if (dtype == SL_F32)
    memcpy(to, &value, sizeof value);
  else
    memcpy(to, &half, sizeof half);
}

static float fold_float(sl_reduce_op op, float sum, float x) {
  switch (op) {
    case SL_REDUCE_PRODUCT: return sum * x;
    case SL_REDUCE_MIN: return x != x ? x : x < sum ? x : sum;
    case SL_REDUCE_MAX: return x != x ? x : x > sum ? x : sum;
    default: return sum + x;
  }
}

static void reduce_float(const sl_reduce_args *args, size_t index) {
  float sum = 0;
  for (int source = 0; source < args->sources; ++source) {
    float x = load_float(args->dtype, element(args, source, index));
    if (args->op == SL_REDUCE_PREMUL_SUM) x *= (float)args->factor;
    sum = source ? fold_float(args->op, sum, x) : x;
  }
  if (args->op == SL_REDUCE_AVG) sum /= (float)args->sources;
  store_float(args->dtype, (char *)args->out + index * sl_dtype_size(args->dtype), sum);
}

static double fold_double(sl_reduce_op op, double sum, double x) {
  switch (op) {
    case SL_REDUCE_PRODUCT: return sum * x;
    case SL_REDUCE_MIN: return x != x ? x : x < sum ? x : sum;
    case SL_REDUCE_MAX: return x != x ? x : x > sum ? x : sum;
    default: return sum + x;
  }
}

static void reduce_double(const sl_reduce_args *args, size_t index) {
  double sum = 0;
  for (int source = 0; source < args->sources; ++source) {
    double x;
    memcpy(&x, element(args, source, index), sizeof x);
    if (args->op == SL_REDUCE_PREMUL_SUM) x *= args->factor;
    sum = source ? fold_double(args->op, sum, x) : x;
  }
  if (args->op == SL_REDUCE_AVG) sum /= args->sources;
  memcpy((char *)args->out + index * sizeof sum, &sum, sizeof sum);
}

/* Of 64 bits, whatever the dtype: sums and products of narrower integers are right in their low bits. */
static int64_t wrap(sl_dtype dtype, uint64_t value) {
  switch (dtype) {
    case SL_I8: return (int8_t)value;
    case SL_U8: return (uint8_t)value;
    case SL_I16: return (int16_t)value;
    case SL_I32: return (int32_t)value;
    case SL_BOOL: return value != 0;
    default: return (int64_t)value;
  }
}

static int64_t load_integer(const sl_reduce_args *args, int source, size_t index) {
  const unsigned char *from = (const unsigned char *)element(args, source, index);
  uint64_t value = 0;
  switch (
      sl_dtype_size(args->dtype)) { /* copied into a number of its size, so that the order of bytes doesn't matter */
    case 1: value = *from; break;
    case 2: {
      uint16_t narrow;
      memcpy(&narrow, from, sizeof narrow);
      value = narrow;
      break;
    }
    case 4: {
      uint32_t narrow;
      memcpy(&narrow, from, sizeof narrow);
      value = narrow;
      break;
    }
    default: memcpy(&value, from, sizeof value); break;
  }
  return wrap(args->dtype, value);
}

static void store_integer(const sl_reduce_args *args, size_t index, int64_t value) {
  size_t size = sl_dtype_size(args->dtype);
  uint8_t of1 = (uint8_t)value;
  uint16_t of2 = (uint16_t)value;
  uint32_t of4 = (uint32_t)value;
  const void *from = size == 1   ? (const void *)&of1
                     : size == 2 ? (const void *)&of2
                     : size == 4 ? &of4
                                 : (void *)&value;
  memcpy((char *)args->out + index * size, from, size);
}

static int64_t fold_integer(sl_reduce_op op, int64_t sum, int64_t x) {
  switch (op) {
    case SL_REDUCE_PRODUCT: return (int64_t)((uint64_t)sum * (uint64_t)x);
    case SL_REDUCE_MIN: return x < sum ? x : sum;
    case SL_REDUCE_MAX: return x > sum ? x : sum;
    case SL_REDUCE_BAND: return sum & x;
    case SL_REDUCE_BOR: return sum | x;
    case SL_REDUCE_BXOR: return sum ^ x;
    default: return (int64_t)((uint64_t)sum + (uint64_t)x);
  }
}

static void reduce_integer(const sl_reduce_args *args, size_t index) {
  int64_t sum = load_integer(args, 0, index);
  for (int source = 1; source < args->sources; ++source) {
    sum = wrap(args->dtype, (uint64_t)fold_integer(args->op, sum, load_integer(args, source, index)));
  }
  if (args->op == SL_REDUCE_AVG) sum /= args->sources;
  store_integer(args, index, sum);
}

void sl_reduce_reference(const sl_reduce_args *args) {
  for (size_t i = 0; i < args->count; ++i) {
    switch (args->dtype) {
      case SL_F32:
      case SL_BF16:
      case SL_F16: reduce_float(args, i); break;
      case SL_F64: reduce_double(args, i); break;
      default: reduce_integer(args, i); break;
    }
  }
}
