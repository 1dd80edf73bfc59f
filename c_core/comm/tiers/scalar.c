/* The tier that every machine has: plain C, also for floating point. */
#include "comm/tiers/plain.h"

#define NAME(x) x##_f32
#define ELEMENT float
#define SUM float
#define WIDEN(x) (x)
#define NARROW(x) (x)
#include "comm/tiers/plain_floats.h"

#define NAME(x) x##_f64
#define ELEMENT double
#define SUM double
#define WIDEN(x) (x)
#define NARROW(x) (x)
#include "comm/tiers/plain_floats.h"

#define NAME(x) x##_bf16
#define ELEMENT uint16_t
#define SUM float
#define WIDEN(x) sl_bf16_to_float(x)
#define NARROW(x) sl_float_to_bf16(x)
#include "comm/tiers/plain_floats.h"

#define NAME(x) x##_f16
#define ELEMENT uint16_t
#define SUM float
#define WIDEN(x) sl_f16_to_float(x)
#define NARROW(x) sl_float_to_f16(x)
#include "comm/tiers/plain_floats.h"

static void reduce(const sl_reduce_args *args) {
  switch (args->dtype) {
    case SL_F32: reduce_f32(args); break;
    case SL_F64: reduce_f64(args); break;
    case SL_BF16: reduce_bf16(args); break;
    case SL_F16: reduce_f16(args); break;
    default: reduce_integers(args); break;
  }
}

static void copy(void *out, const void *in, size_t bytes) { memcpy(out, in, bytes); }

const sl_reduce_kernel sl_reduce_scalar = {"scalar", SL_ISA_SCALAR, reduce, copy};
