/* One task of the backward: a chunk of queries against the keys that they keep. Scores are computed anew, block by
 * block; from them, lse and D come weights and score gradients, which three products turn into dq, dk and dv. */
#include <math.h>

#include "attention/backward_queries.h"
#include "attention/dropout.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void sl_backward_worker_take(sl_backward_worker *worker, sl_arena *arena, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  int64_t rows = smaller(plan->query_chunk, args->n_q);
  sl_gradient_queries_take(&worker->queries, arena, plan, rows);
  sl_gradient_rows_take(&worker->rows, arena, plan, rows);
  sl_gradient_chunk_take(&worker->segment, arena, plan, smaller(plan->chunk, args->n_k));
  sl_staircase_take(&worker->staircase, arena, plan);
  sl_staircase *staircase = &worker->staircase;
  int64_t pairs = sl_round_up(plan->far_tile, plan->kernel->row_tile) * staircase->score_stride;
  worker->dout_values = sl_arena_take(arena, pairs, sizeof(float));
  worker->weights = staircase->weights;
  worker->score_gradient = worker->dout_values;
  if (plan->kernel->element_size != sizeof(float)) {
    worker->score_gradient = sl_arena_take(arena, pairs, plan->kernel->element_size);
  }
  worker->order = sl_arena_take(arena, rows, sizeof(int32_t));
}

/* A tile of rows and the chunk whose sums it adds to. */
typedef struct block_context {
  const sl_backward_worker *worker;
  sl_gradient_rows tile;
  sl_gradient_chunk *chunk;
} block_context;

static const void *element_at(const void *base, int64_t index, const sl_attention_kernel *kernel) {
  return (const char *)base + (size_t)index * kernel->element_size;
}

/* d_rj times e_rj before the softmax's gradient, and times the weights behind it, as dv takes them. */
static void drop_out(const sl_backward_worker *worker, const sl_attention_plan *plan, const sl_gradient_rows *rows,
                     const int32_t *keys, int64_t count, bool weights) {
  const sl_gated_attention_args *args = plan->args;
  if (args->dropout_p == 0) return;
  const sl_staircase *staircase = &worker->staircase;
  const int32_t *lengths = staircase->block_lengths;
  float *tile = weights ? worker->weights : worker->dout_values, scale = sl_dropout_scale(args);
  sl_dropout_clear(args, rows->query.batch, rows->query.head, rows->query.token, keys, count, lengths, tile,
                   staircase->score_stride, sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < lengths[r]; ++j) tile[r * staircase->score_stride + j] *= scale;
  }
}

