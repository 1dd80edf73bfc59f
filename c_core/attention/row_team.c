/* What a team keeps of a segment, and its softmax over that. */
#include "attention/row_team.h"

#include <math.h>
#include <string.h>

#include "attention/dropout.h"
#include "attention/key_rows.h"
#include "attention/score_bend.h"

enum { PIECE = 128, STEP = SL_TEAM_STEP, TEAM = SL_ATTENTION_TEAM }; /* a piece: keys that are looked at together */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

void sl_row_team_take(sl_row_team *team, sl_arena *arena, const sl_attention_plan *plan, int64_t rows) {
  *team = (sl_row_team){.count = 0};
  team->stride = sl_round_up(smaller(plan->args->n_k, SL_TEAM_SEGMENT), SL_ATTENTION_STRIDE);
  team->queries = sl_arena_take(arena, rows * plan->row_stride, sizeof(float));
  team->key = sl_arena_take(arena, team->stride, sizeof(int32_t));
  team->token_row = sl_arena_take(arena, team->stride, sizeof(int32_t));
  team->logits = sl_arena_take(arena, rows * team->stride, sizeof(float));
  team->scores = sl_arena_take(arena, rows * team->stride, sizeof(float));
  if (plan->args->attn_mask.data) team->mask = sl_arena_take(arena, rows * team->stride, sizeof(float));
}

void sl_row_team_load(sl_row_team *team, const sl_attention_plan *plan, int64_t batch, int64_t head_kv, int64_t first,
                      int64_t count) {
  const sl_gated_attention_args *args = plan->args;
  int64_t sliding = args->sliding_window > 0 ? smaller(args->sliding_window, INT32_MAX) : INT64_MAX / 2;
  team->batch = batch;
  team->head_kv = head_kv;
  team->count = count;
  memset(team->queries, 0, (size_t)(count * plan->row_stride) * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    sl_team_row *row = team->rows + r;
    row->head = head_kv * plan->group + (first + r) / args->n_q;
    row->query = (int32_t)((first + r) % args->n_q);
    row->position = (int32_t)(row->query + sl_attention_q_offset(args, batch));
    row->lowest = row->position - sliding + 1;
    row->highest = args->causal ? row->position : row->position + sliding - 1;
    row->a = sl_attention_clamp_logit(*sl_attention_at3(&args->a, batch, row->head, row->query));
    row->logit_tau = sl_attention_logit_tau(args, batch, row->head);
    sl_token_rows q = sl_attention_token_rows(args, &args->q, batch, row->head, args->head_dim);
    sl_attention_add_row(plan->kernel, team->queries + r * plan->row_stride, plan->factor, &q, row->query);
  }
}

/* The keys of a piece, from `key` on. */
typedef struct key_piece {
  int64_t key, count;
  int32_t token_row[PIECE]; /* below 0 in a hole */
  bool has_holes;
  float b[PIECE]; /* clamped */
  float logits[TEAM][PIECE], mask[TEAM][PIECE];
} key_piece;

/* logits[i] = value for the keys from first up to end. */
static void fill_logits(const key_piece *piece, float *logits, int64_t first, int64_t end, float value) {
  end = smaller(end - piece->key, piece->count);
  for (int64_t i = larger(first - piece->key, 0); i < end; ++i) logits[i] = value;
}

/* The logits of a row: inf for near pairs, -inf for those that are dropped. */
static void fill_row(key_piece *piece, const sl_row_team *team, const sl_attention_plan *plan, int64_t sinks,
                     int64_t r) {
  const sl_gated_attention_args *args = plan->args;
  const sl_team_row *row = team->rows + r;
  float *restrict logits = piece->logits[r], a = row->a, tau = row->logit_tau;
  for (int64_t i = 0; i < piece->count; ++i) {
    float z = a + piece->b[i];
    logits[i] = z < tau ? -INFINITY : z;
  }
  int64_t self = row->position - piece->key;
  if (args->causal && self >= 0 && self < piece->count) logits[self] = a + piece->b[self];
  int64_t window = smaller(args->window, INT32_MAX);
  if (window > 0) fill_logits(piece, logits, row->position - window + 1, row->position + window, INFINITY);
  fill_logits(piece, logits, piece->key, sinks, INFINITY);
  fill_logits(piece, logits, piece->key, row->lowest, -INFINITY);
  fill_logits(piece, logits, row->highest + 1, piece->key + piece->count, -INFINITY);
  for (int64_t i = 0; i < piece->count && piece->has_holes; ++i) {
    if (piece->token_row[i] < 0) logits[i] = -INFINITY;
  }
  const sl_attention_mask *mask = &args->attn_mask;
  if (!mask->data) return;
  int32_t keys[PIECE];
  for (int64_t i = 0; i < piece->count; ++i) keys[i] = (int32_t)(piece->key + i);
  int64_t first = team->batch * mask->batch_stride + row->head * mask->head_stride + row->query * mask->query_stride;
  sl_mask_gather(piece->mask[r], mask, first, keys, piece->count);
  for (int64_t i = 0; i < piece->count; ++i) {
    if (piece->mask[r][i] == -INFINITY) logits[i] = -INFINITY;
  }
}

/* Lists the keys of the piece that a row keeps, from step `step` of the segment on. All are written, and those that
 * are not kept are written over: whether one is kept can't be foreseen, and a branch foreseen wrongly costs more. */
