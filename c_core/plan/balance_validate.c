/* Checks of sl_cut_args and sl_share_args: every message names the argument, its value and what was expected. */
#include <math.h>
#include <stdbool.h>

#include "plan/balance.h"
#include "runtime/status.h"

static const double longest = 1e9, most_bytes = 1e18;

/* Written so that NaN is outside. */
static bool within(double value, double low, double high) { return value >= low && value <= high; }

static sl_status check_values(const char *name, const double *values, int64_t count, double low, double high) {
  for (int64_t i = 0; values && i < count; ++i) {
    SL_REQUIRE(within(values[i], low, high), SL_INVALID_ARGUMENT, "%s[%lld] is %g, expected %g to %g", name,
               (long long)i, values[i], low, high);
  }
  return SL_OK;
}

static sl_status check_count(const char *name, int64_t value, int64_t low, int64_t high) {
  SL_REQUIRE(value >= low && value <= high, SL_OUT_OF_RANGE, "%s is %lld, expected %lld to %lld", name,
             (long long)value, (long long)low, (long long)high);
  return SL_OK;
}

sl_status sl_cut_validate_sizes(const sl_cut_args *args) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_REQUIRE(args->size == sizeof *args, SL_INVALID_ARGUMENT, "size is %zu, expected sizeof(sl_cut_args), %zu",
             args->size, sizeof *args);
  SL_CHECK(check_count("layers", args->layers, 1, INT64_C(1) << 14));
  return check_count("stages", args->stages, 1, INT64_C(1) << 12);
}

sl_status sl_cut_validate(const sl_cut_args *args, const sl_cut_result *result) {
  SL_CHECK(sl_cut_validate_sizes(args));
  SL_REQUIRE(result, SL_INVALID_ARGUMENT, "result is NULL");
  SL_REQUIRE(result->size == sizeof *result, SL_INVALID_ARGUMENT,
             "result.size is %zu, expected sizeof(sl_cut_result), %zu", result->size, sizeof *result);
  int64_t layers = args->layers, stages = args->stages;
  SL_REQUIRE(args->least_layers >= 0, SL_OUT_OF_RANGE, "least_layers is %lld, expected at least 0",
             (long long)args->least_layers);
  SL_REQUIRE(args->least_layers <= layers / stages, SL_OUT_OF_RANGE,
             "least_layers is %lld, expected at most %lld: there are %lld layers for %lld stages",
             (long long)args->least_layers, (long long)(layers / stages), (long long)layers, (long long)stages);
  SL_REQUIRE(args->bottleneck_weight >= 0, SL_INVALID_ARGUMENT, "bottleneck_weight is %g, expected at least 0",
             args->bottleneck_weight);
  SL_REQUIRE(args->layer_s, SL_INVALID_ARGUMENT, "layer_s is NULL, expected a time for each of %lld layers",
             (long long)layers);
  SL_REQUIRE(args->first, SL_INVALID_ARGUMENT, "first is NULL, expected room for %lld numbers", (long long)stages + 1);
  SL_CHECK(check_values("layer_s", args->layer_s, layers, 0, longest));
  SL_CHECK(check_values("factors", args->factors, stages, 1e-6, 1e6));
  SL_CHECK(check_values("extra_s", args->extra_s, stages, 0, longest));
  SL_CHECK(check_values("layer_bytes", args->layer_bytes, layers, 0, most_bytes));
  SL_CHECK(check_values("kept_bytes", args->kept_bytes, layers, 0, most_bytes));
  SL_CHECK(check_values("kept", args->kept, stages, 0, 1e9));
  SL_CHECK(check_values("extra_bytes", args->extra_bytes, stages, 0, most_bytes));
  SL_CHECK(check_values("limits", args->limits, stages, 0, INFINITY));
  SL_REQUIRE(args->workspace && (uintptr_t)args->workspace % sizeof(double) == 0, SL_INVALID_ARGUMENT,
             "workspace is %p, expected memory that is aligned to 8 bytes", args->workspace);
  return SL_OK;
}

/* Whether the shares can add up. */
static sl_status check_shares(const sl_share_args *args) {
  int64_t room = 0;
  SL_REQUIRE(args->least >= 0 && args->least <= args->micro_batches / args->ranks, SL_OUT_OF_RANGE,
             "least is %lld, expected 0 to %lld: there are %lld micro-batches for %lld ranks", (long long)args->least,
             (long long)(args->micro_batches / args->ranks), (long long)args->micro_batches, (long long)args->ranks);
  for (int64_t r = 0; args->most && r < args->ranks; ++r) {
    SL_REQUIRE(args->most[r] >= args->least, SL_OUT_OF_RANGE, "most[%lld] is %lld, expected at least %lld",
               (long long)r, (long long)args->most[r], (long long)args->least);
    room += args->most[r] < args->micro_batches ? args->most[r] : args->micro_batches;
  }
  SL_REQUIRE(!args->most || room >= args->micro_batches, SL_OUT_OF_RANGE,
             "most leaves room for %lld micro-batches, expected %lld", (long long)room, (long long)args->micro_batches);
  return SL_OK;
}

sl_status sl_share_validate(const sl_share_args *args, const double *max_s) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_REQUIRE(args->size == sizeof *args, SL_INVALID_ARGUMENT, "size is %zu, expected sizeof(sl_share_args), %zu",
             args->size, sizeof *args);
  SL_CHECK(check_count("ranks", args->ranks, 1, INT64_C(1) << 14));
  SL_CHECK(check_count("micro_batches", args->micro_batches, 0, INT64_C(1) << 30));
  SL_CHECK(check_shares(args));
  SL_REQUIRE(args->micro_batch_s, SL_INVALID_ARGUMENT, "micro_batch_s is NULL, expected a time for each of %lld ranks",
             (long long)args->ranks);
  SL_REQUIRE(args->shares && max_s, SL_INVALID_ARGUMENT, "%s is NULL, expected a place for the answer",
             args->shares ? "max_s" : "shares");
  SL_CHECK(check_values("micro_batch_s", args->micro_batch_s, args->ranks, 1e-12, longest));
  return check_values("fixed_s", args->fixed_s, args->ranks, 0, longest);
}
