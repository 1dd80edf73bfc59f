/* Query rows: loading, gathering, storing. */
#include "attention/rows.h"

#include <math.h>
#include <string.h>

#include "attention/chunk.h"
#include "attention/dropout.h"
#include "attention/key_rows.h"
#include "attention/output_gate.h"
#include "attention/pair_score.h"
#include "attention/score_bend.h"
#include "runtime/number.h"

void sl_query_rows_take(sl_query_rows *rows, sl_arena *arena, const sl_attention_plan *plan, int64_t count) {
  int64_t padded = sl_round_up(count, plan->kernel->row_tile);
  *rows = (sl_query_rows){.count = 0};
  rows->token = sl_arena_take(arena, padded, sizeof(int32_t));
  rows->position = sl_arena_take(arena, padded, sizeof(int32_t));
  rows->a = sl_arena_take(arena, padded, sizeof(float));
  rows->exp_minus_a = sl_arena_take(arena, padded, sizeof(float));
  rows->packed = sl_arena_take(arena, padded * plan->row_stride, plan->kernel->element_size);
  rows->maximum = sl_arena_take(arena, padded, sizeof(float));
  rows->sum = sl_arena_take(arena, padded, sizeof(float));
  rows->kept = sl_arena_take(arena, padded, sizeof(int32_t));
  rows->out = sl_arena_take(arena, padded * plan->row_stride_v, sizeof(float));
}

/* Padding rows take part in whole groups: they need finite operands, and their results are not looked at. */
static void pad_rows(sl_query_rows *rows, const sl_attention_plan *plan) {
  int64_t padded = sl_round_up(rows->count, plan->kernel->row_tile);
  for (int64_t r = rows->count; r < padded; ++r) {
    rows->token[r] = rows->position[r] = 0;
    rows->a[r] = rows->exp_minus_a[r] = rows->sum[r] = 0;
    rows->maximum[r] = -INFINITY;
  }
  size_t bytes = (size_t)((padded - rows->count) * plan->row_stride_v) * sizeof(float);
  memset(rows->out + rows->count * plan->row_stride_v, 0, bytes);
}

static void order_queries(sl_query_rows *rows, const sl_attention_plan *plan, const float *a, bool sorted) {
  for (int64_t first = 0; first < rows->count; first += plan->tile) {
    int64_t count = rows->count - first < plan->tile ? rows->count - first : plan->tile;
    int32_t *order = rows->token + first;
    if (sorted) {
      sl_sort_falling(a + first, count, order);
      for (int64_t i = 0; i < count; ++i) order[i] += (int32_t)first;
    } else {
      for (int64_t i = 0; i < count; ++i) order[i] = (int32_t)(rows->count - 1 - first - i);
    }
  }
}

/* Starts each row with its own key, unless that is not valid, or a sink (which is attended to with the others). Goes in
 * order of position, so that what it reads comes in a stream. */
static void attend_to_self(sl_query_rows *rows, const sl_attention_plan *plan, int64_t begin) {
  const sl_gated_attention_args *args = plan->args;
  sl_token_rows q = sl_attention_token_rows(args, &args->q, rows->batch, rows->head, args->head_dim);
  sl_token_rows k = sl_attention_key_rows(args, &args->k, rows->batch, rows->head_kv, args->head_dim);
  sl_token_rows v = sl_attention_key_rows(args, &args->v, rows->batch, rows->head_kv, args->head_dim_v);
  sl_key_bounds bounds = sl_attention_key_bounds(args, rows->batch);
  int32_t row_of[SL_ATTENTION_MAX_CHUNK];
  for (int64_t r = 0; r < rows->count; ++r) row_of[rows->token[r] - begin] = (int32_t)r;
  for (int64_t i = 0; i < rows->count; ++i) {
    int64_t r = row_of[i];
    int32_t key = rows->position[r];
    if (key < bounds.sinks || key >= bounds.end) continue;
    sl_key_run self = sl_attention_key_run(args, rows->batch, rows->head_kv, key, key + 1);
    if (self.row < 0) continue;
    rows->kept[r] = sl_attention_pair_is_seen(args, rows->batch, rows->head, rows->token[r], key, key);
    int32_t key_row = (int32_t)self.row;
    float query[SL_ATTENTION_MAX_HEAD_DIM];
    memset(query, 0, (size_t)args->head_dim * sizeof(float));
    sl_attention_add_row(plan->kernel, query, plan->factor, &q, rows->token[r]);
    float score = sl_attention_dot_row(plan->kernel, query, &k, key_row);
    if (plan->bends_scores) {
      float bend;
      score = sl_score_bend_pair(plan, rows->batch, rows->head, rows->token[r], key, key, score, &bend);
    }
    if (score == -INFINITY) continue; /* weighs nothing */
    float gate = 1 / (1 + rows->exp_minus_a[r] * expf(-sl_attention_clamp_logit(*self.b)));
    rows->maximum[r] = score;
    rows->sum[r] = isfinite(score) ? 1 : NAN;
    sl_dropout_row dropout = sl_dropout_of_row(args, rows->batch, rows->head, rows->token[r]);
    if (!sl_dropout_keeps(&dropout, key)) continue;
    sl_attention_add_row(plan->kernel, rows->out + r * plan->row_stride_v, gate, &v, key_row);
  }
}

