/* Query rows on their way through a task: gathered from the caller's tensor, packed, with their softmax state. */
#ifndef SL_ATTENTION_ROWS_H
#define SL_ATTENTION_ROWS_H

#include "attention/plan.h"
#include "runtime/arena.h"

typedef struct sl_query_rows {
  int64_t batch, head, head_kv;
  float logit_tau;
  bool self_apart;   /* causal, no window, pairs are dropped: the row's own key, which is always kept, is attended to
                         when the row is loaded, and the regions leave it out */
  int64_t count;     /* rows; everything below has memory for whole groups of row_tile */
  int32_t *token;    /* query numbers */
  int32_t *position; /* p_i, the place among the keys */
  float *a;          /* clamped */
  float *exp_minus_a;
  void *packed; /* [row_stride] elements a row */
  float *maximum, *sum;
  int32_t *kept; /* pairs that were attended to */
  float *out;    /* [width_v], stride row_stride_v */
} sl_query_rows;

/* Takes the memory of up to `count` rows. */
void sl_query_rows_take(sl_query_rows *rows, sl_arena *arena, const sl_attention_plan *plan, int64_t count);

/* Loads the queries [begin, end) of one head (at most SL_ATTENTION_MAX_CHUNK). sorted, where pairs are dropped: in
 * tiles of plan->tile neighbours, each by falling a (NaN first); else from the last to the first. Their state is empty,
 * or holds their own key alone (self_apart). */
void sl_query_rows_load(sl_query_rows *rows, const sl_attention_plan *plan, int64_t batch, int64_t head, int64_t begin,
                        int64_t end, bool sorted);

/* Copies the rows order[0 .. count) of source, with their state. */
void sl_query_rows_gather(sl_query_rows *rows, const sl_attention_plan *plan, const sl_query_rows *source,
                          const int32_t *order, int64_t count);

/* A view of the rows [first, first + count); first is a multiple of row_tile. */
sl_query_rows sl_query_rows_part(const sl_query_rows *rows, const sl_attention_plan *plan, int64_t first,
                                 int64_t count);

/* Divides by the sums and writes out and lse. Rows that came out non-finite are computed anew by the formula. */
void sl_query_rows_store(sl_query_rows *rows, const sl_attention_plan *plan);

/* out and lse of one query by the formula, in double, pair by pair: the way out where NaN or infinity of a dropped pair
 * may have leaked into a tile. */
void sl_attention_compute_row(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query);

#endif
