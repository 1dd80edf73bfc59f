/* Checks of sl_schedule: every message names the argument, its value and what was expected. */
#include "plan/schedule.h"
#include "runtime/status.h"

static const int64_t most_ranks = INT64_C(1) << 16, most_chunks = INT64_C(1) << 10;
static const int64_t most_micro_batches = INT64_C(1) << 20, most_pieces = INT64_C(1) << 31;

static int64_t rounds_of(const sl_schedule *schedule) {
  int64_t rounds = schedule->micro_batches / schedule->ranks;
  return rounds ? rounds : 1;
}

int64_t sl_schedule_group(const sl_schedule *schedule) {
  return schedule->stages_per_rank == 1 ? schedule->micro_batches : schedule->micro_batches / rounds_of(schedule);
}

/* Stages of a rank take turns: that needs rounds of one length. */
static sl_status check_rounds(const sl_schedule *schedule) {
  int64_t rounds = rounds_of(schedule), rest = schedule->micro_batches % rounds;
  SL_REQUIRE(rest == 0, SL_INVALID_ARGUMENT,
             "micro_batches is %lld, expected a number that divides into %lld rounds over %lld ranks, such as %lld or "
             "%lld",
             (long long)schedule->micro_batches, (long long)rounds, (long long)schedule->ranks,
             (long long)(rounds * schedule->ranks), (long long)((rounds + 1) * schedule->ranks));
  return SL_OK;
}

static sl_status check_chunks(const sl_schedule *schedule) {
  long long chunks = schedule->stages_per_rank;
  const char *name = sl_schedule_name(schedule->kind);
  switch ((sl_schedule_kind)schedule->kind) {
    case SL_SCHEDULE_GPIPE:
    case SL_SCHEDULE_1F1B:
      SL_REQUIRE(chunks == 1, SL_INVALID_ARGUMENT, "stages_per_rank is %lld, expected 1 with the schedule %s", chunks,
                 name);
      return SL_OK;
    case SL_SCHEDULE_INTERLEAVED:
      SL_REQUIRE(chunks >= 2, SL_INVALID_ARGUMENT,
                 "stages_per_rank is %lld, expected at least 2 with the schedule %s; with 1 it is the schedule 1f1b",
                 chunks, name);
      return check_rounds(schedule);
    case SL_SCHEDULE_ZBV:
      SL_REQUIRE(chunks == 2, SL_INVALID_ARGUMENT, "stages_per_rank is %lld, expected 2 with the schedule %s", chunks,
                 name);
      return SL_OK;
    case SL_SCHEDULE_ZB_H1: break;
  }
  return chunks == 1 ? SL_OK : check_rounds(schedule);
}

sl_status sl_schedule_validate(const sl_schedule *schedule) {
  SL_REQUIRE(schedule, SL_INVALID_ARGUMENT, "schedule is NULL");
  SL_REQUIRE(sl_schedule_name(schedule->kind), SL_INVALID_ARGUMENT,
             "kind is %lld, expected 0 (gpipe), 1 (1f1b), 2 (interleaved), 3 (zb-h1) or 4 (zbv)",
             (long long)schedule->kind);
  SL_REQUIRE(schedule->ranks >= 1 && schedule->ranks <= most_ranks, SL_OUT_OF_RANGE,
             "ranks is %lld, expected 1 to %lld", (long long)schedule->ranks, (long long)most_ranks);
  SL_REQUIRE(schedule->stages_per_rank >= 1 && schedule->stages_per_rank <= most_chunks, SL_OUT_OF_RANGE,
             "stages_per_rank is %lld, expected 1 to %lld", (long long)schedule->stages_per_rank,
             (long long)most_chunks);
  SL_REQUIRE(schedule->micro_batches >= 1 && schedule->micro_batches <= most_micro_batches, SL_OUT_OF_RANGE,
             "micro_batches is %lld, expected 1 to %lld", (long long)schedule->micro_batches,
             (long long)most_micro_batches);
  int64_t pieces = schedule->ranks * schedule->stages_per_rank * schedule->micro_batches; /* at most 2^46 */
  SL_REQUIRE(pieces <= most_pieces, SL_OUT_OF_RANGE,
             "micro_batches is %lld with %lld stages, expected at most %lld pieces of work of a kind",
             (long long)schedule->micro_batches, (long long)(schedule->ranks * schedule->stages_per_rank),
             (long long)most_pieces);
  return check_chunks(schedule);
}
