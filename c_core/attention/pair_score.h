/* A score, pair by pair, between the product and the softmax: what paths take that do not work on tiles. */
#ifndef SL_ATTENTION_PAIR_SCORE_H
#define SL_ATTENTION_PAIR_SCORE_H

#include <math.h>
#include <sluice/gated_attention.h>
#include <stdlib.h>

#include "runtime/number.h"

/* m_ij; 0 without a mask. */
static inline double sl_attention_mask_at(const sl_attention_mask *mask, int64_t batch, int64_t head, int64_t query,
                                          int64_t key) {
  if (!mask->data) return 0;
  int64_t index =
      batch * mask->batch_stride + head * mask->head_stride + query * mask->query_stride + key * mask->key_stride;
  switch (mask->dtype) {
    case SL_F32: return (double)((const float *)mask->data)[index];
    case SL_BF16: return (double)sl_bf16_to_float(((const uint16_t *)mask->data)[index]);
    case SL_F16: return (double)sl_f16_to_float(((const uint16_t *)mask->data)[index]);
    case SL_F64: return ((const double *)mask->data)[index];
    default: return ((const uint8_t *)mask->data)[index] ? 0 : -INFINITY;
  }
}

/* Whether the position and the mask let query and key see each other; key_range is not looked at. */
static inline bool sl_attention_pair_is_seen(const sl_gated_attention_args *args, int64_t batch, int64_t head,
                                             int64_t query, int64_t position, int64_t key) {
  if (args->causal && key > position) return false;
  if (args->sliding_window > 0 && llabs(position - key) >= args->sliding_window) return false;
  return sl_attention_mask_at(&args->attn_mask, batch, head, query, key) != -INFINITY;
}

/* s_ij from r_ij, and in *bend dr_ij / ds_ij, 1 without a cap. */
static inline double sl_attention_bend_score(const sl_gated_attention_args *args, int64_t batch, int64_t head,
                                             int64_t query, int64_t position, int64_t key, double raw, double *bend) {
  *bend = 1;
  if (args->softcap > 0) {
    double bent = tanh(raw / args->softcap);
    *bend = 1 - bent * bent;
    raw = args->softcap * bent;
  }
  if (args->alibi_slopes) {
    int64_t index = batch * args->heads_q + head;
    double slope = args->dtype == SL_F64 ? ((const double *)args->alibi_slopes)[index]
                                         : (double)((const float *)args->alibi_slopes)[index];
    raw -= slope * (double)llabs(position - key);
  }
  return raw + sl_attention_mask_at(&args->attn_mask, batch, head, query, key);
}

#endif
