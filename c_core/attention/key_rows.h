/* Where keys lie. Positions and masks go by the number of a key; the index lists of the micro-ops name its token row:
 * the same number in a dense tensor, what the block table says in a paged cache. */
#ifndef SL_ATTENTION_KEY_ROWS_H
#define SL_ATTENTION_KEY_ROWS_H

#include "attention/plan.h"

/* Neighbouring keys whose rows lie one behind the other. */
typedef struct sl_key_run {
  int64_t end;
  int64_t row;    /* of the first key, of k and of v; below 0 in a hole, where no key is */
  const float *b; /* of the first key; the others follow at args->b.token_stride */
} sl_key_run;

/* The run of keys from `key` on, up to `end` at most. */
static inline sl_key_run sl_attention_key_run(const sl_gated_attention_args *args, int64_t batch, int64_t head_kv,
                                              int64_t key, int64_t end) {
  if (!args->block_table) return (sl_key_run){end, key, sl_attention_at3(&args->b, batch, head_kv, key)};
  int64_t number = key / args->block_size, first = key - number * args->block_size;
  int64_t next = (number + 1) * args->block_size;
  sl_key_run run = {next < end ? next : end, -1, NULL};
  int64_t block = args->block_table[batch * args->max_blocks + number];
  if (block < 0) return run;
  run.row = block * (args->k.batch_stride / args->k.token_stride) + first;
  run.b = sl_attention_at3(&args->b, block, head_kv, first);
  return run;
}

/* The rows of a key head in k or v that the numbers above count. */
static inline sl_token_rows sl_attention_key_rows(const sl_gated_attention_args *args, const sl_tensor4 *tensor,
                                                  int64_t batch, int64_t head_kv, int64_t channels) {
  return sl_attention_token_rows(args, tensor, args->block_table ? 0 : batch, head_kv, channels);
}

#endif
