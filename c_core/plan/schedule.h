/* Walks through the order of one rank, piece by piece, in memory that doesn't grow with the micro-batches. */
#ifndef SL_PLAN_SCHEDULE_H
#define SL_PLAN_SCHEDULE_H

#include <sluice/schedule.h>

#include <stdbool.h>

enum { SL_SCHEDULE_MOST_PHASES = 9 };

/* A pattern of codes, see schedule.c, that is repeated. */
typedef struct sl_schedule_phase {
  const unsigned char *pattern;
  int64_t length, repeats;
} sl_schedule_phase;

/* The next step of one kind of work: micro-batch round + offset of chunk `chunk`, counted in the kind's own order. */
typedef struct sl_schedule_step {
  int64_t offset, chunk, round;
} sl_schedule_step;

typedef struct sl_schedule_cursor {
  int64_t rank, ranks, stages, chunks, micro_batches;
  int64_t group; /* micro-batches that a chunk takes before it is the next one's turn */
  bool v_shaped;
  int phase, phase_count;
  int64_t item, repeat;
  sl_schedule_step steps[2][3]; /* by lane of the V, and forward, backward, weight */
  sl_schedule_phase phases[SL_SCHEDULE_MOST_PHASES];
} sl_schedule_cursor;

/* Of a schedule that sl_schedule_validate() has accepted. */
sl_schedule_cursor sl_schedule_begin(const sl_schedule *schedule, int64_t rank);

/* False when the rank has done all. */
bool sl_schedule_next(sl_schedule_cursor *cursor, sl_work *work);

/* Micro-batches that a stage takes in a row. */
int64_t sl_schedule_group(const sl_schedule *schedule);

bool sl_schedule_is_split(const sl_schedule *schedule);

sl_status sl_schedule_validate(const sl_schedule *schedule);

static inline int64_t sl_schedule_rank_of(const sl_schedule *schedule, int64_t stage) {
  int64_t ranks = schedule->ranks;
  if (schedule->kind == SL_SCHEDULE_ZBV) return stage < ranks ? stage : 2 * ranks - 1 - stage;
  return stage % ranks;
}

#endif