static void add_block(void *context, sl_staircase *staircase, const sl_key_chunk *keys, int64_t start, int64_t count,
                      bool gated, bool masked) {
  const block_context *block = context;
  const sl_backward_worker *worker = block->worker;
  const sl_gradient_rows *rows = &block->tile;
  const sl_attention_plan *plan = staircase->plan;
  const sl_attention_kernel *kernel = plan->kernel;
  const int32_t *lengths = staircase->block_lengths;
  int64_t stride = staircase->score_stride;
  sl_score_bend *bend = &staircase->bend;
  if (plan->bends_scores && !sl_score_bend_load(bend, plan, &rows->query, keys, start, count, lengths)) return;
  kernel->multiply_nt(count, lengths, rows->query.packed, plan->row_stride,
                      element_at(keys->k_columns, start * plan->depth, kernel), plan->depth, staircase->scores, stride);
  kernel->multiply_nt(count, lengths, rows->dout, plan->row_stride_v,
                      element_at(keys->v_columns, start * plan->depth_v, kernel), plan->depth_v, worker->dout_values,
                      stride);
  if (plan->bends_scores) {
    sl_score_bend_apply(bend, plan, &rows->query, keys, start, count, lengths, staircase->scores);
  }
  if (masked) {
    kernel->mask_tile(count, lengths, staircase->scores, stride, keys->index + start, staircase->lowest,
                      staircase->highest);
  }
  sl_softmax_gradient_tile tile = {.rows = count,
                                   .lengths = lengths,
                                   .scores = staircase->scores,
                                   .dout_values = worker->dout_values,
                                   .score_stride = stride,
                                   .weights = worker->weights,
                                   .score_gradient = worker->score_gradient,
                                   .weight_stride = stride,
                                   .scale_log2e = plan->scale_log2e,
                                   .exp_minus_a = gated ? rows->query.exp_minus_a : NULL,
                                   .exp_minus_b = keys->exp_minus_b + start,
                                   .lse_log2 = rows->lse_log2,
                                   .mean = rows->mean,
                                   .da = rows->da,
                                   .db = block->chunk->db + start};
  drop_out(worker, plan, rows, keys->index + start, count, false);
  kernel->softmax_gradient_tile(&tile);
  drop_out(worker, plan, rows, keys->index + start, count, true);
  if (plan->bends_scores) {
    sl_mask_gradient_add(&worker->mask_gradient, &rows->query, keys->index + start, count, lengths,
                         worker->score_gradient, stride);
    sl_score_bend_differentiate(bend, count, lengths, worker->score_gradient);
  }
  kernel->multiply_tn(count, lengths, worker->weights, stride, rows->dout_depths, rows->capacity, plan->width_v,
                      block->chunk->dv + start * plan->row_stride_v, plan->row_stride_v);
  kernel->multiply_tn(count, lengths, worker->score_gradient, stride, rows->q_depths, rows->capacity, plan->width,
                      block->chunk->dk + start * plan->row_stride, plan->row_stride);
  kernel->multiply_nn(count, lengths, worker->score_gradient, stride,
                      element_at(keys->k_depths, start * kernel->panel, kernel), keys->capacity, plan->width, rows->dq,
                      plan->row_stride);
}

/* All rows, in tiles, against the keys of a chunk that lie in a region. */
static void add_chunk(sl_backward_worker *worker, const sl_attention_plan *plan, sl_gradient_chunk *chunk,
                      sl_key_region region, int64_t tile) {
  for (int64_t row = 0; row < worker->rows.query.count; row += tile) {
    block_context block = {worker, sl_gradient_rows_part(&worker->rows, plan, row, tile), chunk};
    sl_staircase_walk(&worker->staircase, &block.tile.query, &chunk->keys, region, add_block, &block);
  }
}

/* The same for keys [begin, end) that are packed for this query chunk alone, `piece` at a time. */
static void add_segments(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head,
                         sl_key_range keys, bool sorted, sl_key_region region, int64_t piece, int64_t tile) {
  sl_gradient_chunk *segment = &worker->segment;
  for (int64_t begin = keys.begin; begin < keys.end; begin += piece) {
    sl_key_chunk_fill(&segment->keys, plan, head->batch, head->head_kv, begin, smaller(begin + piece, keys.end),
                      sorted);
    sl_gradient_chunk_clear(segment, plan);
    add_chunk(worker, plan, segment, region, tile);
    sl_key_head_add(head, plan, segment);
  }
}

