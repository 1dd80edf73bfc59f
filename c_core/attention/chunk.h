/* A chunk of keys, packed for the micro-ops: in order of falling b, so that what a row keeps of it is a prefix, or in
 * order of position. */
#ifndef SL_ATTENTION_CHUNK_H
#define SL_ATTENTION_CHUNK_H

#include "attention/plan.h"
#include "runtime/arena.h"

/* Which packed operands a chunk holds. */
enum {
  SL_K_COLUMNS = 1, /* for q . k */
  SL_V_DEPTHS = 2,  /* for weights . v */
  SL_V_COLUMNS = 4, /* for dout . v */
  SL_K_DEPTHS = 8,  /* for score gradients . k */
};

typedef struct sl_key_chunk {
  int64_t begin, end; /* its tokens, before sorting */
  int64_t count;      /* end - begin, less those that lie in holes of a paged cache */
  int64_t capacity;   /* keys for which there is memory: the capacity of the depths */
  bool sorted;
  int32_t *index;                                    /* [capacity] tokens in packed order */
  int32_t *row;                                      /* [capacity] their token rows; index itself where not paged */
  float *b;                                          /* [capacity] clamped, NaN first, then falling (if sorted) */
  float *exp_minus_b;                                /* [capacity] */
  void *k_columns, *v_depths, *v_columns, *k_depths; /* NULL where not wanted */
} sl_key_chunk;

/* Takes the memory of a chunk of up to `keys` keys. parts is a sum of the constants above. */
void sl_key_chunk_take(sl_key_chunk *chunk, sl_arena *arena, const sl_attention_plan *plan, int64_t keys, int parts);

/* Sorts (or not) and packs the keys [begin, end) of one key head. At most SL_ATTENTION_MAX_CHUNK keys. */
void sl_key_chunk_fill(sl_key_chunk *chunk, const sl_attention_plan *plan, int64_t batch, int64_t head_kv,
                       int64_t begin, int64_t end, bool sorted);

/* How many keys of a chunk in order of position lie at or before `position`. */
int64_t sl_key_chunk_count_up_to(const sl_key_chunk *chunk, int64_t position);

/* How many leading keys of a sorted chunk each row keeps: those with not (a + b < tau). a falls, NaN first. */
void sl_key_chunk_find_prefixes(const sl_key_chunk *chunk, const float *a, int64_t rows, float tau, int32_t *lengths);

/* order becomes the numbers 0 .. count - 1 in order of falling keys, NaN first, equals in rising order.
 * count is at most SL_ATTENTION_MAX_CHUNK. */
void sl_sort_falling(const float *keys, int64_t count, int32_t *order);

#endif
