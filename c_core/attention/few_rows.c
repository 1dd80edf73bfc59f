/* Few queries, as in decoding: rows pick their keys from where they lie. Packing would touch every key; this touches
 * those that are kept, once for all rows of a key head. Keys go in segments, so that one row is work for many threads;
 * what the segments give is then put together, row by row, in order. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/forward.h"
#include "attention/row_team.h"
#include "attention/rows.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum { FEW = 5, SEGMENT = SL_TEAM_SEGMENT, STEPS = SL_TEAM_STEPS, MOST_TEAMS = 8, TASKS_PER_WORKER = 4 };

typedef struct few_pass {
  const sl_attention_plan *plan;
  int64_t segments;
  int64_t team_rows, head_rows; /* rows of a team, but for a key head's last; of a key head */
  int64_t head_teams, teams;    /* of a key head; of a batch entry */
  int64_t task_teams, groups;   /* teams of a task; the groups of them that a batch entry has */
  float *out;                   /* [batch][heads_q][n_q][segments][row_stride_v] */
  float *maximum, *sum;         /* [batch][heads_q][n_q][segments] */
  int32_t *kept;                /* the same */
  sl_row_team *worker_teams;    /* [workers][MOST_TEAMS] */
} few_pass;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t count_parts(int64_t total, int64_t part) { return (total + part - 1) / part; }

bool sl_attention_is_few_rows(const sl_gated_attention_args *args) { return args->n_q < FEW || args->n_k == 0; }

/* How many teams go through a segment in turn. Where the heads of a token lie side by side, taking them together makes
 * the steps of a segment a stream; teams of one key head find its keys in the cache. Results do not depend on it. */
static int64_t choose_task_teams(const few_pass *pass, int64_t workers) {
  const sl_gated_attention_args *args = pass->plan->args;
  bool side_by_side = llabs(args->k.head_stride) < llabs(args->k.token_stride);
  int64_t most = side_by_side ? pass->teams : pass->head_teams;
  int64_t enough = args->batch * pass->segments * pass->teams / (TASKS_PER_WORKER * workers);
  return larger(smaller(smaller(most, MOST_TEAMS), enough), 1);
}

/* Cuts the workspace; on an empty arena, measures it. */
static void lay_out(few_pass *pass, sl_arena *arena, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  int64_t workers = sl_executor_workers(args->executor);
  *pass = (few_pass){.plan = plan};
  pass->segments = count_parts(args->n_k, SEGMENT);
  pass->head_rows = plan->group * args->n_q;
  pass->team_rows = larger(smaller(pass->head_rows, SL_ATTENTION_TEAM), 1);
  pass->head_teams = count_parts(pass->head_rows, pass->team_rows);
  pass->teams = args->heads_kv * pass->head_teams;
  pass->task_teams = choose_task_teams(pass, workers);
  pass->groups = count_parts(pass->teams, pass->task_teams);
  int64_t parts = args->batch * args->heads_q * args->n_q * pass->segments;
  pass->maximum = sl_arena_take(arena, parts, sizeof(float));
  pass->sum = sl_arena_take(arena, parts, sizeof(float));
  pass->kept = sl_arena_take(arena, parts, sizeof(int32_t));
  pass->out = sl_arena_take(arena, parts, (size_t)plan->row_stride_v * sizeof(float));
  pass->worker_teams = sl_arena_take(arena, workers * MOST_TEAMS, sizeof(sl_row_team));
  for (int64_t i = 0; i < workers * MOST_TEAMS; ++i) {
    sl_row_team team;
    sl_row_team_take(&team, arena, plan, pass->team_rows);
    if (pass->worker_teams) pass->worker_teams[i] = team;
  }
}

/* Steps that a team does in its turn. Where most keys are kept, the heads of few tokens in turn are a stream of memory;
 * where few are, each turn should be long enough for a list of rows that are asked for ahead. */
static int64_t choose_turn(const sl_row_team *teams, int64_t count, int64_t keys) {
  enum { LONG = 8 };
  int64_t kept = 0;
  for (int64_t t = 0; t < count; ++t) kept += teams[t].kept;
  return 4 * kept > 3 * count * keys ? 1 : LONG;
}

