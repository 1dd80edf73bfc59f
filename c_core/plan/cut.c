/* Cuts layers into stages by dynamic programming, as ops/sluice/balance.h describes. */
#include <math.h>
#include <stdbool.h>

#include "plan/balance.h"
#include "runtime/arena.h"
#include "runtime/status.h"

typedef struct cut {
  const sl_cut_args *args;
  double *time, *bytes, *kept; /* [layers + 1] sums over the layers before */
  double *sums;                /* [stages + 1, layers + 1] smallest sum of the first stages over the first layers */
  double *maxima;              /* [stages + 1, layers + 1] the longest of these stages, as short as that sum allows */
  int32_t *from;               /* [stages + 1, layers + 1] where the last of these stages then begins */
  int64_t *best;               /* [stages + 1] the cut that is looked at */
} cut;

static cut take_workspace(const sl_cut_args *args, sl_arena *arena) {
  int64_t row = args->layers + 1, cells = (args->stages + 1) * row;
  return (cut){.args = args,
               .time = sl_arena_take(arena, row, sizeof(double)),
               .bytes = sl_arena_take(arena, row, sizeof(double)),
               .kept = sl_arena_take(arena, row, sizeof(double)),
               .sums = sl_arena_take(arena, cells, sizeof(double)),
               .maxima = sl_arena_take(arena, cells, sizeof(double)),
               .from = sl_arena_take(arena, cells, sizeof(int32_t)),
               .best = sl_arena_take(arena, args->stages + 1, sizeof(int64_t))};
}

static double value_or(const double *values, int64_t index, double otherwise) {
  return values ? values[index] : otherwise;
}

static void sum_up(const double *values, int64_t count, double *sums) {
  sums[0] = 0;
  for (int64_t i = 0; i < count; ++i) sums[i + 1] = sums[i] + value_or(values, i, 0);
}

static double stage_time(const cut *c, int64_t stage, int64_t first, int64_t end) {
  const sl_cut_args *args = c->args;
  return value_or(args->factors, stage, 1) * (c->time[end] - c->time[first]) + value_or(args->extra_s, stage, 0);
}

static double stage_bytes(const cut *c, int64_t stage, int64_t first, int64_t end) {
  const sl_cut_args *args = c->args;
  return c->bytes[end] - c->bytes[first] + value_or(args->kept, stage, 1) * (c->kept[end] - c->kept[first]) +
         value_or(args->extra_bytes, stage, 0);
}

/* The shortest time that the longest stage can have; infinity if nothing fits. Uses the table of maxima. */
static double find_shortest(const cut *c) {
  const sl_cut_args *args = c->args;
  int64_t row = args->layers + 1;
  for (int64_t j = 0; j < row; ++j) c->maxima[j] = j ? INFINITY : 0;
  for (int64_t s = 0; s < args->stages; ++s) {
    const double *before = c->maxima + s * row;
    double limit = value_or(args->limits, s, INFINITY);
    for (int64_t end = 0; end < row; ++end) {
      double shortest = INFINITY;
      for (int64_t first = end - args->least_layers; first >= 0; --first) {
        double time = stage_time(c, s, first, end);
        if (time >= shortest || stage_bytes(c, s, first, end) > limit) break; /* both grow with the layers */
        shortest = fmin(shortest, fmax(before[first], time));
      }
      c->maxima[(s + 1) * row + end] = shortest;
    }
  }
  return c->maxima[args->stages * row + args->layers];
}

/* Whether a sum is smaller; sums that differ by rounding are equal, and then the maxima count. */
static bool is_better(double sum, double longest, double best_sum, double best_longest) {
  double rounding = 1e-13 * best_sum;
  return isinf(best_sum) || sum < best_sum - rounding || (sum <= best_sum + rounding && longest < best_longest);
}