void sl_query_rows_load(sl_query_rows *rows, const sl_attention_plan *plan, int64_t batch, int64_t head, int64_t begin,
                        int64_t end, bool sorted) {
  const sl_gated_attention_args *args = plan->args;
  int64_t offset = sl_attention_q_offset(args, batch);
  float a[SL_ATTENTION_MAX_CHUNK];
  rows->batch = batch;
  rows->head = head;
  rows->head_kv = head / plan->group;
  rows->logit_tau = sl_attention_logit_tau(args, batch, head);
  rows->count = end - begin;
  const float *source = sl_attention_at3(&args->a, batch, head, begin);
  for (int64_t i = 0; i < rows->count; ++i) a[i] = sl_attention_clamp_logit(source[i * args->a.token_stride]);
  order_queries(rows, plan, a, sorted);
  for (int64_t r = 0; r < rows->count; ++r) {
    rows->a[r] = a[rows->token[r]];
    rows->exp_minus_a[r] = expf(-rows->a[r]);
    rows->token[r] += (int32_t)begin;
    rows->position[r] = (int32_t)(rows->token[r] + offset);
    rows->maximum[r] = -INFINITY;
    rows->sum[r] = 0;
    rows->kept[r] = 0;
  }
  memset(rows->out, 0, (size_t)(rows->count * plan->row_stride_v) * sizeof(float));
  rows->self_apart = sorted && args->causal && args->window == 0;
  if (rows->self_apart) attend_to_self(rows, plan, begin);
  sl_token_rows q = sl_attention_token_rows(args, &args->q, batch, head, args->head_dim);
  plan->kernel->pack_rows(rows->packed, plan->row_stride, &q, rows->token, rows->count, plan->factor);
  pad_rows(rows, plan);
}

void sl_query_rows_gather(sl_query_rows *rows, const sl_attention_plan *plan, const sl_query_rows *source,
                          const int32_t *order, int64_t count) {
  size_t packed_bytes = (size_t)plan->row_stride * plan->kernel->element_size;
  size_t out_bytes = (size_t)plan->row_stride_v * sizeof(float);
  rows->batch = source->batch;
  rows->head = source->head;
  rows->head_kv = source->head_kv;
  rows->self_apart = source->self_apart;
  rows->logit_tau = source->logit_tau;
  rows->count = count;
  for (int64_t r = 0; r < count; ++r) {
    int64_t from = order[r];
    rows->token[r] = source->token[from];
    rows->position[r] = source->position[from];
    rows->a[r] = source->a[from];
    rows->exp_minus_a[r] = source->exp_minus_a[from];
    rows->maximum[r] = source->maximum[from];
    rows->sum[r] = source->sum[from];
    rows->kept[r] = source->kept[from];
    memcpy((char *)rows->packed + (size_t)r * packed_bytes, (const char *)source->packed + (size_t)from * packed_bytes,
           packed_bytes);
    memcpy(rows->out + r * plan->row_stride_v, source->out + from * plan->row_stride_v, out_bytes);
  }
  for (int64_t r = count; r < sl_round_up(count, plan->kernel->row_tile); ++r) {
    memset((char *)rows->packed + (size_t)r * packed_bytes, 0, packed_bytes);
  }
  pad_rows(rows, plan);
}

sl_query_rows sl_query_rows_part(const sl_query_rows *rows, const sl_attention_plan *plan, int64_t first,
                                 int64_t count) {
  sl_query_rows part = *rows;
  part.count = rows->count - first < count ? rows->count - first : count;
  part.token += first;
  part.position += first;
  part.a += first;
  part.exp_minus_a += first;
  part.packed = (char *)rows->packed + (size_t)(first * plan->row_stride) * plan->kernel->element_size;
  part.maximum += first;
  part.sum += first;
  part.kept += first;
  part.out += first * plan->row_stride_v;
  return part;
}

void sl_query_rows_store(sl_query_rows *rows, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  float factors[SL_ATTENTION_MAX_CHUNK], dropout_scale = sl_dropout_scale(args);
  for (int64_t r = 0; r < rows->count; ++r) {
    float sum = rows->sum[r];
    bool empty = rows->maximum[r] == -INFINITY && sum == 0;
    factors[r] = empty ? 0 : dropout_scale / sum;
    sl_output_gate_apply(args, rows->batch, rows->head, rows->token[r], rows->out + r * plan->row_stride_v);
    int64_t number = (rows->batch * args->heads_q + rows->head) * args->n_q + rows->token[r];
    if (args->kept) ((int32_t *)args->kept)[number] = rows->kept[r];
    if (!args->lse.data) continue;
    double lse = (double)plan->scale_log2e * 0.6931471805599453 * (double)rows->maximum[r] + log((double)sum);
    *sl_attention_at3(&args->lse, rows->batch, rows->head, rows->token[r]) = empty ? -INFINITY : (float)lse;
  }
  const sl_tensor4 *out = &args->out;
  char *target = (char *)out->data + (rows->batch * out->batch_stride + rows->head * out->head_stride) *
                                         (int64_t)sl_dtype_size(args->dtype);
  plan->kernel->store_rows(target, out->token_stride, args->head_dim_v, rows->token, rows->count, rows->out,
                           plan->row_stride_v, factors);
  for (int64_t r = 0; r < rows->count; ++r) {
    bool sound = (factors[r] == 0 && rows->sum[r] == 0) || (factors[r] > 0 && factors[r] <= 1.5f * dropout_scale);
    if (sound && sl_all_finite(rows->out + r * plan->row_stride_v, args->head_dim_v)) continue;
    sl_attention_compute_row(args, rows->batch, rows->head, rows->token[r]);
  }
}