/* The pairs of queries with their own keys, kept whatever the gate, but gated. */
static void add_self_pairs(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head) {
  const sl_gated_attention_args *args = plan->args;
  const sl_attention_kernel *kernel = plan->kernel;
  sl_gradient_queries *queries = &worker->queries;
  sl_gradient_chunk *segment = &worker->segment;
  sl_token_rows q = sl_attention_token_rows(args, &args->q, queries->batch, queries->head, args->head_dim);
  sl_token_rows k = sl_attention_token_rows(args, &args->k, queries->batch, queries->head_kv, args->head_dim);
  sl_token_rows v = sl_attention_token_rows(args, &args->v, queries->batch, queries->head_kv, args->head_dim_v);
  sl_token_rows dout = sl_attention_token_rows(args, &plan->dout, queries->batch, queries->head, args->head_dim_v);
  int64_t offset = sl_attention_q_offset(args, queries->batch);
  for (int64_t i = 0; i < queries->count; ++i) {
    int32_t query = (int32_t)(queries->begin + i), key = (int32_t)(query + offset);
    if (key < head->bounds.begin || key >= head->bounds.end || key < head->bounds.sinks) continue;
    float row[SL_ATTENTION_MAX_HEAD_DIM] = {0}, dout_row[SL_ATTENTION_MAX_HEAD_DIM] = {0};
    sl_attention_add_row(kernel, row, 1, &q, query);
    sl_attention_add_row(kernel, dout_row, 1, &dout, query);
    float score = sl_attention_dot_row(kernel, row, &k, key), e = sl_attention_dot_row(kernel, dout_row, &v, key);
    float bend = 1;
    score *= plan->factor;
    if (plan->bends_scores) {
      score = sl_score_bend_pair(plan, queries->batch, queries->head, query, key, key, score, &bend);
    }
    if (score == -INFINITY) continue; /* weighs nothing */
    float p = exp2f(plan->scale_log2e * score - queries->lse_log2[i]);
    float b = sl_attention_clamp_logit(*sl_attention_at3(&args->b, queries->batch, queries->head_kv, key));
    float odds = queries->exp_minus_a[i] * expf(-b), gate = 1 / (1 + odds);
    sl_dropout_row dropout = sl_dropout_of_row(args, queries->batch, queries->head, query);
    float stays = sl_dropout_keeps(&dropout, key) ? sl_dropout_scale(args) : 0;
    e *= stays;
    float weight = p * gate, score_gradient = p * (gate * e - queries->mean[i]), dz = weight * e * (odds * gate);
    weight *= stays;
    if (worker->mask_gradient.data) {
      const sl_attention_mask *mask = &worker->mask_gradient;
      ((float *)mask->data)[query * mask->query_stride + key * mask->key_stride] += score_gradient;
    }
    score_gradient *= bend;
    sl_attention_add_row(kernel, queries->dq + i * plan->row_stride, score_gradient, &k, key);
    queries->da[i] += dz;
    segment->keys.count = 1;
    segment->keys.index[0] = key;
    sl_gradient_chunk_clear(segment, plan);
    sl_attention_add_row(kernel, segment->dk, score_gradient, &q, query);
    sl_attention_add_row(kernel, segment->dv, weight, &dout, query);
    segment->db[0] = dz;
    sl_key_head_add(head, plan, segment);
  }
}

static void order_neighbours(sl_backward_worker *worker, const sl_attention_plan *plan) {
  int64_t total = worker->queries.count;
  for (int64_t first = 0; first < total; first += plan->tile) {
    int64_t count = smaller(plan->tile, total - first);
    sl_sort_falling(worker->queries.a + first, count, worker->order + first);
    for (int64_t i = 0; i < count; ++i) worker->order[first + i] += (int32_t)first;
  }
}

/* From the last to the first, so that prefixes by position do not grow. */
static void order_by_position(sl_backward_worker *worker) {
  int64_t count = worker->queries.count;
  for (int64_t i = 0; i < count; ++i) worker->order[i] = (int32_t)(count - 1 - i);
}

/* Far keys with rows sorted over the whole query chunk; near ones with rows in order of position; and those at the
 * border, where gate and position both decide, with few neighbouring rows sorted together. */
