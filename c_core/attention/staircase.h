/* The staircase: a tile of query rows, each with a prefix of a key chunk, and these prefixes never growing. */
#ifndef SL_ATTENTION_STAIRCASE_H
#define SL_ATTENTION_STAIRCASE_H

#include "attention/chunk.h"
#include "attention/rows.h"
#include "attention/score_bend.h"

/* Which keys of a chunk the rows may see. */
typedef enum sl_key_region {
  SL_REGION_ALL,   /* every one */
  SL_REGION_PAST,  /* those at least `window` before the row; from the row before on where rows keep themselves apart */
  SL_REGION_AFTER, /* full attention: from distance window on, behind the row */
  SL_REGION_NEAR,  /* the window; not gated */
  SL_REGION_SINKS, /* up to the row if causal, else all; not gated */
} sl_key_region;

/* Memory of one worker for a tile. */
typedef struct sl_staircase {
  const sl_attention_plan *plan;
  int32_t *lengths, *block_lengths; /* [rows of a tile] */
  int32_t *lowest, *highest;        /* [rows of a tile]: the positions that a row may see */
  float *scores;                    /* [rows of a tile][score_stride] */
  void *weights;                    /* the scores themselves where an element is a float */
  int64_t score_stride;
  sl_score_bend bend;
} sl_staircase;

void sl_staircase_take(sl_staircase *staircase, sl_arena *arena, const sl_attention_plan *plan);

/* What is done with a block of a chunk: the keys from start on, of which the first `count` rows have
 * staircase->block_lengths each. gated: the region's pairs have a gate. masked: lowest and highest must be applied. */
typedef void (*sl_block_function)(void *context, sl_staircase *staircase, const sl_key_chunk *chunk, int64_t start,
                                  int64_t count, bool gated, bool masked);

/* Calls function for every block of the chunk in which some row has keys of the region, in order. A chunk that is
 * sorted is cut by the rows' threshold, which needs rows in order of falling a. At most a tile of rows. */
void sl_staircase_walk(sl_staircase *staircase, const sl_query_rows *rows, const sl_key_chunk *chunk,
                       sl_key_region region, sl_block_function function, void *context);

/* Adds the keys of a chunk that lie in a region to the softmax state of the rows. */
void sl_staircase_attend(sl_staircase *staircase, sl_query_rows *rows, const sl_key_chunk *chunk, sl_key_region region);

#endif
