/* The order of work on a rank, by the tables of phases that ops/sluice/schedule.h gives with their sources. */
#include "plan/schedule.h"

#include "runtime/status.h"

/* A code in a pattern: the kind of work, and 4 for the second stage of a rank of the V. */
enum { F = SL_WORK_FORWARD, B = SL_WORK_BACKWARD, I = SL_WORK_BACKWARD_INPUT, W = SL_WORK_BACKWARD_WEIGHT };
enum { LANE = 4, F1 = F + LANE, I1 = I + LANE, W1 = W + LANE };

static const unsigned char forward[] = {F}, backward[] = {B}, input[] = {I}, weight[] = {W}, weight1[] = {W1};
static const unsigned char forward_backward[] = {F, B}, forward_input[] = {F, I}, all[] = {F, I, W};
static const unsigned char input_weight[] = {I, W}, inputs[] = {I, I1}, forwards[] = {F1, F}, all1[] = {F1, I1, W1};
static const unsigned char all_of_both[] = {F, I, W, F1, I1, W1}, without_forward[] = {I, W, F1, I1, W1};

#define ADD_PHASE(cursor, pattern, repeats) add_phase(cursor, pattern, sizeof(pattern), repeats)

static void add_phase(sl_schedule_cursor *cursor, const unsigned char *pattern, int64_t length, int64_t repeats) {
  sl_schedule_phase phase = {pattern, length, repeats};
  if (repeats > 0) cursor->phases[cursor->phase_count++] = phase;
}

static int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

static void plan_v(sl_schedule_cursor *cursor) {
  int64_t p = cursor->ranks, r = cursor->rank, m = cursor->micro_batches;
  int64_t n = m > 2 * p - 1 ? m : 2 * p - 1;
  ADD_PHASE(cursor, forward, 2 * (p - r) - 1);
  ADD_PHASE(cursor, forwards, r);
  ADD_PHASE(cursor, all1, p - r);
  ADD_PHASE(cursor, all_of_both, n - 2 * p + r + 1);
  ADD_PHASE(cursor, without_forward, p - r - 1);
  ADD_PHASE(cursor, inputs, r);
  ADD_PHASE(cursor, input_weight, p - r);
  ADD_PHASE(cursor, weight1, r);
  ADD_PHASE(cursor, weight, r);
}

/* Warm-up, one forward and one backward in turn, and what is left; W lags I by `lag` steps. */
static void plan_split(sl_schedule_cursor *cursor, int64_t steps, int64_t warm_up, int64_t lag) {
  int64_t steady = steps - warm_up, late = smaller(lag, steps), first = smaller(late, steady);
  ADD_PHASE(cursor, forward, warm_up);
  ADD_PHASE(cursor, forward_input, first);
  ADD_PHASE(cursor, all, steady - first);
  ADD_PHASE(cursor, input, late - first);
  ADD_PHASE(cursor, input_weight, warm_up - (late - first));
  ADD_PHASE(cursor, weight, late);
}

static void plan_whole(sl_schedule_cursor *cursor, int64_t steps, int64_t warm_up) {
  ADD_PHASE(cursor, forward, warm_up);
  ADD_PHASE(cursor, forward_backward, steps - warm_up);
  ADD_PHASE(cursor, backward, warm_up);
}

sl_schedule_cursor sl_schedule_begin(const sl_schedule *schedule, int64_t rank) {
  sl_schedule_cursor cursor = {.rank = rank,
                               .ranks = schedule->ranks,
                               .stages = schedule->ranks * schedule->stages_per_rank,
                               .chunks = schedule->stages_per_rank,
                               .micro_batches = schedule->micro_batches,
                               .group = sl_schedule_group(schedule),
                               .v_shaped = schedule->kind == SL_SCHEDULE_ZBV};
  int64_t steps = cursor.chunks * cursor.micro_batches, behind = cursor.ranks - 1 - rank;
  int64_t rounds_before = (cursor.chunks - 1) * cursor.group;
  switch ((sl_schedule_kind)schedule->kind) {
    case SL_SCHEDULE_GPIPE: plan_whole(&cursor, steps, steps); break;
    case SL_SCHEDULE_1F1B: plan_whole(&cursor, steps, smaller(steps, behind)); break;
    case SL_SCHEDULE_INTERLEAVED: plan_whole(&cursor, steps, smaller(steps, rounds_before + 2 * behind)); break;
    case SL_SCHEDULE_ZB_H1: plan_split(&cursor, steps, smaller(steps, rounds_before + behind), rank); break;
    case SL_SCHEDULE_ZBV: plan_v(&cursor); break;
  }
  return cursor;
}

