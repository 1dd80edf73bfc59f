/* Query rows of the backward: loading, packing, summing, storing. */
#include "attention/gradient_rows.h"

#include <math.h>
#include <string.h>

#include "runtime/number.h"

static const float log2_e = 1.44269504f;

void sl_gradient_queries_take(sl_gradient_queries *queries, sl_arena *arena, const sl_attention_plan *plan,
                              int64_t count) {
  *queries = (sl_gradient_queries){.count = 0};
  queries->a = sl_arena_take(arena, count, sizeof(float));
  queries->exp_minus_a = sl_arena_take(arena, count, sizeof(float));
  queries->lse_log2 = sl_arena_take(arena, count, sizeof(float));
  queries->mean = sl_arena_take(arena, count, sizeof(float));
  queries->da = sl_arena_take(arena, count, sizeof(float));
  queries->dq = sl_arena_take(arena, count * plan->row_stride, sizeof(float));
}

void sl_gradient_rows_take(sl_gradient_rows *rows, sl_arena *arena, const sl_attention_plan *plan, int64_t count) {
  const sl_attention_kernel *kernel = plan->kernel;
  int64_t padded = sl_round_up(count, kernel->row_tile);
  *rows = (sl_gradient_rows){.capacity = sl_round_up(padded, kernel->depth_step)};
  rows->query.token = sl_arena_take(arena, padded, sizeof(int32_t));
  rows->query.position = sl_arena_take(arena, padded, sizeof(int32_t));
  rows->query.a = sl_arena_take(arena, padded, sizeof(float));
  rows->query.exp_minus_a = sl_arena_take(arena, padded, sizeof(float));
  rows->query.packed = sl_arena_take(arena, padded * plan->row_stride, kernel->element_size);
  rows->dout = sl_arena_take(arena, padded * plan->row_stride_v, kernel->element_size);
  rows->q_depths = sl_arena_take(arena, rows->capacity * plan->width, kernel->element_size);
  rows->dout_depths = sl_arena_take(arena, rows->capacity * plan->width_v, kernel->element_size);
  rows->lse_log2 = sl_arena_take(arena, padded, sizeof(float));
  rows->mean = sl_arena_take(arena, padded, sizeof(float));
  rows->da = sl_arena_take(arena, padded, sizeof(float));
  rows->dq = sl_arena_take(arena, padded * plan->row_stride, sizeof(float));
}

static float dot_out_and_dout(const sl_attention_plan *plan, const sl_token_rows *out, const sl_token_rows *dout,
                              int32_t token) {
  float row[SL_ATTENTION_MAX_HEAD_DIM] = {0};
  sl_attention_add_row(plan->kernel, row, 1, out, token);
  return sl_attention_dot_row(plan->kernel, row, dout, token);
}

void sl_gradient_queries_load(sl_gradient_queries *queries, const sl_attention_plan *plan, int64_t batch, int64_t head,
                              int64_t begin, int64_t end, bool self_apart) {
  const sl_gated_attention_args *args = plan->args;
  queries->batch = batch;
  queries->head = head;
  queries->head_kv = head / plan->group;
  queries->begin = begin;
  queries->count = end - begin;
  queries->self_apart = self_apart;
  const float *a = sl_attention_at3(&args->a, batch, head, begin);
  const float *lse = sl_attention_at3(&args->lse, batch, head, begin);
  sl_token_rows out = sl_attention_token_rows(args, &args->out, batch, head, args->head_dim_v);
  sl_token_rows dout = sl_attention_token_rows(args, &args->dout, batch, head, args->head_dim_v);
  for (int64_t i = 0; i < queries->count; ++i) {
    queries->a[i] = sl_attention_clamp_logit(a[i * args->a.token_stride]);
    queries->exp_minus_a[i] = expf(-queries->a[i]);
    queries->lse_log2[i] = log2_e * lse[i * args->lse.token_stride];
    queries->mean[i] = dot_out_and_dout(plan, &out, &dout, (int32_t)(begin + i));
    if (args->dlse.data) queries->mean[i] -= *sl_attention_at3(&args->dlse, batch, head, begin + i);
    queries->da[i] = 0;
  }
  memset(queries->dq, 0, (size_t)(queries->count * plan->row_stride) * sizeof(float));
}