static void run_sorted(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head, int64_t task,
                       const sl_key_ranges *ranges) {
  sl_gradient_queries *queries = &worker->queries;
  sl_gradient_chunk *chunk = head->chunk + head->sink_chunks;
  sl_sort_falling(queries->a, queries->count, worker->order);
  sl_gradient_rows_load(&worker->rows, plan, queries, worker->order, queries->count);
  for (int64_t i = 0; i < ranges->past_whole; ++i) {
    sl_key_head_wait(head, task, (int)i + 1);
    add_chunk(worker, plan, chunk + i, SL_REGION_ALL, plan->far_tile);
    sl_key_head_pass_on(head, task, (int)i + 1);
  }
  sl_key_head_wait(head, task, SL_TURN_OVER);
  for (int64_t i = ranges->after_whole; i < ranges->chunks && i >= ranges->past_whole; ++i) {
    add_chunk(worker, plan, chunk + i, SL_REGION_ALL, plan->far_tile);
  }
  add_segments(worker, plan, head, ranges->past, true, SL_REGION_ALL, plan->chunk, plan->far_tile);
  add_segments(worker, plan, head, ranges->after, true, SL_REGION_ALL, plan->chunk, plan->far_tile);
  sl_gradient_rows_add_to(&worker->rows, plan, queries);

  if (head->sink_chunks > 0 || ranges->near.begin < ranges->near.end) {
    order_by_position(worker);
    sl_gradient_rows_load(&worker->rows, plan, queries, worker->order, queries->count);
    for (int64_t i = 0; i < head->sink_chunks; ++i) {
      add_chunk(worker, plan, head->chunk + i, SL_REGION_SINKS, plan->far_tile);
    }
    add_segments(worker, plan, head, ranges->near, false, SL_REGION_NEAR, plan->chunk, plan->near_tile);
    sl_gradient_rows_add_to(&worker->rows, plan, queries);
  }
  order_neighbours(worker, plan);
  sl_gradient_rows_load(&worker->rows, plan, queries, worker->order, queries->count);
  add_segments(worker, plan, head, ranges->border_past, true, SL_REGION_PAST, plan->piece, plan->tile);
  add_segments(worker, plan, head, ranges->border_after, true, SL_REGION_AFTER, plan->piece, plan->tile);
  sl_gradient_rows_add_to(&worker->rows, plan, queries);
  if (ranges->self_apart) add_self_pairs(worker, plan, head);
}

/* Every key is kept: rows and keys in order of position. */
static void run_unsorted(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head, int64_t task,
                         const sl_key_ranges *ranges) {
  const sl_gated_attention_args *args = plan->args;
  bool all = !args->causal && args->window == 0;
  sl_gradient_chunk *chunk = head->chunk + head->sink_chunks;
  order_by_position(worker);
  sl_gradient_rows_load(&worker->rows, plan, &worker->queries, worker->order, worker->queries.count);
  for (int64_t i = 0; i < ranges->chunks; ++i) {
    if (args->causal && chunk[i].keys.begin > ranges->last) break;
    sl_key_head_wait(head, task, (int)i + 1);
    add_chunk(worker, plan, chunk + i, all ? SL_REGION_ALL : SL_REGION_PAST, plan->far_tile);
    if (args->window > 0) add_chunk(worker, plan, chunk + i, SL_REGION_NEAR, plan->near_tile);
    if (!args->causal && !all) add_chunk(worker, plan, chunk + i, SL_REGION_AFTER, plan->far_tile);
    sl_key_head_pass_on(head, task, (int)i + 1);
  }
  sl_key_head_wait(head, task, SL_TURN_OVER);
  for (int64_t i = 0; i < head->sink_chunks; ++i) {
    add_chunk(worker, plan, head->chunk + i, SL_REGION_SINKS, plan->far_tile);
  }
  sl_gradient_rows_add_to(&worker->rows, plan, &worker->queries);
}

void sl_backward_run_queries(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head,
                             int64_t task) {
  int64_t query_chunks = (plan->args->n_q + plan->query_chunk - 1) / plan->query_chunk;
  int64_t begin = (query_chunks - 1 - task / plan->group) * plan->query_chunk;
  int64_t end = smaller(begin + plan->query_chunk, plan->args->n_q);
  int64_t query_head = head->head_kv * plan->group + task % plan->group;
  sl_key_ranges ranges = sl_attention_key_ranges(plan, head->batch, head->head_kv, begin, end);
  sl_gradient_queries_load(&worker->queries, plan, head->batch, query_head, begin, end, ranges.self_apart);
  worker->mask_gradient = sl_mask_gradient_of_head(
      plan, head->batch, query_head, head->mask_gradient + task % plan->group * plan->args->n_q * plan->args->n_k);
  if (ranges.sorted) {
    run_sorted(worker, plan, head, task, &ranges);
  } else {
    run_unsorted(worker, plan, head, task, &ranges);
  }
  if (!sl_gradient_queries_store(&worker->queries, plan)) {
    atomic_store_explicit(&head->flawed, true, memory_order_relaxed);
  }
  sl_key_head_pass_on(head, task, SL_TURN_OVER);
}