/* Counts a step of one kind on, in the order that stages of a rank take turns; gives the one before. */
static sl_schedule_step take_step(sl_schedule_cursor *cursor, sl_schedule_step *step) {
  sl_schedule_step taken = *step;
  if (++step->offset == cursor->group && !cursor->v_shaped) {
    step->offset = 0;
    if (++step->chunk == cursor->chunks) step->chunk = 0, step->round += cursor->group;
  }
  return taken;
}

bool sl_schedule_next(sl_schedule_cursor *cursor, sl_work *work) {
  while (cursor->phase < cursor->phase_count) {
    const sl_schedule_phase *phase = &cursor->phases[cursor->phase];
    int code = phase->pattern[cursor->item], kind = code % LANE, lane = code / LANE;
    if (++cursor->item == phase->length) {
      cursor->item = 0;
      if (++cursor->repeat == phase->repeats) cursor->repeat = 0, ++cursor->phase;
    }
    int counter = kind == F ? 0 : kind == W ? 2 : 1;
    sl_schedule_step step = take_step(cursor, &cursor->steps[lane][counter]);
    int64_t micro_batch = step.round + step.offset;
    if (micro_batch >= cursor->micro_batches) continue; /* the V of few micro-batches is cut out of a larger one */
    int64_t chunk = kind == F ? step.chunk : cursor->chunks - 1 - step.chunk;
    int64_t stage = chunk * cursor->ranks + cursor->rank;
    if (cursor->v_shaped) stage = lane ? cursor->stages - 1 - cursor->rank : cursor->rank;
    *work = (sl_work){kind, (int32_t)cursor->rank, (int32_t)stage, (int32_t)micro_batch};
    return true;
  }
  return false;
}

bool sl_schedule_is_split(const sl_schedule *schedule) {
  return schedule->kind == SL_SCHEDULE_ZB_H1 || schedule->kind == SL_SCHEDULE_ZBV;
}

sl_status sl_schedule_work_count(const sl_schedule *schedule, int64_t *count) {
  SL_CHECK(sl_schedule_validate(schedule));
  SL_REQUIRE(count, SL_INVALID_ARGUMENT, "count is NULL, expected a place for the number");
  *count = (sl_schedule_is_split(schedule) ? 3 : 2) * schedule->stages_per_rank * schedule->micro_batches;
  return SL_OK;
}

sl_status sl_schedule_order(const sl_schedule *schedule, int64_t rank, sl_work *order) {
  SL_CHECK(sl_schedule_validate(schedule));
  SL_REQUIRE(rank >= 0 && rank < schedule->ranks, SL_OUT_OF_RANGE, "rank is %lld, expected 0 to %lld", (long long)rank,
             (long long)schedule->ranks - 1);
  SL_REQUIRE(order, SL_INVALID_ARGUMENT, "order is NULL, expected a place for the rank's work");
  sl_schedule_cursor cursor = sl_schedule_begin(schedule, rank);
  while (sl_schedule_next(&cursor, order)) ++order;
  return SL_OK;
}

sl_status sl_schedule_stage_rank(const sl_schedule *schedule, int64_t stage, int64_t *rank) {
  SL_CHECK(sl_schedule_validate(schedule));
  int64_t stages = schedule->ranks * schedule->stages_per_rank;
  SL_REQUIRE(stage >= 0 && stage < stages, SL_OUT_OF_RANGE, "stage is %lld, expected 0 to %lld", (long long)stage,
             (long long)stages - 1);
  SL_REQUIRE(rank, SL_INVALID_ARGUMENT, "rank is NULL, expected a place for the number");
  *rank = sl_schedule_rank_of(schedule, stage);
  return SL_OK;
}

const char *sl_schedule_name(int64_t kind) {
  static const char *const names[] = {"gpipe", "1f1b", "interleaved", "zb-h1", "zbv"};
  return kind >= 0 && kind < (int64_t)(sizeof names / sizeof names[0]) ? names[kind] : NULL;
}

const char *sl_work_name(int64_t kind) {
  static const char *const names[] = {"forward",      "backward",      "backward input", "backward weight",
                                      "send forward", "send backward", "reduce"};
  return kind >= 0 && kind < (int64_t)(sizeof names / sizeof names[0]) ? names[kind] : NULL;
}
