/* Few queries, as in decoding: each row picks its keys from where they lie. Packing would touch every key; this touches
 * those that are kept. */
#include <math.h>
#include <stdlib.h>

#include "attention/dropout.h"
#include "attention/forward.h"
#include "attention/key_rows.h"
#include "attention/pair_score.h"
#include "attention/rows.h"
#include "attention/score_bend.h"
#include "runtime/executor.h"

enum { FEW = 5, KEYS = 512 };

bool sl_attention_is_few_rows(const sl_gated_attention_args *args) { return args->n_q < FEW || args->n_k == 0; }

/* A row and the keys of the block at hand that it keeps. */
typedef struct few_row {
  sl_query_rows rows; /* one row: state and output */
  int64_t position;
  float query[SL_ATTENTION_MAX_HEAD_DIM];
  sl_dropout_row dropout;
  int64_t kept;
  int32_t key[KEYS], token_row[KEYS];
  float gate[KEYS];
  float score[KEYS];
} few_row;

static void keep_of_run(few_row *row, const sl_gated_attention_args *args, int64_t sinks, int64_t begin,
                        const sl_key_run *run) {
  bool masked = args->attn_mask.data || args->sliding_window > 0;
  for (int64_t key = begin; key < run->end; ++key) {
    if (masked &&
        !sl_attention_pair_is_seen(args, row->rows.batch, row->rows.head, *row->rows.token, row->position, key)) {
      continue;
    }
    float z = *row->rows.a + sl_attention_clamp_logit(run->b[(key - begin) * args->b.token_stride]);
    bool near = key < sinks || llabs(row->position - key) < args->window;
    if (!near && z < row->rows.logit_tau && !(args->causal && key == row->position)) continue;
    ++*row->rows.kept;
    row->key[row->kept] = (int32_t)key;
    row->token_row[row->kept] = (int32_t)(run->row + key - begin);
    row->gate[row->kept++] = near ? 1 : 1 / (1 + expf(-z));
  }
}

static void keep_keys(few_row *row, const sl_gated_attention_args *args, int64_t sinks, int64_t begin, int64_t end) {
  row->kept = 0;
  while (begin < end) {
    sl_key_run run = sl_attention_key_run(args, row->rows.batch, row->rows.head_kv, begin, end);
    if (run.row >= 0) keep_of_run(row, args, sinks, begin, &run);
    begin = run.end;
  }
}

static void attend_to_kept(few_row *row, const sl_attention_plan *plan, const sl_token_rows *k,
                           const sl_token_rows *v) {
  float *sum = row->rows.sum, *maximum = row->rows.maximum, *out = row->rows.out;
  float scale = plan->scale_log2e, largest = *maximum;
  plan->kernel->dot_rows(row->query, k, row->token_row, row->kept, row->score);
  for (int64_t i = 0; i < row->kept && plan->bends_scores; ++i) {
    float bend;
    row->score[i] = sl_score_bend_pair(plan, row->rows.batch, row->rows.head, *row->rows.token, row->position,
                                       row->key[i], row->score[i], &bend);
  }
  for (int64_t i = 0; i < row->kept; ++i) {
    if (!(row->score[i] <= largest)) largest = row->score[i];
  }
  if (largest == -INFINITY) return;
  float shift = scale * largest;
  float shrink = exp2f(scale * *maximum - shift);
  for (int64_t c = 0; c < plan->width_v; ++c) out[c] *= shrink;
  *sum *= shrink;
  *maximum = largest;
  for (int64_t i = 0; i < row->kept; ++i) {
    float weight = exp2f(scale * row->score[i] - shift);
    *sum += weight;
    row->score[i] = sl_dropout_keeps(&row->dropout, row->key[i]) ? weight * row->gate[i] : 0;
  }
  plan->kernel->add_rows(out, row->score, v, row->token_row, row->kept);
}

static void run_row(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const sl_attention_plan *plan = context;
  const sl_gated_attention_args *args = plan->args;
  int64_t query = task % args->n_q, head = task / args->n_q % args->heads_q, batch = task / args->n_q / args->heads_q;
  _Alignas(64) float out[SL_ATTENTION_MAX_HEAD_DIM] = {0};
  int32_t token = (int32_t)query, kept = 0;
  float maximum = -INFINITY, sum = 0;
  float a = sl_attention_clamp_logit(*sl_attention_at3(&args->a, batch, head, query));
  few_row row;
  row.rows = (sl_query_rows){.batch = batch, .head = head, .head_kv = head / plan->group, .count = 1};
  row.rows.logit_tau = sl_attention_logit_tau(args, batch, head);
  row.rows.token = &token;
  row.rows.a = &a;
  row.rows.maximum = &maximum;
  row.rows.sum = &sum;
  row.rows.kept = &kept;
  row.rows.out = out;
  row.dropout = sl_dropout_of_row(args, batch, head, query);
  row.position = query + sl_attention_q_offset(args, batch);
  sl_token_rows q = sl_attention_token_rows(args, &args->q, batch, head, args->head_dim);
  sl_token_rows k = sl_attention_key_rows(args, &args->k, batch, row.rows.head_kv, args->head_dim);
  sl_token_rows v = sl_attention_key_rows(args, &args->v, batch, row.rows.head_kv, args->head_dim_v);
  for (int64_t c = 0; c < args->head_dim; ++c) row.query[c] = 0;
  plan->kernel->add_rows(row.query, &plan->factor, &q, &token, 1);
  sl_key_bounds bounds = sl_attention_key_bounds(args, batch);
  int64_t end = args->causal && row.position + 1 < bounds.end ? row.position + 1 : bounds.end;
  for (int64_t begin = bounds.begin; begin < end; begin += KEYS) {
    keep_keys(&row, args, bounds.sinks, begin, begin + KEYS < end ? begin + KEYS : end);
    if (row.kept) attend_to_kept(&row, plan, &k, &v);
  }
  sl_query_rows_store(&row.rows, plan);
}

void sl_attention_run_few_rows(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  sl_run_tasks(args->executor, args->batch * args->heads_q * args->n_q, run_row, (void *)(uintptr_t)plan);
}
