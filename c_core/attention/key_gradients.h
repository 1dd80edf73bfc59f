/* The key side of the backward: packed chunks of one key head, the sums of their gradients in packed order, and the
 * turns in which tasks add to them. */
#ifndef SL_ATTENTION_KEY_GRADIENTS_H
#define SL_ATTENTION_KEY_GRADIENTS_H

#include <stdatomic.h>

#include "attention/chunk.h"
#include "attention/key_ranges.h"

typedef struct sl_gradient_chunk {
  sl_key_chunk keys;
  float *dk, *dv; /* [capacity] rows of row_stride and row_stride_v; dk before the factor scale */
  float *db;      /* [capacity] */
} sl_gradient_chunk;

void sl_gradient_chunk_take(sl_gradient_chunk *chunk, sl_arena *arena, const sl_attention_plan *plan, int64_t keys);

/* Clears the sums of the chunk's keys. */
void sl_gradient_chunk_clear(sl_gradient_chunk *chunk, const sl_attention_plan *plan);

/* One key head. Chunks [0, sink_chunks) hold the sinks, the others the keys behind them. */
typedef struct sl_key_head {
  int64_t batch, head_kv;
  sl_key_bounds bounds;
  int64_t sink_chunks, chunks;
  int64_t grid;             /* see sl_key_ranges */
  sl_gradient_chunk *chunk; /* [chunks], sinks included */
  int32_t *place;           /* [n_k] where in its chunk a token lies */
  atomic_int *turns;        /* [tasks of the head] how far each task has come */
  float *mask_gradient;     /* [query heads of the head][n_q][n_k], if it needs any */
  atomic_bool flawed;       /* something non-finite came up: the formula has to say where it belongs */
} sl_key_head;

enum { SL_TURN_OVER = INT32_MAX };

/* Waits until the task before `task` has finished with the first `chunks` chunks (SL_TURN_OVER: with everything).
 * Tasks are handed out in order, so a task that is waited for is running or done. */
void sl_key_head_wait(const sl_key_head *head, int64_t task, int chunks);

/* Lets the next task add to the first `chunks` chunks. */
void sl_key_head_pass_on(sl_key_head *head, int64_t task, int chunks);

/* Adds the sums of keys that were packed apart to those of the head. */
void sl_key_head_add(sl_key_head *head, const sl_attention_plan *plan, const sl_gradient_chunk *part);

/* Writes dk, dv and db of one chunk. */
void sl_key_head_store(sl_key_head *head, const sl_attention_plan *plan, int64_t number);

#endif
