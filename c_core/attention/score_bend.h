/* What happens to a block of scores between the product and the softmax: cap, slope, mask. */
#ifndef SL_ATTENTION_SCORE_BEND_H
#define SL_ATTENTION_SCORE_BEND_H

#include "attention/chunk.h"
#include "attention/rows.h"

/* Memory of one worker for a tile; each NULL where the call does not need it. */
typedef struct sl_score_bend {
  float *mask;    /* [rows of a tile][score_stride]: of the block at hand */
  float *bend;    /* the same: dr / ds, for the backward */
  int64_t stride; /* score_stride */
} sl_score_bend;

void sl_score_bend_take(sl_score_bend *bend, sl_arena *arena, const sl_attention_plan *plan, int64_t rows,
                        int64_t stride);

/* Gathers the mask of a block of the chunk, as sl_block_function describes it. Returns whether it leaves any pair. */
bool sl_score_bend_load(sl_score_bend *bend, const sl_attention_plan *plan, const sl_query_rows *rows,
                        const sl_key_chunk *chunk, int64_t start, int64_t count, const int32_t *lengths);

/* Turns the block's products into scores. */
void sl_score_bend_apply(const sl_score_bend *bend, const sl_attention_plan *plan, const sl_query_rows *rows,
                         const sl_key_chunk *chunk, int64_t start, int64_t count, const int32_t *lengths,
                         float *scores);

/* The same for one row, whose scores and mask (or NULL) are aligned and owned as a tile's. */
void sl_score_bend_row(const sl_attention_plan *plan, int64_t batch, int64_t head, int32_t position,
                       const int32_t *keys, int64_t count, const float *mask, float *scores);

/* target[j] = the mask at keys[j], from the element at `first` on. */
void sl_mask_gather(float *target, const sl_attention_mask *mask, int64_t first, const int32_t *keys, int64_t count);

/* Turns the block's ds into dr. */
void sl_score_bend_differentiate(const sl_score_bend *bend, int64_t count, const int32_t *lengths,
                                 float *score_gradient);

/* The same for one pair: the score of a product, and in *bend dr / ds. */
float sl_score_bend_pair(const sl_attention_plan *plan, int64_t batch, int64_t head, int64_t query, int64_t position,
                         int64_t key, float product, float *bend);

#endif