/* Fills the tables under a bound that no stage's time may reach; the smallest sum, or infinity. */
static double find_smallest_sum(const cut *c, double bound) {
  const sl_cut_args *args = c->args;
  int64_t row = args->layers + 1;
  for (int64_t j = 0; j < row; ++j) c->sums[j] = j ? INFINITY : 0, c->maxima[j] = 0;
  for (int64_t s = 0; s < args->stages; ++s) {
    const double *before = c->sums + s * row, *maxima = c->maxima + s * row;
    double limit = value_or(args->limits, s, INFINITY);
    for (int64_t end = 0; end < row; ++end) {
      double smallest = INFINITY, shortest = INFINITY;
      int64_t from = -1;
      for (int64_t first = end - args->least_layers; first >= 0; --first) {
        double time = stage_time(c, s, first, end);
        if (!(time < bound) || stage_bytes(c, s, first, end) > limit) break; /* both grow with the layers */
        if (isinf(before[first])) continue;
        double sum = before[first] + time, longest = fmax(maxima[first], time);
        if (is_better(sum, longest, smallest, shortest)) smallest = sum, shortest = longest, from = first;
      }
      int64_t cell = (s + 1) * row + end;
      c->sums[cell] = smallest, c->maxima[cell] = shortest, c->from[cell] = (int32_t)from;
    }
  }
  return c->sums[args->stages * row + args->layers];
}

/* Reads the cut out of the tables; the time of its longest stage. */
static double read_cut(const cut *c, int64_t *first) {
  const sl_cut_args *args = c->args;
  double longest = 0;
  first[args->stages] = args->layers;
  for (int64_t s = args->stages; s > 0; --s) {
    first[s - 1] = c->from[s * (args->layers + 1) + first[s]];
    longest = fmax(longest, stage_time(c, s - 1, first[s - 1], first[s]));
  }
  return longest;
}

/* The most layers, from the first on, that fit under the limits; -1 if not even the fewest do. */
static int64_t count_fitting(const cut *c) {
  const double *last = c->sums + c->args->stages * (c->args->layers + 1);
  int64_t most = c->args->layers;
  while (most >= 0 && isinf(last[most])) --most;
  return most;
}

static sl_status refuse(const cut *c) {
  find_smallest_sum(c, INFINITY);
  long long most = count_fitting(c);
  SL_REQUIRE(most >= 0, SL_OUT_OF_RANGE,
             "limits are too small for %lld layers on each of %lld stages, expected room for them",
             (long long)c->args->least_layers, (long long)c->args->stages);
  return sl_fail(SL_OUT_OF_RANGE, "limits leave room for the first %lld of %lld layers, expected room for all", most,
                 (long long)c->args->layers);
}

static sl_status search(const cut *c, sl_cut_result *result) {
  const sl_cut_args *args = c->args;
  double weight = args->bottleneck_weight, shortest = find_shortest(c);
  if (isinf(shortest)) return refuse(c);
  double least_sum = find_smallest_sum(c, INFINITY);
  double sum = find_smallest_sum(c, nextafter(shortest, INFINITY));
  result->max_s = read_cut(c, args->first), result->sum_s = sum, result->rounds = 3;
  if (isinf(weight) || sum <= least_sum) return SL_OK;
  /* A better cut has a longer stage, which even with the least sum of all may not be longer than this. */
  double bound = weight > 0 ? shortest + (sum - least_sum) / weight : INFINITY, best = weight * shortest + sum;
  while (bound > shortest) {
    sum = find_smallest_sum(c, bound);
    ++result->rounds;
    if (weight * shortest + sum >= best) break; /* sums only grow while the bound goes down */
    bound = read_cut(c, c->best);
    if (weight * bound + sum < best) {
      best = weight * bound + sum, result->max_s = bound, result->sum_s = sum;
      for (int64_t s = 0; s <= args->stages; ++s) args->first[s] = c->best[s];
    }
  }
  return SL_OK;
}

sl_status sl_cut_layers_workspace_size(const sl_cut_args *args, size_t *workspace_size) {
  SL_CHECK(sl_cut_validate_sizes(args));
  SL_REQUIRE(workspace_size, SL_INVALID_ARGUMENT, "workspace_size is NULL, expected a place for the number");
  sl_arena arena = sl_arena_make(NULL, 0);
  take_workspace(args, &arena);
  *workspace_size = arena.used;
  return SL_OK;
}

sl_status sl_cut_layers(const sl_cut_args *args, sl_cut_result *result) {
  SL_CHECK(sl_cut_validate(args, result));
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  cut c = take_workspace(args, &arena);
  SL_REQUIRE(arena.used <= args->workspace_size, SL_OUT_OF_MEMORY, "workspace_size is %zu, expected at least %zu bytes",
             args->workspace_size, arena.used);
  sum_up(args->layer_s, args->layers, c.time);
  sum_up(args->layer_bytes, args->layers, c.bytes);
  sum_up(args->kept_bytes, args->layers, c.kept);
  return search(&c, result);
}
