/* Which reductions exist: every message names the argument, its value and what was expected. */
#include <math.h>

#include "comm/reduce.h"
#include "runtime/status.h"

const char *sl_reduce_op_name(sl_reduce_op op) {
  switch (op) {
    case SL_REDUCE_SUM: return "sum";
    case SL_REDUCE_AVG: return "avg";
    case SL_REDUCE_PRODUCT: return "product";
    case SL_REDUCE_MIN: return "min";
    case SL_REDUCE_MAX: return "max";
    case SL_REDUCE_BAND: return "band";
    case SL_REDUCE_BOR: return "bor";
    case SL_REDUCE_BXOR: return "bxor";
    case SL_REDUCE_PREMUL_SUM: return "premul_sum";
  }
  return "unknown op";
}

static bool is_floating_point(sl_dtype dtype) {
  return dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16 || dtype == SL_F64;
}

sl_status sl_reduce_validate(sl_dtype dtype, sl_reduce_op op, double factor) {
  SL_REQUIRE(sl_dtype_size(dtype), SL_INVALID_ARGUMENT, "dtype is %d, expected one of sl_dtype, 0 to %d", (int)dtype,
             SL_BOOL);
  SL_REQUIRE((unsigned)op <= SL_REDUCE_PREMUL_SUM, SL_INVALID_ARGUMENT,
             "op is %d, expected one of sl_reduce_op, 0 to %d", (int)op, SL_REDUCE_PREMUL_SUM);
  switch (op) {
    case SL_REDUCE_BAND:
    case SL_REDUCE_BOR:
    case SL_REDUCE_BXOR:
      SL_REQUIRE(!is_floating_point(dtype), SL_UNSUPPORTED,
                 "op is %s and dtype %s, expected integers or bool for this op", sl_reduce_op_name(op),
                 sl_dtype_name(dtype));
      return SL_OK;
    case SL_REDUCE_AVG:
      SL_REQUIRE(dtype != SL_BOOL, SL_UNSUPPORTED, "op is avg and dtype bool, expected numbers for this op");
      return SL_OK;
    case SL_REDUCE_PREMUL_SUM:
      SL_REQUIRE(is_floating_point(dtype), SL_UNSUPPORTED,
                 "op is premul_sum and dtype %s, expected float32, bfloat16, float16 or float64 for this op",
                 sl_dtype_name(dtype));
      SL_REQUIRE(dtype == SL_F64 ? isfinite(factor) : isfinite((float)factor), SL_INVALID_ARGUMENT,
                 "factor is %g, expected a number that is finite in %s", factor,
                 dtype == SL_F64 ? "float64" : "float32");
      return SL_OK;
    default: return SL_OK;
  }
}