void sl_gradient_rows_load(sl_gradient_rows *rows, const sl_attention_plan *plan, const sl_gradient_queries *queries,
                           const int32_t *order, int64_t count) {
  const sl_gated_attention_args *args = plan->args;
  const sl_attention_kernel *kernel = plan->kernel;
  sl_query_rows *query = &rows->query;
  int64_t padded = sl_round_up(count, kernel->row_tile), offset = sl_attention_q_offset(args, queries->batch);
  query->batch = queries->batch;
  query->head = queries->head;
  query->head_kv = queries->head_kv;
  query->logit_tau = sl_attention_logit_tau(args, queries->batch, queries->head);
  query->self_apart = queries->self_apart;
  query->count = count;
  for (int64_t r = 0; r < padded; ++r) {
    int64_t from = r < count ? order[r] : 0;
    query->token[r] = (int32_t)(queries->begin + from);
    query->position[r] = (int32_t)(queries->begin + from + offset);
    query->a[r] = queries->a[from];
    query->exp_minus_a[r] = queries->exp_minus_a[from];
    rows->lse_log2[r] = queries->lse_log2[from];
    rows->mean[r] = queries->mean[from];
    rows->da[r] = 0;
  }
  sl_token_rows q = sl_attention_token_rows(args, &args->q, queries->batch, queries->head, args->head_dim);
  sl_token_rows dout = sl_attention_token_rows(args, &plan->dout, queries->batch, queries->head, args->head_dim_v);
  kernel->pack_rows(query->packed, plan->row_stride, &q, query->token, count, plan->factor);
  kernel->pack_rows(rows->dout, plan->row_stride_v, &dout, query->token, count, 1);
  kernel->pack_depths(rows->q_depths, rows->capacity, &q, query->token, count);
  kernel->pack_depths(rows->dout_depths, rows->capacity, &dout, query->token, count);
  memset(rows->dq, 0, (size_t)(padded * plan->row_stride) * sizeof(float));
}

sl_gradient_rows sl_gradient_rows_part(const sl_gradient_rows *rows, const sl_attention_plan *plan, int64_t first,
                                       int64_t count) {
  size_t element = plan->kernel->element_size;
  int64_t panel = plan->kernel->panel;
  sl_gradient_rows part = *rows;
  part.query.count = rows->query.count - first < count ? rows->query.count - first : count;
  part.query.token += first;
  part.query.position += first;
  part.query.a += first;
  part.query.exp_minus_a += first;
  part.query.packed = (char *)rows->query.packed + (size_t)(first * plan->row_stride) * element;
  part.dout = (char *)rows->dout + (size_t)(first * plan->row_stride_v) * element;
  part.q_depths = (char *)rows->q_depths + (size_t)(first * panel) * element;
  part.dout_depths = (char *)rows->dout_depths + (size_t)(first * panel) * element;
  part.lse_log2 += first;
  part.mean += first;
  part.da += first;
  part.dq += first * plan->row_stride;
  return part;
}

void sl_gradient_rows_add_to(const sl_gradient_rows *rows, const sl_attention_plan *plan,
                             sl_gradient_queries *queries) {
  for (int64_t r = 0; r < rows->query.count; ++r) {
    int64_t to = rows->query.token[r] - queries->begin;
    const float *from = rows->dq + r * plan->row_stride;
    float *sum = queries->dq + to * plan->row_stride;
    for (int64_t c = 0; c < plan->row_stride; ++c) sum[c] += from[c];
    queries->da[to] += rows->da[r];
  }
}

bool sl_gradient_queries_store(const sl_gradient_queries *queries, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  float factors[SL_ATTENTION_MAX_CHUNK];
  int32_t token[SL_ATTENTION_MAX_CHUNK];
  const float *a = sl_attention_at3(&args->a, queries->batch, queries->head, queries->begin);
  float *da = sl_attention_at3(&args->da, queries->batch, queries->head, queries->begin);
  for (int64_t i = 0; i < queries->count; ++i) {
    factors[i] = (float)args->scale;
    token[i] = (int32_t)(queries->begin + i);
    bool clamped = fabsf(a[i * args->a.token_stride]) > SL_GATE_LOGIT_LIMIT;
    da[i * args->da.token_stride] = clamped ? 0 : queries->da[i];
  }
  sl_token_rows dq = sl_attention_token_rows(args, &args->dq, queries->batch, queries->head, args->head_dim);
  plan->kernel->store_rows((void *)(uintptr_t)dq.data, dq.token_stride, args->head_dim, token, queries->count,
                           queries->dq, plan->row_stride, factors);
  return sl_all_finite(queries->dq, queries->count * plan->row_stride) && sl_all_finite(queries->da, queries->count);
}
