/* Checks of sl_accumulate_args: every message names the argument, its value and what was expected. */
#include "accumulate/validate.h"

#include <math.h>

#include "runtime/status.h"

static const int64_t largest_count = INT64_C(1) << 46;

sl_status sl_accumulate_validate_count(int64_t count) {
  SL_REQUIRE(count >= 0, SL_INVALID_ARGUMENT, "count is %lld, expected at least 0", (long long)count);
  SL_REQUIRE(count <= largest_count, SL_OUT_OF_RANGE, "count is %lld, expected at most 2^46", (long long)count);
  return SL_OK;
}

static sl_status check_array(const char *name, const void *data, int64_t count) {
  SL_REQUIRE(data || count == 0, SL_INVALID_ARGUMENT, "%s is NULL, expected %lld elements", name, (long long)count);
  return SL_OK;
}

static sl_status check_values(const char *name, sl_dtype dtype, const void *data, int64_t count) {
  SL_REQUIRE(dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16, SL_UNSUPPORTED,
             "%s is %s, expected float32, bfloat16 or float16", name, sl_dtype_name(dtype));
  return check_array(name, data, count);
}

static sl_status check_scale(const char *name, double scale) {
  SL_REQUIRE(isfinite((float)scale), SL_INVALID_ARGUMENT, "%s is %g, expected a number that is finite in float32", name,
             scale);
  return SL_OK;
}

static sl_status check_accumulator(const sl_accumulate_args *args) {
  SL_REQUIRE(args->dtype == SL_F32 || args->dtype == SL_F16, SL_UNSUPPORTED,
             "accumulator is %s, expected float32 or float16", sl_dtype_name(args->dtype));
  SL_CHECK(check_array("accumulator", args->accumulator, args->count));
  if (args->dtype == SL_F16) return check_array("exponents", args->exponents, sl_count_blocks(args->count));
  SL_REQUIRE(!args->exponents, SL_INVALID_ARGUMENT,
             "exponents are given with a float32 accumulator, expected NULL: only float16 is scaled");
  return SL_OK;
}

sl_status sl_accumulate_validate(const sl_accumulate_args *args, sl_accumulate_operation operation) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(sl_accumulate_validate_count(args->count));
  SL_REQUIRE(!args->executor || (args->executor->parallel_for && args->executor->threads >= 1), SL_INVALID_ARGUMENT,
             "executor has threads = %d, expected at least 1 and a parallel_for", (int)args->executor->threads);
  if (operation != SL_READ) SL_CHECK(check_values("grad", args->grad_dtype, args->grad, args->count));
  if (operation != SL_MEASURE) SL_CHECK(check_accumulator(args));
  if (operation == SL_ACCUMULATE) return check_scale("grad_scale", args->grad_scale);
  if (operation == SL_MEASURE) return SL_OK;
  SL_CHECK(check_scale("scale", args->scale));
  return check_values("out", args->out_dtype, args->out, args->count);
}
