/* Sorting and packing of a chunk of keys. */
#include "attention/chunk.h"

#include <math.h>

#include "attention/key_rows.h"
#include "attention/profile.h"

void sl_key_chunk_take(sl_key_chunk *chunk, sl_arena *arena, const sl_attention_plan *plan, int64_t keys, int parts) {
  size_t element = plan->kernel->element_size;
  int64_t capacity = sl_round_up(keys, SL_ATTENTION_STRIDE);
  *chunk = (sl_key_chunk){.capacity = capacity};
  chunk->index = sl_arena_take(arena, capacity, sizeof(int32_t));
  chunk->row = plan->args->block_table ? sl_arena_take(arena, capacity, sizeof(int32_t)) : chunk->index;
  chunk->b = sl_arena_take(arena, capacity, sizeof(float));
  chunk->exp_minus_b = sl_arena_take(arena, capacity, sizeof(float));
  if (parts & SL_K_COLUMNS) chunk->k_columns = sl_arena_take(arena, capacity * plan->depth, element);
  if (parts & SL_V_DEPTHS) chunk->v_depths = sl_arena_take(arena, capacity * plan->width_v, element);
  if (parts & SL_V_COLUMNS) chunk->v_columns = sl_arena_take(arena, capacity * plan->depth_v, element);
  if (parts & SL_K_DEPTHS) chunk->k_depths = sl_arena_take(arena, capacity * plan->width, element);
}

/* The keys of the chunk in order of position: their numbers, rows and b, which stays in exp_minus_b for a while. */
static void list_keys(sl_key_chunk *chunk, const sl_gated_attention_args *args, int64_t batch, int64_t head_kv,
                      int32_t *key, int32_t *row) {
  int64_t count = 0, step = args->b.token_stride;
  for (int64_t first = chunk->begin; first < chunk->end;) {
    sl_key_run run = sl_attention_key_run(args, batch, head_kv, first, chunk->end);
    for (int64_t i = 0; i < run.end - first && run.row >= 0; ++i, ++count) {
      chunk->exp_minus_b[count] = sl_attention_clamp_logit(run.b[i * step]);
      key[count] = (int32_t)(first + i);
      row[count] = (int32_t)(run.row + i);
    }
    first = run.end;
  }
  chunk->count = count;
}

static void order_keys(sl_key_chunk *chunk, const sl_gated_attention_args *args, int64_t batch, int64_t head_kv) {
  int32_t key[SL_ATTENTION_MAX_CHUNK], row[SL_ATTENTION_MAX_CHUNK];
  list_keys(chunk, args, batch, head_kv, key, row);
  int64_t count = chunk->count;
  float *b = chunk->exp_minus_b;
  if (chunk->sorted) {
    sl_sort_falling(b, count, chunk->index);
  } else {
    for (int64_t i = 0; i < count; ++i) chunk->index[i] = (int32_t)i;
  }
  for (int64_t i = 0; i < count; ++i) chunk->b[i] = b[chunk->index[i]];
  for (int64_t i = 0; i < count; ++i) {
    int32_t place = chunk->index[i];
    chunk->exp_minus_b[i] = expf(-chunk->b[i]);
    chunk->row[i] = row[place];
    chunk->index[i] = key[place];
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
  chunk->sorted = sorted;
  int64_t begun = sl_profile_start();
  order_keys(chunk, args, batch, head_kv);
  sl_profile_end(SL_PROFILE_SORT, begun);
  if (chunk->count == 0) return;
  begun = sl_profile_start();
  sl_token_rows k = sl_attention_key_rows(args, &args->k, batch, head_kv, args->head_dim);
  sl_token_rows v = sl_attention_key_rows(args, &args->v, batch, head_kv, args->head_dim_v);
  if (chunk->k_columns) kernel->pack_columns(chunk->k_columns, &k, chunk->row, chunk->count);
  if (chunk->v_depths) kernel->pack_depths(chunk->v_depths, chunk->capacity, &v, chunk->row, chunk->count);
  if (chunk->v_columns) kernel->pack_columns(chunk->v_columns, &v, chunk->row, chunk->count);
  if (chunk->k_depths) kernel->pack_depths(chunk->k_depths, chunk->capacity, &k, chunk->row, chunk->count);
  sl_profile_end(SL_PROFILE_PACK, begun);
}

int64_t sl_key_chunk_count_up_to(const sl_key_chunk *chunk, int64_t position) {
  if (position < chunk->begin) return 0;
  if (position >= chunk->end) return chunk->count;
  if (chunk->count == chunk->end - chunk->begin) return position - chunk->begin + 1;
  int64_t low = 0, high = chunk->count; /* index[0 .. low) are at or before, index[high ..] behind */
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (chunk->index[middle] <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
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
