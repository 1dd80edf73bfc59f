/* Which keys a chunk of queries meets, and how: the border between what a gate chooses and what is near. */
#ifndef SL_ATTENTION_KEY_RANGES_H
#define SL_ATTENTION_KEY_RANGES_H

#include "attention/plan.h"

typedef struct sl_key_range {
  int64_t begin, end;
} sl_key_range;

/* All ranges are of keys, and empty where there are none. Chunk i of a key head holds those keys of [base, end) that
 * lie in [grid + i * plan->chunk, grid + (i + 1) * plan->chunk). Sorted chunks end where the far keys of query chunks
 * end, so that little is left over. Whole chunks concern every query of the query chunk alike. */
typedef struct sl_key_ranges {
  bool sorted;          /* pairs are dropped, so that chunks are sorted */
  bool self_apart;      /* the pair of a query and its own key is in none of the ranges below: see sl_query_rows */
  sl_key_bounds bounds; /* sinks: [bounds.begin, bounds.sinks) */
  int64_t base, end;    /* the other keys */
  int64_t grid, chunks; /* of those: where the first chunk would begin if it were a whole one, and how many there are */
  int64_t first, last;  /* positions of the first and the last query */
  /* Sorted only: */
  int64_t past_whole;                     /* chunks [0, past_whole) are far before every query */
  int64_t after_whole;                    /* chunks [after_whole, chunks) are far behind every query */
  sl_key_range past, after;               /* far from every query too, but not whole chunks */
  sl_key_range border_past, border_after; /* far from some queries */
  sl_key_range near;                      /* in the window of some queries */
} sl_key_ranges;

/* For the queries [begin, end) of key head head_kv. */
sl_key_ranges sl_attention_key_ranges(const sl_attention_plan *plan, int64_t batch, int64_t head_kv, int64_t begin,
                                      int64_t end);

/* The keys of chunk i. */
sl_key_range sl_key_ranges_chunk(const sl_key_ranges *ranges, const sl_attention_plan *plan, int64_t i);

#endif
