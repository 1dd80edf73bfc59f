/* The two ways through the forward, and the memory that they need. */
#ifndef SL_ATTENTION_FORWARD_H
#define SL_ATTENTION_FORWARD_H

#include "attention/plan.h"

/* Tiles of queries against packed keys. */
sl_status sl_attention_tiled_workspace(const sl_attention_plan *plan, size_t *bytes);
sl_status sl_attention_run_tiled(const sl_attention_plan *plan);

/* Few queries, as in decoding: against keys where they lie. */
bool sl_attention_is_few_rows(const sl_gated_attention_args *args);
sl_status sl_attention_few_rows_workspace(const sl_attention_plan *plan, size_t *bytes);
sl_status sl_attention_run_few_rows(const sl_attention_plan *plan);

#endif
