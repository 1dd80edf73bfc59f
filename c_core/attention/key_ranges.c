/* Cutting the keys of a query chunk into ranges. */
#include "attention/key_ranges.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static sl_key_range cut(const sl_key_ranges *ranges, int64_t begin, int64_t end) {
  sl_key_range range = {larger(begin, ranges->base), smaller(end, ranges->end)};
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

/* The largest place up to base that is a whole number of chunks away from where the first query's far keys end. */
static int64_t place_grid(const sl_attention_plan *plan, int64_t base, int64_t far_end) {
  int64_t over = (base - far_end) % plan->chunk;
  return base - (over < 0 ? over + plan->chunk : over);
}

sl_key_range sl_key_ranges_chunk(const sl_key_ranges *ranges, const sl_attention_plan *plan, int64_t i) {
  int64_t begin = ranges->grid + i * plan->chunk;
  return cut(ranges, begin, begin + plan->chunk);
}

sl_key_ranges sl_attention_key_ranges(const sl_attention_plan *plan, int64_t batch, int64_t head_kv, int64_t begin,
                                      int64_t end) {
  const sl_gated_attention_args *args = plan->args;
  sl_key_ranges ranges = {.sorted = sl_attention_drops_pairs(plan, batch, head_kv)};
  ranges.self_apart = ranges.sorted && args->causal && args->window == 0;
  ranges.bounds = sl_attention_key_bounds(args, batch);
  int64_t offset = sl_attention_q_offset(args, batch);
  ranges.base = ranges.bounds.sinks;
  ranges.end = ranges.bounds.end;
  int64_t window = smaller(args->window, args->n_k + args->n_q), gap = larger(window, 1);
  bool bordered = ranges.sorted && (args->causal || window > 0);
  ranges.grid = bordered ? place_grid(plan, ranges.base, offset - gap + 1) : ranges.base;
  if (ranges.base < ranges.end) ranges.chunks = (ranges.end - ranges.grid + plan->chunk - 1) / plan->chunk;
  ranges.first = begin + offset;
  ranges.last = end - 1 + offset;
  ranges.after_whole = ranges.chunks;
  if (!ranges.sorted) return ranges;
  if (!bordered) {
    ranges.past_whole = ranges.chunks;
    return ranges;
  }
  /* Keys up to position - gap are far before a query, those from position + gap on far behind it. */
  int64_t far_end = smaller(larger(ranges.first - gap + 1, ranges.base), ranges.end);
  ranges.past_whole = far_end == ranges.end ? ranges.chunks : (far_end - ranges.grid) / plan->chunk;
  ranges.past = cut(&ranges, ranges.grid + ranges.past_whole * plan->chunk, far_end);
  ranges.border_past = cut(&ranges, ranges.first - gap + 1, ranges.last - gap + 1);
  if (window > 0) ranges.near = cut(&ranges, ranges.first - window + 1, ranges.last + (args->causal ? 1 : window));
  if (!args->causal) {
    int64_t far_begin = smaller(larger(ranges.last + gap, ranges.base), ranges.end);
    ranges.after_whole = (far_begin - ranges.grid + plan->chunk - 1) / plan->chunk;
    ranges.after = cut(&ranges, far_begin, ranges.grid + ranges.after_whole * plan->chunk);
    ranges.border_after = cut(&ranges, ranges.first + gap, ranges.last + gap);
  }
  return ranges;
}
