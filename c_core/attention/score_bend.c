/* Gathering masks into tiles, and what bends scores. */
#include "attention/score_bend.h"

#include <math.h>

#include "attention/pair_score.h"

void sl_score_bend_take(sl_score_bend *bend, sl_arena *arena, const sl_attention_plan *plan, int64_t rows,
                        int64_t stride) {
  *bend = (sl_score_bend){.stride = stride};
  if (plan->args->attn_mask.data) bend->mask = sl_arena_take(arena, rows * stride, sizeof(float));
  if (plan->args->softcap > 0) bend->bend = sl_arena_take(arena, rows * stride, sizeof(float));
}

void sl_mask_gather(float *target, const sl_attention_mask *mask, int64_t first, const int32_t *keys, int64_t count) {
  int64_t step = mask->key_stride;
  switch (mask->dtype) {
    case SL_F32:
      for (int64_t j = 0; j < count; ++j) target[j] = ((const float *)mask->data)[first + keys[j] * step];
      break;
    case SL_BF16:
      for (int64_t j = 0; j < count; ++j) {
        target[j] = sl_bf16_to_float(((const uint16_t *)mask->data)[first + keys[j] * step]);
      }
      break;
    case SL_F16:
      for (int64_t j = 0; j < count; ++j) {
        target[j] = sl_f16_to_float(((const uint16_t *)mask->data)[first + keys[j] * step]);
      }
      break;
    case SL_F64:
      for (int64_t j = 0; j < count; ++j) target[j] = (float)((const double *)mask->data)[first + keys[j] * step];
      break;
    default:
      for (int64_t j = 0; j < count; ++j) {
        target[j] = ((const uint8_t *)mask->data)[first + keys[j] * step] ? 0 : -INFINITY;
      }
  }
}

bool sl_score_bend_load(sl_score_bend *bend, const sl_attention_plan *plan, const sl_query_rows *rows,
                        const sl_key_chunk *chunk, int64_t start, int64_t count, const int32_t *lengths) {
  const sl_attention_mask *mask = &plan->args->attn_mask;
  if (!mask->data) return true;
  bool any = false;
  for (int64_t r = 0; r < count; ++r) {
    float *row = bend->mask + r * bend->stride;
    int64_t first =
        rows->batch * mask->batch_stride + rows->head * mask->head_stride + rows->token[r] * mask->query_stride;
    sl_mask_gather(row, mask, first, chunk->index + start, lengths[r]);
    for (int64_t j = 0; j < lengths[r] && !any; ++j) any = row[j] != -INFINITY;
  }
  return any;
}

static float slope_of(const sl_attention_plan *plan, int64_t batch, int64_t head) {
  const float *slopes = plan->args->alibi_slopes;
  return slopes ? slopes[batch * plan->args->heads_q + head] : 0;
}

void sl_score_bend_apply(const sl_score_bend *bend, const sl_attention_plan *plan, const sl_query_rows *rows,
                         const sl_key_chunk *chunk, int64_t start, int64_t count, const int32_t *lengths,
                         float *scores) {
  sl_bend_tile tile = {.rows = count,
                       .lengths = lengths,
                       .scores = scores,
                       .score_stride = bend->stride,
                       .scale = plan->scale,
                       .softcap = (float)plan->args->softcap,
                       .slope = slope_of(plan, rows->batch, rows->head),
                       .row_positions = rows->position,
                       .key_positions = chunk->index + start,
                       .mask = bend->mask,
                       .bend = bend->bend};
  plan->kernel->bend_tile(&tile);
}

void sl_score_bend_row(const sl_attention_plan *plan, int64_t batch, int64_t head, int32_t position,
                       const int32_t *keys, int64_t count, const float *mask, float *scores) {
  int32_t length = (int32_t)count;
  sl_bend_tile tile = {.rows = 1,
                       .lengths = &length,
                       .scores = scores,
                       .scale = plan->scale,
                       .softcap = (float)plan->args->softcap,
                       .slope = slope_of(plan, batch, head),
                       .row_positions = &position,
                       .key_positions = keys,
                       .mask = mask};
  plan->kernel->bend_tile(&tile);
}

void sl_score_bend_differentiate(const sl_score_bend *bend, int64_t count, const int32_t *lengths,
                                 float *score_gradient) {
  for (int64_t r = 0; r < count && bend->bend; ++r) {
    const float *row = bend->bend + r * bend->stride;
    for (int64_t j = 0; j < lengths[r]; ++j) score_gradient[r * bend->stride + j] *= row[j];
  }
}

float sl_score_bend_pair(const sl_attention_plan *plan, int64_t batch, int64_t head, int64_t query, int64_t position,
                         int64_t key, float product, float *bend) {
  double slope = 1, raw = (double)plan->scale * (double)product;
  double score = sl_attention_bend_score(plan->args, batch, head, query, position, key, raw, &slope);
  *bend = (float)slope;
  return (float)score;
}
