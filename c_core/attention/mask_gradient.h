/* The gradient of the mask: ds of every pair, summed over what the mask is broadcast over. Tasks write it head by head,
 * to places of their own; where the mask is broadcast, these lie in the workspace, and are added up afterwards in a
 * fixed order. */
#ifndef SL_ATTENTION_MASK_GRADIENT_H
#define SL_ATTENTION_MASK_GRADIENT_H

#include "attention/plan.h"
#include "attention/rows.h"

/* Bytes of workspace for one query head; 0 where no gradient is asked for, or the tasks write to the target. */
size_t sl_mask_gradient_bytes(const sl_attention_plan *plan);

/* Clears the target. */
void sl_mask_gradient_clear(const sl_attention_plan *plan);

/* Where ds of a query head goes: a mask of which one (batch, head) is there. data NULL: no gradient is asked for.
 * workspace: of the head, if it needs any. */
sl_attention_mask sl_mask_gradient_of_head(const sl_attention_plan *plan, int64_t batch, int64_t head,
                                           float *workspace);

/* Adds ds of a block to its head. */
void sl_mask_gradient_add(const sl_attention_mask *of_head, const sl_query_rows *rows, const int32_t *keys,
                          int64_t count, const int32_t *lengths, const float *score_gradient, int64_t stride);

/* Adds the workspaces of the query heads [first, first + heads), counted over all the batch, to the target. */
void sl_mask_gradient_reduce(const sl_attention_plan *plan, int64_t first, int64_t heads, const float *workspace);

#endif