static void list_piece(sl_row_team *team, const key_piece *piece, int64_t step) {
  int64_t kept = 0, rows = team->count;
  int32_t *restrict key = team->key + team->kept, *restrict token_row = team->token_row + team->kept;
  int32_t first_key = (int32_t)piece->key, place[PIECE];
  for (int32_t i = 0; i < piece->count; ++i) {
    if (i % STEP == 0) team->step_start[step + i / STEP] = (int32_t)(team->kept + kept);
    bool keeps = piece->logits[0][i] != -INFINITY;
    for (int64_t r = 1; r < rows; ++r) keeps |= piece->logits[r][i] != -INFINITY;
    place[kept] = i;
    kept += keeps;
  }
  for (int64_t i = 0; i < kept; ++i) key[i] = first_key + place[i];
  for (int64_t i = 0; i < kept; ++i) token_row[i] = piece->token_row[place[i]];
  for (int64_t r = 0; r < rows; ++r) {
    float *restrict logits = team->logits + r * team->stride + team->kept;
    for (int64_t i = 0; i < kept; ++i) logits[i] = piece->logits[r][place[i]];
    if (!team->mask) continue;
    float *restrict mask = team->mask + r * team->stride + team->kept;
    for (int64_t i = 0; i < kept; ++i) mask[i] = piece->mask[r][place[i]];
  }
  team->kept += kept;
}

static void load_run(key_piece *piece, const sl_key_run *run, int64_t first, int64_t count, int64_t b_stride) {
  int32_t *restrict token_row = piece->token_row + first, row = (int32_t)run->row;
  float *restrict target = piece->b + first;
  const float *restrict b = run->b;
  for (int32_t i = 0; i < count; ++i) token_row[i] = row + i;
  if (b_stride == 1) { /* in vectors */
    for (int64_t i = 0; i < count; ++i) target[i] = sl_attention_clamp_logit(b[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = sl_attention_clamp_logit(b[i * b_stride]);
  }
}

static void load_piece(key_piece *piece, const sl_row_team *team, const sl_gated_attention_args *args, int64_t begin,
                       int64_t end) {
  piece->key = begin;
  piece->count = end - begin;
  piece->has_holes = false;
  for (int64_t key = begin; key < end;) {
    sl_key_run run = sl_attention_key_run(args, team->batch, team->head_kv, key, end);
    int64_t first = key - begin, count = run.end - key;
    if (run.row >= 0) {
      load_run(piece, &run, first, count, args->b.token_stride);
    } else {
      piece->has_holes = true;
      for (int64_t i = first; i < first + count; ++i) piece->token_row[i] = -1, piece->b[i] = 0;
    }
    key = run.end;
  }
}

void sl_row_team_list(sl_row_team *team, const sl_attention_plan *plan, int64_t begin, int64_t end) {
  int64_t sinks = sl_attention_key_bounds(plan->args, team->batch).sinks;
  team->kept = 0;
  for (int64_t first = begin; first < end; first += PIECE) {
    key_piece piece;
    load_piece(&piece, team, plan->args, first, smaller(first + PIECE, end));
    for (int64_t r = 0; r < team->count; ++r) fill_row(&piece, team, plan, sinks, r);
    list_piece(team, &piece, (first - begin) / STEP);
  }
  for (int64_t s = (larger(end - begin, 0) + STEP - 1) / STEP; s <= SL_TEAM_STEPS; ++s) {
    team->step_start[s] = (int32_t)team->kept;
  }
}

int32_t sl_row_team_count(const sl_row_team *team, int64_t r) {
  const float *logits = team->logits + r * team->stride;
  int32_t count = 0;
  for (int64_t i = 0; i < team->kept; ++i) count += logits[i] != -INFINITY;
  return count;
}

static sl_row_list list_of_steps(const sl_row_team *team, const sl_token_rows *source, int64_t step, int64_t steps) {
  int64_t start = team->step_start[step];
  return (sl_row_list){source, team->token_row + start, team->step_start[step + steps] - start, team->kept - start};
}

void sl_row_team_multiply(sl_row_team *team, const sl_attention_plan *plan, int64_t step, int64_t steps) {
  const sl_gated_attention_args *args = plan->args;
  sl_token_rows k = sl_attention_key_rows(args, &args->k, team->batch, team->head_kv, args->head_dim);
  sl_row_list list = list_of_steps(team, &k, step, steps);
  plan->kernel->dot_rows(team->queries, plan->row_stride, team->count, &list, team->scores + team->step_start[step],
                         team->stride);
}

void sl_row_team_weigh(sl_row_team *team, const sl_attention_plan *plan, float *maximum, float *sum) {
  int32_t length = (int32_t)team->kept;
  for (int64_t r = 0; r < team->count; ++r) {
    const sl_team_row *row = team->rows + r;
    float *scores = team->scores + r * team->stride;
    if (plan->bends_scores) {
      const float *mask = team->mask ? team->mask + r * team->stride : NULL;
      sl_score_bend_row(plan, team->batch, row->head, row->position, team->key, team->kept, mask, scores);
    }
    sl_weigh_row weigh = {team->kept, scores, team->logits + r * team->stride, plan->scale_log2e, 0, 0};
    plan->kernel->weigh_row(&weigh);
    maximum[r] = weigh.maximum;
    sum[r] = weigh.sum;
    sl_dropout_clear(plan->args, team->batch, row->head, &row->query, team->key, 1, &length, scores, team->stride,
                     sizeof(float));
  }
}

void sl_row_team_add_values(const sl_row_team *team, const sl_attention_plan *plan, int64_t step, int64_t steps,
                            float *out, int64_t out_stride) {
  const sl_gated_attention_args *args = plan->args;
  sl_token_rows v = sl_attention_key_rows(args, &args->v, team->batch, team->head_kv, args->head_dim_v);
  sl_row_list list = list_of_steps(team, &v, step, steps);
  plan->kernel->add_rows(out, out_stride, team->count, team->scores + team->step_start[step], team->stride, &list);
}
