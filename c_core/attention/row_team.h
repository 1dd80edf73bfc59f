/* A team: a few query rows of one key head, and a segment of keys that they read together where it lies. Each key that
 * any row keeps is read once, in order of position. */
#ifndef SL_ATTENTION_ROW_TEAM_H
#define SL_ATTENTION_ROW_TEAM_H

#include "attention/plan.h"
#include "runtime/arena.h"

/* Keys of a segment, and of a step of it. The teams of a task take turns of one or several steps. */
enum { SL_TEAM_SEGMENT = 1024, SL_TEAM_STEP = 16, SL_TEAM_STEPS = SL_TEAM_SEGMENT / SL_TEAM_STEP };

/* A query row: everything below is of one (batch, head, query). */
typedef struct sl_team_row {
  int64_t head;
  int32_t query, position;
  int64_t lowest, highest; /* the positions that it may see */
  float a, logit_tau;
} sl_team_row;

typedef struct sl_row_team {
  int64_t batch, head_kv, count;
  sl_team_row rows[SL_ATTENTION_TEAM];
  float *queries; /* [count][row_stride], times plan->factor */
  /* The keys of the segment that any row keeps, in order: */
  int64_t kept;
  int32_t step_start[SL_TEAM_STEPS + 1]; /* those of step s are [step_start[s], step_start[s + 1]) */
  int32_t *key, *token_row;              /* [stride] */
  int64_t stride;
  float *logits; /* [count][stride]: as sl_weigh_row has them */
  float *mask;   /* [count][stride], or NULL */
  float *scores; /* [count][stride] */
} sl_row_team;

/* Takes the memory of a team of up to `rows` rows. */
void sl_row_team_take(sl_row_team *team, sl_arena *arena, const sl_attention_plan *plan, int64_t rows);

/* Takes in the rows [first, first + count) of a key head: row i is query i % n_q of its query head i / n_q. */
void sl_row_team_load(sl_row_team *team, const sl_attention_plan *plan, int64_t batch, int64_t head_kv, int64_t first,
                      int64_t count);

/* Lists the keys of [begin, end), at most a segment, that a row keeps. */
void sl_row_team_list(sl_row_team *team, const sl_attention_plan *plan, int64_t begin, int64_t end);

/* How many keys of the segment row r keeps. */
int32_t sl_row_team_count(const sl_row_team *team, int64_t r);

/* The steps [step, step + steps): the products, and after those of all steps the softmax and the values, which are
 * added to out, in order. maximum and sum [count] are those of the segment. Bits do not depend on how many steps a turn
 * has. */
void sl_row_team_multiply(sl_row_team *team, const sl_attention_plan *plan, int64_t step, int64_t steps);
void sl_row_team_weigh(sl_row_team *team, const sl_attention_plan *plan, float *maximum, float *sum);
void sl_row_team_add_values(const sl_row_team *team, const sl_attention_plan *plan, int64_t step, int64_t steps,
                            float *out, int64_t out_stride);

#endif
