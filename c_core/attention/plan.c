/* Sizes: how many keys are sorted together, how many queries make a task. */
#include "attention/plan.h"

#include <math.h>

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Keys that are sorted together, in tiles. Long chunks keep rounding to whole panels cheap and prefixes smooth; short
 * ones leave less to the border of a query chunk, where sorted order and position have to be looked at together. */
static int64_t choose_chunk_tiles(const sl_gated_attention_args *args) {
  return args->n_k < 1536 ? 4 : args->n_k < 6144 ? 8 : 16;
}

/* Queries of one task, in tiles: chunks of keys and of queries that end together leave no rest; but there should be
 * tasks enough for many threads. Must not depend on their number: the order of additions follows from it. */
static int64_t choose_query_tiles(const sl_gated_attention_args *args, int64_t tile) {
  int64_t tiles = args->n_k < 1536 ? 4 : 8;
  while (tiles > 2 && args->batch * args->heads_q * (args->n_q / (tiles * tile) + 1) < 32) tiles /= 2;
  return tiles;
}

sl_attention_plan sl_attention_make_plan(const sl_gated_attention_args *args, const sl_attention_kernel *kernel) {
  sl_attention_plan plan = {.args = args, .kernel = kernel};
  plan.group = args->heads_q / args->heads_kv;
  plan.depth = sl_round_up(args->head_dim, kernel->depth_step);
  plan.depth_v = sl_round_up(args->head_dim_v, kernel->depth_step);
  plan.width = sl_round_up(args->head_dim, kernel->panel);
  plan.width_v = sl_round_up(args->head_dim_v, kernel->panel);
  plan.row_stride = sl_round_up(args->head_dim, SL_ATTENTION_STRIDE);
  plan.row_stride_v = sl_round_up(args->head_dim_v, SL_ATTENTION_STRIDE);
  plan.block = 128;
  plan.tile = sl_round_up(48, kernel->row_tile);
  plan.far_tile = 2 * plan.tile;
  plan.near_tile = sl_round_up(24, kernel->row_tile);
  plan.piece = 2 * plan.tile;
  plan.chunk = plan.tile * choose_chunk_tiles(args);
  plan.query_chunk = plan.tile * choose_query_tiles(args, plan.tile);
  double scale = args->scale * 1.4426950408889634;
  plan.factor = scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f;
  plan.scale_log2e = scale == 0 ? 1.0f : (float)fabs(scale);
  plan.scale = scale == 0 ? 1.0f : (float)fabs(args->scale);
  plan.bends_scores = args->softcap > 0 || args->alibi_slopes || args->attn_mask.data;
  if (plan.bends_scores) plan.scale_log2e = 1.44269504f;
  return plan;
}

sl_key_bounds sl_attention_key_bounds(const sl_gated_attention_args *args, int64_t batch) {
  sl_key_bounds bounds = {0, args->n_k, 0};
  if (args->key_range) {
    bounds.begin = args->key_range[2 * batch];
    bounds.end = args->key_range[2 * batch + 1];
  }
  int64_t text_begin = args->text_begin ? args->text_begin[batch] : bounds.begin;
  int64_t first = sl_attention_q_offset(args, batch), last = first + args->n_q - 1;
  int64_t sliding = smaller(args->sliding_window, args->n_k + args->n_q); /* farther than any two tokens are apart */
  if (args->causal) bounds.end = smaller(bounds.end, last + 1);
  if (sliding > 0) {
    bounds.begin = larger(bounds.begin, first - sliding + 1);
    bounds.end = smaller(bounds.end, last + sliding);
  }
  bounds.begin = smaller(bounds.begin, args->n_k);
  bounds.end = larger(bounds.end, bounds.begin);
  bounds.sinks = text_begin + smaller(args->sinks, args->n_k - text_begin);
  bounds.sinks = smaller(larger(bounds.sinks, bounds.begin), bounds.end);
  return bounds;
}

bool sl_attention_drops_pairs(const sl_attention_plan *plan, int64_t batch, int64_t head_kv) {
  for (int64_t head = head_kv * plan->group; head < (head_kv + 1) * plan->group; ++head) {
    if (sl_attention_logit_tau(plan->args, batch, head) > -INFINITY) return true;
  }
  return false;
}
