/* The sizes that one call of gated attention works with, derived once from its args and its micro-op table. */
#ifndef SL_ATTENTION_PLAN_H
#define SL_ATTENTION_PLAN_H

#include <sluice/gated_attention.h>
#include <stddef.h>

#include "attention/kernel.h"

enum { SL_ATTENTION_MAX_CHUNK = 1024 };

typedef struct sl_attention_plan {
  const sl_gated_attention_args *args;
  const sl_attention_kernel *kernel;
  int64_t group;                    /* query heads per key head */
  int64_t depth, depth_v;           /* head_dim, head_dim_v as depth of columns: multiples of depth_step */
  int64_t width, width_v;           /* the same as width of depths and of out rows: multiples of panel */
  int64_t row_stride, row_stride_v; /* packed rows of q, of dout, in elements */
  int64_t chunk;                    /* keys that are sorted together, at most SL_ATTENTION_MAX_CHUNK */
  int64_t block;                    /* keys of a chunk that are worked on together: scores of a tile stay in cache */
  int64_t query_chunk;              /* queries of one task */
  int64_t tile;                     /* queries that are worked on together: a multiple of row_tile */
  int64_t far_tile;                 /* the same where queries were sorted over the whole query chunk */
  int64_t near_tile;                /* the same for a window: the fewer rows, the fewer keys around them */
  int64_t piece;                    /* keys that are sorted together where a query chunk's own keys begin */
  float factor, scale_log2e;        /* scale * log2(e) = factor * scale_log2e, with factor -1, 0 or 1; but where scores
                                       are bent, log2(e): then the bent score has the scale in it, */
  float scale;                      /* which is factor * scale */
  bool bends_scores;                /* there is a cap, a slope or a mask */
  sl_tensor4 dout;                  /* of the backward: the gradient of the output before its gate */
} sl_attention_plan;

sl_attention_plan sl_attention_make_plan(const sl_gated_attention_args *args, const sl_attention_kernel *kernel);

/* The place of query 0 of a batch entry among the keys. */
static inline int64_t sl_attention_q_offset(const sl_gated_attention_args *args, int64_t batch) {
  return args->q_offset ? args->q_offset[batch] : args->n_k - args->n_q;
}

/* The keys that any query of a batch entry may see: [begin, end) of key_range, under causal up to the last query. */
typedef struct sl_key_bounds {
  int64_t begin, end;
  int64_t sinks; /* keys [begin, sinks) are sinks, [sinks, end) are not */
} sl_key_bounds;

sl_key_bounds sl_attention_key_bounds(const sl_gated_attention_args *args, int64_t batch);

/* Whether any query head of this key head drops pairs, so that sorting its keys pays. */
bool sl_attention_drops_pairs(const sl_attention_plan *plan, int64_t batch, int64_t head_kv);

/* The threshold of a query head; -inf keeps all. */
static inline float sl_attention_logit_tau(const sl_gated_attention_args *args, int64_t batch, int64_t head) {
  if (!args->logit_tau) return -__builtin_inff();
  float tau = ((const float *)args->logit_tau)[batch * args->heads_q + head];
  return tau > -__builtin_inff() ? tau : -__builtin_inff(); /* NaN keeps all: not (z < NaN) */
}

/* Clamps a gate logit; NaN stays NaN. */
static inline float sl_attention_clamp_logit(float logit) {
  logit = logit > SL_GATE_LOGIT_LIMIT ? SL_GATE_LOGIT_LIMIT : logit;
  return logit < -SL_GATE_LOGIT_LIMIT ? -SL_GATE_LOGIT_LIMIT : logit;
}

static inline sl_token_rows sl_attention_token_rows(const sl_gated_attention_args *args, const sl_tensor4 *tensor,
                                                    int64_t batch, int64_t head, int64_t channels) {
  sl_token_rows rows = {NULL, tensor->token_stride, channels};
  if (tensor->data) { /* NULL where there are no tokens */
    int64_t offset = batch * tensor->batch_stride + head * tensor->head_stride;
    rows.data = (const char *)tensor->data + offset * (int64_t)sl_dtype_size(args->dtype);
  }
  return rows;
}

/* Element [batch, head, token] of a float32 tensor. */
static inline float *sl_attention_at3(const sl_tensor3 *tensor, int64_t batch, int64_t head, int64_t token) {
  return (float *)tensor->data + batch * tensor->batch_stride + head * tensor->head_stride +
         token * tensor->token_stride;
}

#endif
