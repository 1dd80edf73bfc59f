/* One task of the tiled backward: a chunk of queries. */
#ifndef SL_ATTENTION_BACKWARD_QUERIES_H
#define SL_ATTENTION_BACKWARD_QUERIES_H

#include "attention/gradient_rows.h"
#include "attention/key_gradients.h"
#include "attention/mask_gradient.h"
#include "attention/staircase.h"

/* What one worker holds. */
typedef struct sl_backward_worker {
  sl_gradient_queries queries;
  sl_gradient_rows rows;
  sl_gradient_chunk segment; /* keys that are packed for one query chunk alone */
  sl_staircase staircase;
  float *dout_values;             /* <dout, v> of a block, like staircase.scores */
  void *weights, *score_gradient; /* scores and dout_values themselves where an element is a float */
  int32_t *order;
  sl_attention_mask mask_gradient; /* of the query head at hand */
} sl_backward_worker;

void sl_backward_worker_take(sl_backward_worker *worker, sl_arena *arena, const sl_attention_plan *plan);

/* Task number `task` of a key head: the gradients of a chunk of queries, and what they add to the keys'. Tasks go from
 * the last queries, which have the most keys, to the first. */
void sl_backward_run_queries(sl_backward_worker *worker, const sl_attention_plan *plan, sl_key_head *head,
                             int64_t task);

#endif