/* A segment of keys of one batch entry, and a group of teams. */
static void attend_segment(void *context, int64_t worker, int64_t task) {
  const few_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  int64_t group = task % pass->groups, segment = task / pass->groups % pass->segments;
  int64_t batch = task / pass->groups / pass->segments;
  int64_t first = group * pass->task_teams, count = smaller(pass->task_teams, pass->teams - first);
  sl_key_bounds bounds = sl_attention_key_bounds(plan->args, batch);
  int64_t begin = smaller(bounds.begin + segment * SEGMENT, bounds.end), end = smaller(begin + SEGMENT, bounds.end);
  sl_row_team *teams = pass->worker_teams + worker * MOST_TEAMS;
  int64_t part[MOST_TEAMS], out_stride = pass->segments * plan->row_stride_v;
  for (int64_t t = 0; t < count; ++t) {
    int64_t head_kv = (first + t) / pass->head_teams, row = (first + t) % pass->head_teams * pass->team_rows;
    sl_row_team_load(teams + t, plan, batch, head_kv, row, smaller(pass->team_rows, pass->head_rows - row));
    sl_row_team_list(teams + t, plan, begin, end);
    part[t] = ((batch * plan->args->heads_kv + head_kv) * pass->head_rows + row) * pass->segments + segment;
  }
  int64_t turn = count == 1 ? STEPS : choose_turn(teams, count, end - begin);
  for (int64_t step = 0; step < STEPS; step += turn) {
    for (int64_t t = 0; t < count; ++t) sl_row_team_multiply(teams + t, plan, step, turn);
  }
  for (int64_t t = 0; t < count; ++t) {
    float maximum[SL_ATTENTION_TEAM], sum[SL_ATTENTION_TEAM];
    sl_row_team_weigh(teams + t, plan, maximum, sum);
    for (int64_t r = 0; r < teams[t].count; ++r) {
      pass->maximum[part[t] + r * pass->segments] = maximum[r];
      pass->sum[part[t] + r * pass->segments] = sum[r];
      if (plan->args->kept) pass->kept[part[t] + r * pass->segments] = sl_row_team_count(teams + t, r);
      float *out = pass->out + part[t] * plan->row_stride_v + r * out_stride;
      memset(out, 0, (size_t)plan->row_stride_v * sizeof(float));
    }
  }
  for (int64_t step = 0; step < STEPS; step += turn) {
    for (int64_t t = 0; t < count; ++t) {
      sl_row_team_add_values(teams + t, plan, step, turn, pass->out + part[t] * plan->row_stride_v, out_stride);
    }
  }
}

/* Puts the segments of one row together, and stores it. */
static void finish_row(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const few_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  int64_t query = task % args->n_q, head = task / args->n_q % args->heads_q, batch = task / args->n_q / args->heads_q;
  const float *maxima = pass->maximum + task * pass->segments, *sums = pass->sum + task * pass->segments;
  _Alignas(64) float out[SL_ATTENTION_MAX_HEAD_DIM] = {0};
  const int32_t *counts = pass->kept + task * pass->segments;
  int32_t token = (int32_t)query, kept = 0;
  float maximum = -INFINITY, sum = 0;
  for (int64_t s = 0; s < pass->segments; ++s) {
    if (!(maxima[s] <= maximum)) maximum = maxima[s];
    if (args->kept) kept += counts[s];
  }
  for (int64_t s = 0; s < pass->segments; ++s) {
    if (maxima[s] == -INFINITY && sums[s] == 0) continue; /* keeps nothing */
    float share = exp2f(plan->scale_log2e * maxima[s] - plan->scale_log2e * maximum);
    const float *part = pass->out + (task * pass->segments + s) * plan->row_stride_v;
    sum += share * sums[s];
    for (int64_t c = 0; c < plan->width_v; ++c) out[c] += share * part[c];
  }
  sl_query_rows rows = {.batch = batch, .head = head, .head_kv = head / plan->group, .count = 1};
  rows.token = &token;
  rows.maximum = &maximum;
  rows.sum = &sum;
  rows.kept = &kept;
  rows.out = out;
  sl_query_rows_store(&rows, plan);
}

sl_status sl_attention_few_rows_workspace(const sl_attention_plan *plan, size_t *bytes) {
  sl_arena arena = sl_arena_make(NULL, 0);
  few_pass pass;
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(!arena.overflow, SL_OUT_OF_RANGE, "the workspace for n_q = %lld and n_k = %lld does not fit into size_t",
             (long long)plan->args->n_q, (long long)plan->args->n_k);
  *bytes = arena.used;
  return SL_OK;
}

sl_status sl_attention_run_few_rows(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  few_pass pass;
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(args->workspace && !arena.overflow && arena.used <= args->workspace_size, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  sl_stage stages[] = {
      {args->batch * pass.segments * pass.groups, attend_segment, NULL, &pass},
      {args->batch * args->heads_q * args->n_q, finish_row, NULL, &pass},
  };
  sl_run_stages(args->executor, stages, 2);
  return SL_OK;
}
