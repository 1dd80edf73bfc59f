/* One query row by the formula, in double, pair by pair. Dropped pairs are not touched, so that NaN or infinity in them
 * cannot leak; a row that is NaN for good is recognised early. */
#include <math.h>
#include <stdlib.h>

#include "attention/dropout.h"
#include "attention/element.h"
#include "attention/key_rows.h"
#include "attention/output_gate.h"
#include "attention/pair_score.h"
#include "attention/rows.h"
#include "runtime/number.h"

typedef struct exact_row {
  const sl_gated_attention_args *args;
  sl_key_bounds bounds;
  sl_token_rows q, k, v;
  int64_t batch, head, head_kv, query, position;
  float a, tau;
} exact_row;

static sl_key_run find_key(const exact_row *row, int64_t key) {
  return sl_attention_key_run(row->args, row->batch, row->head_kv, key, key + 1);
}

/* Whether the pair is kept, and its gate. */
static bool keep_pair(const exact_row *row, int64_t key, double *gate) {
  const sl_gated_attention_args *args = row->args;
  *gate = 1;
  if (!sl_attention_pair_is_seen(args, row->batch, row->head, row->query, row->position, key)) return false;
  sl_key_run run = find_key(row, key);
  if (run.row < 0) return false;
  if (key < row->bounds.sinks || llabs(row->position - key) < args->window) return true;
  float z = row->a + sl_attention_clamp_logit(*run.b);
  *gate = 1 / (1 + exp(-(double)z));
  return !(z < row->tau) || (args->causal && key == row->position);
}

static double score_pair(const exact_row *row, int64_t key) {
  double dot = 0;
  int64_t key_offset = find_key(row, key).row * row->k.token_stride;
  for (int64_t c = 0; c < row->q.channels; ++c) {
    dot += sl_element_load(row->args->dtype, row->q.data, row->query * row->q.token_stride + c) *
           sl_element_load(row->args->dtype, row->k.data, key_offset + c);
  }
  double bend;
  return sl_attention_bend_score(row->args, row->batch, row->head, row->query, row->position, key,
                                 dot * row->args->scale, &bend);
}

/* Adds the values under the softmax; stops as soon as every channel is NaN. */
static void add_values(const exact_row *row, double maximum, double sum, double *out) {
  sl_dropout_row dropout = sl_dropout_of_row(row->args, row->batch, row->head, row->query);
  for (int64_t key = row->bounds.begin; key < row->bounds.end; ++key) {
    double gate;
    if (!keep_pair(row, key, &gate) || !sl_dropout_keeps(&dropout, (int32_t)key)) continue;
    gate *= (double)sl_dropout_scale(row->args);
    double weight = exp(score_pair(row, key) - maximum) / sum * gate;
    int64_t offset = find_key(row, key).row * row->v.token_stride;
    for (int64_t c = 0; c < row->v.channels; ++c) {
      out[c] += weight * sl_element_load(row->args->dtype, row->v.data, offset + c);
    }
    if (isnan(weight)) return;
  }
}

void sl_attention_compute_row(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query) {
  exact_row row = {.args = args, .batch = batch, .head = head, .query = query};
  row.position = query + sl_attention_q_offset(args, batch);
  row.bounds = sl_attention_key_bounds(args, batch);
  row.head_kv = head / (args->heads_q / args->heads_kv);
  row.q = sl_attention_token_rows(args, &args->q, batch, head, args->head_dim);
  row.k = sl_attention_key_rows(args, &args->k, batch, row.head_kv, args->head_dim);
  row.v = sl_attention_key_rows(args, &args->v, batch, row.head_kv, args->head_dim_v);
  row.a = sl_attention_clamp_logit(*sl_attention_at3(&args->a, batch, head, query));
  row.tau = sl_attention_logit_tau(args, batch, head);
  double maximum = -INFINITY, sum = 0, out[SL_ATTENTION_MAX_HEAD_DIM] = {0};
  for (int64_t key = row.bounds.begin; key < row.bounds.end && !isnan(sum); ++key) {
    double gate;
    if (!keep_pair(&row, key, &gate)) continue;
    double score = score_pair(&row, key);
    if (score == -INFINITY) continue; /* weighs nothing */
    if (!(score <= maximum)) {
      sum *= exp(maximum - score);
      maximum = score;
    }
    sum += exp(score - maximum);
  }
  if (isnan(sum)) {
    for (int64_t c = 0; c < args->head_dim_v; ++c) out[c] = NAN;
  } else {
    add_values(&row, maximum == -INFINITY ? 0 : maximum, sum > 0 ? sum : 1, out);
  }
  sl_token_rows target = sl_attention_token_rows(args, &args->out, batch, head, args->head_dim_v);
  float gates[SL_ATTENTION_MAX_HEAD_DIM];
  for (int64_t c = 0; c < args->head_dim_v; ++c) gates[c] = 1;
  sl_output_gate_apply(args, batch, head, query, gates);
  for (int64_t c = 0; c < args->head_dim_v; ++c) out[c] *= (double)gates[c];
  for (int64_t c = 0; c < args->head_dim_v; ++c) {
    sl_element_store(args->dtype, (void *)(uintptr_t)target.data, query * target.token_stride + c, out[c]);
  }
  if (args->lse.data) {
    double lse = isnan(sum) ? NAN : sum > 0 ? maximum + log(sum) : -INFINITY;
    *sl_attention_at3(&args->lse, batch, head, query) = (float)lse;
  }
}
