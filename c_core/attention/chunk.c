/* Sorting and packing of a chunk of keys. */
#include "attention/chunk.h"

#include <math.h>

void sl_key_chunk_take(sl_key_chunk *chunk, sl_arena *arena, const sl_attention_plan *plan, int64_t keys, int parts) {
  size_t element = plan->kernel->element_size;
  int64_t capacity = sl_round_up(keys, SL_ATTENTION_STRIDE);
  *chunk = (sl_key_chunk){.capacity = capacity};
  chunk->index = sl_arena_take(arena, capacity, sizeof(int32_t));
  chunk->b = sl_arena_take(arena, capacity, sizeof(float));
  chunk->exp_minus_b = sl_arena_take(arena, capacity, sizeof(float));
  if (parts & SL_K_COLUMNS) chunk->k_columns = sl_arena_take(arena, capacity * plan->depth, element);
  if (parts & SL_V_DEPTHS) chunk->v_depths = sl_arena_take(arena, capacity * plan->width_v, element);
  if (parts & SL_V_COLUMNS) chunk->v_columns = sl_arena_take(arena, capacity * plan->depth_v, element);
  if (parts & SL_K_DEPTHS) chunk->k_depths = sl_arena_take(arena, capacity * plan->width, element);
}

static void order_keys(sl_key_chunk *chunk, const sl_gated_attention_args *args, int64_t batch, int64_t head_kv) {
  int64_t count = chunk->count;
  float *b = chunk->exp_minus_b; /* in order of position for a while */
  const float *source = sl_attention_at3(&args->b, batch, head_kv, chunk->begin);
  for (int64_t i = 0; i < count; ++i) b[i] = sl_attention_clamp_logit(source[i * args->b.token_stride]);
  if (chunk->sorted) {
    sl_sort_falling(b, count, chunk->index);
  } else {
    for (int64_t i = 0; i < count; ++i) chunk->index[i] = (int32_t)i;
  }
  for (int64_t i = 0; i < count; ++i) chunk->b[i] = b[chunk->index[i]];
  for (int64_t i = 0; i < count; ++i) {
    chunk->exp_minus_b[i] = expf(-chunk->b[i]);
    chunk->index[i] += (int32_t)chunk->begin;
  }
  for (int64_t i = count; i < chunk->capacity; ++i) {
    chunk->index[i] = 0;
    chunk->b[i] = -SL_GATE_LOGIT_LIMIT;
    chunk->exp_minus_b[i] = 1;
  }
}

void sl_key_chunk_fill(sl_key_chunk *chunk, const sl_attention_plan *plan, int64_t batch, int64_t head_kv,
                       int64_t begin, int64_t end, bool sorted) {
  const sl_gated_attention_args *args = plan->args;
  const sl_attention_kernel *kernel = plan->kernel;
  chunk->begin = begin;
  chunk->end = end;
  chunk->count = end - begin;
  chunk->sorted = sorted;
  if (chunk->count == 0) return;
  order_keys(chunk, args, batch, head_kv);
  sl_token_rows k = sl_attention_token_rows(args, &args->k, batch, head_kv, args->head_dim);
  sl_token_rows v = sl_attention_token_rows(args, &args->v, batch, head_kv, args->head_dim_v);
  if (chunk->k_columns) kernel->pack_columns(chunk->k_columns, &k, chunk->index, chunk->count);
  if (chunk->v_depths) kernel->pack_depths(chunk->v_depths, chunk->capacity, &v, chunk->index, chunk->count);
  if (chunk->v_columns) kernel->pack_columns(chunk->v_columns, &v, chunk->index, chunk->count);
  if (chunk->k_depths) kernel->pack_depths(chunk->k_depths, chunk->capacity, &k, chunk->index, chunk->count);
}

void sl_key_chunk_find_prefixes(const sl_key_chunk *chunk, const float *a, int64_t rows, float tau, int32_t *lengths) {
  const float *b = chunk->b;
  int64_t kept = 0, open = rows > 0 ? chunk->count : 0;
  /* The first row's by halving: b[0 .. kept) is kept, b[kept .. kept + open) is open. */
  while (open > 0) {
    int64_t half = (open + 1) / 2;
    if (a[0] + b[kept + half - 1] < tau) {
      open = half - 1;
    } else {
      kept += half;
      open -= half;
    }
  }
  /* The others' are no longer than the one before, and mostly not much shorter. */
  for (int64_t r = 0; r < rows; ++r) {
    while (kept > 0 && a[r] + b[kept - 1] < tau) --kept;
    lengths[r] = (int32_t)kept;
  }
}
