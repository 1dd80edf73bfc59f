/* Checks of sl_channel_norms_args: every message names the argument, its value and what was expected. */
#include "prune/validate.h"

#include <stdbool.h>

#include "runtime/status.h"

static const int64_t largest_extent = INT64_C(1) << 46; /* of a weight, and of the memory that it spans, in elements */

static sl_status check_extents(const sl_channel_norms_args *args) {
  int64_t elements = 1, span = 0;
  bool empty = false;
  for (int64_t i = 0; i < args->rank; ++i) {
    SL_REQUIRE(args->sizes[i] >= 0, SL_INVALID_ARGUMENT, "sizes[%lld] is %lld, expected at least 0", (long long)i,
               (long long)args->sizes[i]);
    SL_REQUIRE(args->strides[i] >= 0, SL_INVALID_ARGUMENT, "strides[%lld] is %lld, expected at least 0", (long long)i,
               (long long)args->strides[i]);
    empty = empty || args->sizes[i] == 0;
  }
  for (int64_t i = 0; i < args->rank && !empty; ++i) {
    int64_t reach;
    bool fits = !__builtin_mul_overflow(elements, args->sizes[i], &elements) && elements <= largest_extent &&
                !__builtin_mul_overflow(args->sizes[i] - 1, args->strides[i], &reach) &&
                !__builtin_add_overflow(span, reach, &span) && span < largest_extent;
    SL_REQUIRE(fits, SL_OUT_OF_RANGE,
               "sizes[%lld] is %lld with the stride %lld, expected a weight within 2^46 elements", (long long)i,
               (long long)args->sizes[i], (long long)args->strides[i]);
  }
  SL_REQUIRE(args->weight || empty, SL_INVALID_ARGUMENT, "weight is NULL, expected %lld elements", (long long)elements);
  return SL_OK;
}

sl_status sl_channel_norms_validate(const sl_channel_norms_args *args) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_REQUIRE(args->dtype == SL_F32 || args->dtype == SL_BF16 || args->dtype == SL_F16 || args->dtype == SL_F64,
             SL_UNSUPPORTED, "weight is %s, expected float32, bfloat16, float16 or float64",
             sl_dtype_name(args->dtype));
  SL_REQUIRE(args->rank >= 1 && args->rank <= SL_PRUNE_MAX_RANK, SL_OUT_OF_RANGE, "rank is %lld, expected 1 to %d",
             (long long)args->rank, SL_PRUNE_MAX_RANK);
  SL_REQUIRE(args->dim >= 0 && args->dim < args->rank, SL_OUT_OF_RANGE, "dim is %lld, expected 0 to %lld",
             (long long)args->dim, (long long)args->rank - 1);
  SL_REQUIRE(!args->executor || (args->executor->parallel_for && args->executor->threads >= 1), SL_INVALID_ARGUMENT,
             "executor has threads = %d, expected at least 1 and a parallel_for", (int)args->executor->threads);
  SL_CHECK(check_extents(args));
  SL_REQUIRE(args->norms || args->sizes[args->dim] == 0, SL_INVALID_ARGUMENT, "norms is NULL, expected %lld elements",
             (long long)args->sizes[args->dim]);
  return SL_OK;
}
