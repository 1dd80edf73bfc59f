/* Checks of sl_simulate_args: every message names the argument, its value and what was expected. */
#include "plan/schedule.h"
#include "plan/simulate.h"
#include "runtime/status.h"

static const double longest = 1e9, most_bytes = 1e18, longest_latency = 1e6, largest_share = 0.99;

/* Written so that NaN is outside. */
static bool within(double value, double low, double high) { return value >= low && value <= high; }

static sl_status check_values(const char *name, const double *values, int64_t count, double low, double high) {
  for (int64_t i = 0; i < count; ++i) {
    SL_REQUIRE(within(values[i], low, high), SL_INVALID_ARGUMENT, "%s[%lld] is %g, expected %g to %g", name,
               (long long)i, values[i], low, high);
  }
  return SL_OK;
}

static sl_status check_optional(const char *name, const double *values, int64_t count, double low, double high) {
  return values ? check_values(name, values, count, low, high) : SL_OK;
}

static sl_status check_times(const char *name, const double *values, int64_t count) {
  SL_REQUIRE(values, SL_INVALID_ARGUMENT, "%s is NULL, expected a time for each of %lld stages", name,
             (long long)count);
  return check_values(name, values, count, 0, longest);
}

static sl_status check_links(const char *name, const sl_link *links, int64_t count) {
  for (int64_t i = 0; links && i < count; ++i) {
    SL_REQUIRE(within(links[i].latency_s, 0, longest_latency), SL_INVALID_ARGUMENT,
               "%s[%lld].latency_s is %g, expected 0 to %g", name, (long long)i, links[i].latency_s, longest_latency);
    SL_REQUIRE(links[i].bytes_per_s >= 1, SL_INVALID_ARGUMENT, "%s[%lld].bytes_per_s is %g, expected at least 1", name,
               (long long)i, links[i].bytes_per_s);
  }
  return SL_OK;
}

static sl_status check_flag(const char *name, int64_t value) {
  SL_REQUIRE(value == 0 || value == 1, SL_INVALID_ARGUMENT, "%s is %lld, expected 0 or 1", name, (long long)value);
  return SL_OK;
}

sl_status sl_simulate_validate_schedule(const sl_simulate_args *args) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_REQUIRE(args->size == sizeof *args, SL_INVALID_ARGUMENT, "size is %zu, expected sizeof(sl_simulate_args), %zu",
             args->size, sizeof *args);
  return sl_schedule_validate(&args->schedule);
}

int64_t sl_simulate_count_events(const sl_simulate_args *args) {
  const sl_schedule *schedule = &args->schedule;
  int64_t stages = schedule->ranks * schedule->stages_per_rank, m = schedule->micro_batches;
  int64_t messages = stages - 1; /* between two stages, in each direction */
  if (schedule->kind == SL_SCHEDULE_ZBV) --messages;
  if (schedule->ranks == 1) messages = 0;
  int64_t work = (sl_schedule_is_split(schedule) ? 3 : 2) * stages;
  return (work + 2 * messages) * m + (args->reduce_bytes ? stages : 0);
}

static sl_status check_memory(const sl_simulate_args *args) {
  size_t needed = sl_simulate_workspace(args);
  SL_REQUIRE(needed, SL_OUT_OF_RANGE, "micro_batches is %lld, expected a workspace that can be addressed",
             (long long)args->schedule.micro_batches);
  SL_REQUIRE(args->workspace && (uintptr_t)args->workspace % sizeof(double) == 0, SL_INVALID_ARGUMENT,
             "workspace is %p, expected memory that is aligned to 8 bytes", args->workspace);
  SL_REQUIRE(args->workspace_size >= needed, SL_OUT_OF_MEMORY, "workspace_size is %zu, expected at least %zu bytes",
             args->workspace_size, needed);
  long long events = sl_simulate_count_events(args);
  SL_REQUIRE(!args->events || args->event_capacity >= events, SL_OUT_OF_MEMORY,
             "event_capacity is %lld, expected at least %lld", (long long)args->event_capacity, events);
  return SL_OK;
}

sl_status sl_simulate_validate(const sl_simulate_args *args, const sl_simulate_result *result) {
  SL_CHECK(sl_simulate_validate_schedule(args));
  SL_REQUIRE(result, SL_INVALID_ARGUMENT, "result is NULL");
  SL_REQUIRE(result->size == sizeof *result, SL_INVALID_ARGUMENT,
             "result.size is %zu, expected sizeof(sl_simulate_result), %zu", result->size, sizeof *result);
  int64_t ranks = args->schedule.ranks, stages = ranks * args->schedule.stages_per_rank;
  SL_CHECK(check_times("forward_s", args->forward_s, stages));
  SL_CHECK(check_times("backward_input_s", args->backward_input_s, stages));
  SL_CHECK(check_times("backward_weight_s", args->backward_weight_s, stages));
  SL_CHECK(check_optional("slowdowns", args->slowdowns, ranks, 1e-6, 1e6));
  SL_CHECK(check_optional("forward_bytes", args->forward_bytes, stages, 0, most_bytes));
  SL_CHECK(check_optional("backward_bytes", args->backward_bytes, stages, 0, most_bytes));
  SL_CHECK(check_optional("reduce_bytes", args->reduce_bytes, stages, 0, most_bytes));
  SL_CHECK(check_optional("activation_bytes", args->activation_bytes, stages, 0, most_bytes));
  SL_CHECK(check_optional("weight_bytes", args->weight_bytes, stages, 0, most_bytes));
  SL_CHECK(check_links("next_links", args->next_links, ranks));
  SL_CHECK(check_links("previous_links", args->previous_links, ranks));
  SL_CHECK(check_links("reduce_links", args->reduce_links, ranks));
  SL_CHECK(check_flag("shared_port", args->shared_port));
  SL_CHECK(check_flag("blocking_sends", args->blocking_sends));
  SL_REQUIRE(within(args->reduce_share, 0, largest_share), SL_INVALID_ARGUMENT, "reduce_share is %g, expected 0 to %g",
             args->reduce_share, largest_share);
  return check_memory(args);
}
