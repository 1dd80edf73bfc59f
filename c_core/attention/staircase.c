/* The staircase: which keys of a chunk each row of a tile wants, and the blocks in which they are worked on. */
#include "attention/staircase.h"

#include <math.h>

#include "attention/dropout.h"

void sl_staircase_take(sl_staircase *staircase, sl_arena *arena, const sl_attention_plan *plan) {
  int64_t rows = plan->far_tile > plan->tile ? plan->far_tile : plan->tile;
  *staircase = (sl_staircase){.plan = plan, .score_stride = sl_round_up(plan->block, SL_ATTENTION_STRIDE)};
  staircase->lengths = sl_arena_take(arena, rows, sizeof(int32_t));
  staircase->block_lengths = sl_arena_take(arena, rows, sizeof(int32_t));
  staircase->lowest = sl_arena_take(arena, rows, sizeof(int32_t));
  staircase->highest = sl_arena_take(arena, rows, sizeof(int32_t));
  staircase->scores = sl_arena_take(arena, rows * staircase->score_stride, sizeof(float));
  sl_score_bend_take(&staircase->bend, arena, plan, rows, staircase->score_stride);
  staircase->weights = staircase->scores;
  if (plan->kernel->element_size != sizeof(float)) {
    staircase->weights = sl_arena_take(arena, rows * staircase->score_stride, plan->kernel->element_size);
  }
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* What the positions allow the rows, over all of them. */
typedef struct position_limits {
  int64_t lowest_least, lowest_most, highest_least, highest_most;
} position_limits;

/* The positions of a region that a row at `position` may see, cut to [-1, n_k]. */
static void region_range(const sl_attention_plan *plan, const sl_query_rows *rows, sl_key_region region,
                         int64_t position, int64_t *lowest, int64_t *highest) {
  const sl_gated_attention_args *args = plan->args;
  int64_t window = smaller(args->window, args->n_k + args->n_q); /* farther than any two tokens are apart */
  *lowest = -1;
  *highest = args->n_k;
  switch (region) {
    case SL_REGION_ALL: break;
    case SL_REGION_PAST: *highest = position - (rows->self_apart ? 1 : window); break;
    case SL_REGION_AFTER: *lowest = position + window; break;
    case SL_REGION_NEAR:
      *lowest = position - window + 1;
      *highest = args->causal ? position : position + window - 1;
      break;
    case SL_REGION_SINKS:
      if (args->causal) *highest = position;
      break;
  }
  int64_t sliding = smaller(args->sliding_window, args->n_k + args->n_q);
  if (sliding > 0) {
    *lowest = larger(*lowest, position - sliding + 1);
    *highest = smaller(*highest, position + sliding - 1);
  }
  *lowest = smaller(larger(*lowest, -1), args->n_k);
  *highest = smaller(larger(*highest, -1), args->n_k);
}

static position_limits limit_positions(sl_staircase *staircase, const sl_query_rows *rows, sl_key_region region) {
  position_limits limits = {INT64_MAX, -1, INT64_MAX, -1};
  for (int64_t r = 0; r < rows->count; ++r) {
    int64_t lowest, highest;
    region_range(staircase->plan, rows, region, rows->position[r], &lowest, &highest);
    staircase->lowest[r] = (int32_t)lowest;
    staircase->highest[r] = (int32_t)highest;
    limits.lowest_least = smaller(limits.lowest_least, lowest);
    limits.lowest_most = larger(limits.lowest_most, lowest);
    limits.highest_least = smaller(limits.highest_least, highest);
    limits.highest_most = larger(limits.highest_most, highest);
  }
  return limits;
}

/* Prefixes by position, in a chunk in order of position; a row is lengthened to what a later one needs.
 * Returns whether any was, so that a mask has to cut it. */
static bool count_positions(sl_staircase *staircase, const sl_query_rows *rows, const sl_key_chunk *chunk,
                            bool limited) {
  int64_t longest = 0;
  bool lengthened = false;
  for (int64_t r = rows->count - 1; r >= 0; --r) {
    int64_t highest = limited ? staircase->highest[r] : chunk->end - 1;
    int64_t wanted = sl_key_chunk_count_up_to(chunk, highest);
    lengthened |= wanted < longest;
    longest = larger(longest, wanted);
    staircase->lengths[r] = (int32_t)longest;
  }
  return lengthened;
}

/* The lengths of the block [start, start + plan->block) for the first `count` rows, which reach beyond its start. */
static void cut_lengths(sl_staircase *staircase, int64_t start, int64_t count) {
  const sl_attention_plan *plan = staircase->plan;
  int64_t padded = sl_round_up(count, plan->kernel->row_tile);
  for (int64_t r = 0; r < padded; ++r) {
    staircase->block_lengths[r] = r < count ? (int32_t)smaller(staircase->lengths[r] - start, plan->block) : 0;
  }
}

/* Counts the pairs of a block. Where places or a mask leave holes in the rows' prefixes, each is looked at. */
static void count_kept(const sl_staircase *staircase, const sl_query_rows *rows, const sl_key_chunk *chunk,
                       int64_t start, int64_t count, bool masked) {
  const int32_t *lengths = staircase->block_lengths, *key = chunk->index + start;
  const float *mask = staircase->bend.mask;
  for (int64_t r = 0; r < count; ++r) {
    int32_t lowest = masked ? staircase->lowest[r] : INT32_MIN, highest = masked ? staircase->highest[r] : INT32_MAX;
    int32_t kept = masked || mask ? 0 : lengths[r];
    if (mask) {
      const float *row = mask + r * staircase->bend.stride;
      for (int64_t j = 0; j < lengths[r]; ++j) kept += (row[j] != -INFINITY) & (key[j] >= lowest) & (key[j] <= highest);
    } else if (masked) {
      for (int64_t j = 0; j < lengths[r]; ++j) kept += (key[j] >= lowest) & (key[j] <= highest);
    }
    rows->kept[r] += kept;
  }
}

static void attend_block(void *context, sl_staircase *staircase, const sl_key_chunk *chunk, int64_t start,
                         int64_t count, bool gated, bool masked) {
  const sl_query_rows *rows = context;
  const sl_attention_plan *plan = staircase->plan;
  const sl_attention_kernel *kernel = plan->kernel;
  const int32_t *lengths = staircase->block_lengths;
  const char *columns = (const char *)chunk->k_columns + (size_t)(start * plan->depth) * kernel->element_size;
  const char *depths = (const char *)chunk->v_depths + (size_t)(start * kernel->panel) * kernel->element_size;
  sl_score_bend *bend = &staircase->bend;
  if (plan->bends_scores && !sl_score_bend_load(bend, plan, rows, chunk, start, count, lengths)) return;
  if (plan->args->kept) count_kept(staircase, rows, chunk, start, count, masked);
  kernel->multiply_nt(count, lengths, rows->packed, plan->row_stride, columns, plan->depth, staircase->scores,
                      staircase->score_stride);
  if (plan->bends_scores) sl_score_bend_apply(bend, plan, rows, chunk, start, count, lengths, staircase->scores);
  if (masked) {
    kernel->mask_tile(count, lengths, staircase->scores, staircase->score_stride, chunk->index + start,
                      staircase->lowest, staircase->highest);
  }
  sl_softmax_tile tile = {.rows = count,
                          .lengths = lengths,
                          .scores = staircase->scores,
                          .score_stride = staircase->score_stride,
                          .weights = staircase->weights,
                          .weight_stride = staircase->score_stride,
                          .scale_log2e = plan->scale_log2e,
                          .exp_minus_a = gated ? rows->exp_minus_a : NULL,
                          .exp_minus_b = chunk->exp_minus_b + start,
                          .maximum = rows->maximum,
                          .sum = rows->sum,
                          .out = rows->out,
                          .out_stride = plan->row_stride_v,
                          .out_width = plan->width_v};
  kernel->softmax_tile(&tile);
  sl_dropout_clear(plan->args, rows->batch, rows->head, rows->token, chunk->index + start, count, lengths,
                   staircase->weights, staircase->score_stride, kernel->element_size);
  kernel->multiply_nn(count, lengths, staircase->weights, staircase->score_stride, depths, chunk->capacity,
                      plan->width_v, rows->out, plan->row_stride_v);
}

void sl_staircase_attend(sl_staircase *staircase, sl_query_rows *rows, const sl_key_chunk *chunk,
                         sl_key_region region) {
  sl_staircase_walk(staircase, rows, chunk, region, attend_block, rows);
}

void sl_staircase_walk(sl_staircase *staircase, const sl_query_rows *rows, const sl_key_chunk *chunk,
                       sl_key_region region, sl_block_function function, void *context) {
  const sl_attention_plan *plan = staircase->plan;
  bool gated = region == SL_REGION_ALL || region == SL_REGION_PAST || region == SL_REGION_AFTER;
  if (rows->count == 0 || chunk->count == 0) return;
  position_limits limits = {-1, -1, plan->args->n_k, plan->args->n_k};
  bool limited = region != SL_REGION_ALL || plan->args->sliding_window > 0;
  if (limited) limits = limit_positions(staircase, rows, region);
  if (limits.highest_most < chunk->begin || limits.lowest_least >= chunk->end) return;
  bool whole = limits.lowest_most <= chunk->begin && limits.highest_least >= chunk->end - 1;
  bool lengthened = false;
  int64_t start = 0;
  if (chunk->sorted) {
    sl_key_chunk_find_prefixes(chunk, rows->a, rows->count, rows->logit_tau, staircase->lengths);
  } else {
    lengthened = count_positions(staircase, rows, chunk, limited);
    start = sl_key_chunk_count_up_to(chunk, limits.lowest_least - 1) / SL_ATTENTION_STRIDE * SL_ATTENTION_STRIDE;
  }
  int64_t count = rows->count;
  for (; start < staircase->lengths[0]; start += plan->block) {
    while (staircase->lengths[count - 1] <= start) --count;
    bool masked = !whole;
    if (!chunk->sorted) {
      int64_t first = chunk->index[start], last = chunk->index[smaller(chunk->count, start + plan->block) - 1];
      masked = limits.lowest_most > first || (lengthened && limits.highest_least < last);
    }
    cut_lengths(staircase, start, count);
    function(context, staircase, chunk, start, count, gated, masked);
  }
}
