/* The key side of the backward. */
#include "attention/key_gradients.h"

#include <math.h>
#include <string.h>

#include "attention/gradient_rows.h"
#include "runtime/executor.h"
#include "runtime/number.h"

void sl_gradient_chunk_take(sl_gradient_chunk *chunk, sl_arena *arena, const sl_attention_plan *plan, int64_t keys) {
  sl_key_chunk_take(&chunk->keys, arena, plan, keys, SL_K_COLUMNS | SL_V_COLUMNS | SL_K_DEPTHS);
  int64_t capacity = chunk->keys.capacity;
  chunk->dk = sl_arena_take(arena, capacity * plan->row_stride, sizeof(float));
  chunk->dv = sl_arena_take(arena, capacity * plan->row_stride_v, sizeof(float));
  chunk->db = sl_arena_take(arena, capacity, sizeof(float));
}

void sl_gradient_chunk_clear(sl_gradient_chunk *chunk, const sl_attention_plan *plan) {
  size_t count = (size_t)chunk->keys.count;
  memset(chunk->dk, 0, count * (size_t)plan->row_stride * sizeof(float));
  memset(chunk->dv, 0, count * (size_t)plan->row_stride_v * sizeof(float));
  memset(chunk->db, 0, (size_t)chunk->keys.capacity * sizeof(float));
}

void sl_key_head_wait(const sl_key_head *head, int64_t task, int chunks) {
  if (task == 0) return;
  for (int64_t turn = 0; atomic_load_explicit(head->turns + task - 1, memory_order_acquire) < chunks; ++turn) {
    sl_wait_a_turn(turn);
  }
}

void sl_key_head_pass_on(sl_key_head *head, int64_t task, int chunks) {
  atomic_store_explicit(head->turns + task, chunks, memory_order_release);
}

static void add_rows(float *sum, const float *part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
}

void sl_key_head_add(sl_key_head *head, const sl_attention_plan *plan, const sl_gradient_chunk *part) {
  for (int64_t j = 0; j < part->keys.count; ++j) {
    int64_t token = part->keys.index[j];
    int64_t number = token < head->bounds.sinks ? (token - head->bounds.begin) / plan->chunk
                                                : head->sink_chunks + (token - head->grid) / plan->chunk;
    sl_gradient_chunk *chunk = head->chunk + number;
    int64_t place = head->place[token];
    add_rows(chunk->dk + place * plan->row_stride, part->dk + j * plan->row_stride, plan->row_stride);
    add_rows(chunk->dv + place * plan->row_stride_v, part->dv + j * plan->row_stride_v, plan->row_stride_v);
    chunk->db[place] += part->db[j];
  }
}

void sl_key_head_store(sl_key_head *head, const sl_attention_plan *plan, int64_t number) {
  const sl_gated_attention_args *args = plan->args;
  const sl_gradient_chunk *chunk = head->chunk + number;
  int64_t count = chunk->keys.count;
  float scale[SL_ATTENTION_MAX_CHUNK], one[SL_ATTENTION_MAX_CHUNK];
  for (int64_t j = 0; j < count; ++j) {
    int64_t token = chunk->keys.index[j];
    scale[j] = (float)args->scale;
    one[j] = 1;
    bool clamped = fabsf(*sl_attention_at3(&args->b, head->batch, head->head_kv, token)) > SL_GATE_LOGIT_LIMIT;
    *sl_attention_at3(&args->db, head->batch, head->head_kv, token) = clamped ? 0 : chunk->db[j];
  }
  sl_token_rows dk = sl_attention_token_rows(args, &args->dk, head->batch, head->head_kv, args->head_dim);
  sl_token_rows dv = sl_attention_token_rows(args, &args->dv, head->batch, head->head_kv, args->head_dim_v);
  plan->kernel->store_rows((void *)(uintptr_t)dk.data, dk.token_stride, dk.channels, chunk->keys.index, count,
                           chunk->dk, plan->row_stride, scale);
  plan->kernel->store_rows((void *)(uintptr_t)dv.data, dv.token_stride, dv.channels, chunk->keys.index, count,
                           chunk->dv, plan->row_stride_v, one);
  if (!(sl_all_finite(chunk->dk, count * plan->row_stride) && sl_all_finite(chunk->dv, count * plan->row_stride_v) &&
        sl_all_finite(chunk->db, count))) {
    atomic_store_explicit(&head->flawed, true, memory_order_relaxed);
  }
}
