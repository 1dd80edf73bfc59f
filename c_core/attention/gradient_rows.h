/* Query rows on their way through the backward. What belongs to a query is computed once per query chunk; the rows are
 * then packed in whatever order a pass over keys wants them, and their sums are added back. */
#ifndef SL_ATTENTION_GRADIENT_ROWS_H
#define SL_ATTENTION_GRADIENT_ROWS_H

#include "attention/plan.h"
#include "attention/rows.h"
#include "runtime/arena.h"

/* The queries [begin, begin + count) of one head, in order. */
typedef struct sl_gradient_queries {
  int64_t batch, head, head_kv, begin, count;
  bool self_apart;        /* see sl_query_rows */
  float *a, *exp_minus_a; /* a is clamped */
  float *lse_log2;        /* lse * log2(e) */
  float *mean;            /* D_i = <dout_i, out_i> - dlse_i */
  float *da;              /* sums, */
  float *dq;              /* and rows of them, row_stride apart, before the factor scale */
} sl_gradient_queries;

/* Some of them, in an order of their own, packed for the micro-ops. */
typedef struct sl_gradient_rows {
  sl_query_rows query; /* what the staircase asks for, and the packed queries; there is no softmax state */
  void *dout;          /* packed rows of dout, row_stride_v elements apart */
  void *q_depths, *dout_depths;
  int64_t capacity; /* of the depths */
  float *lse_log2, *mean, *da, *dq;
} sl_gradient_rows;

void sl_gradient_queries_take(sl_gradient_queries *queries, sl_arena *arena, const sl_attention_plan *plan,
                              int64_t count);
void sl_gradient_rows_take(sl_gradient_rows *rows, sl_arena *arena, const sl_attention_plan *plan, int64_t count);

/* Reads what belongs to the queries and clears their sums. */
void sl_gradient_queries_load(sl_gradient_queries *queries, const sl_attention_plan *plan, int64_t batch, int64_t head,
                              int64_t begin, int64_t end, bool self_apart);

/* Packs the queries order[0 .. count), which are numbered from the first of the chunk, and clears the rows' sums. */
void sl_gradient_rows_load(sl_gradient_rows *rows, const sl_attention_plan *plan, const sl_gradient_queries *queries,
                           const int32_t *order, int64_t count);

/* A view of the rows [first, first + count); first is a multiple of row_tile. */
sl_gradient_rows sl_gradient_rows_part(const sl_gradient_rows *rows, const sl_attention_plan *plan, int64_t first,
                                       int64_t count);

/* Adds the sums of the rows to those of their queries. */
void sl_gradient_rows_add_to(const sl_gradient_rows *rows, const sl_attention_plan *plan, sl_gradient_queries *queries);

/* Writes dq and da. Returns whether all of it is finite. */
bool sl_gradient_queries_store(const sl_gradient_queries *queries, const sl_attention_plan *plan);

#endif
