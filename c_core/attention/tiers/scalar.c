/* The scalar table: the definition of every micro-op, and the tier that every machine has. Elements are float whatever
 * the dtype. Loops run over whole panels, so that a compiler can turn them into whatever vectors it has. */
#include <math.h>
#include <string.h>

#include "attention/kernel.h"
#include "runtime/number.h"

enum { ROWS = 4, PANEL = 8 };

static inline float load(sl_dtype dtype, const void *data, int64_t index) {
  if (dtype == SL_BF16) return sl_bf16_to_float(((const uint16_t *)data)[index]);
  if (dtype == SL_F16) return sl_f16_to_float(((const uint16_t *)data)[index]);
  return ((const float *)data)[index];
}

static inline void store(sl_dtype dtype, void *data, int64_t index, float value) {
  if (dtype == SL_BF16) {
    ((uint16_t *)data)[index] = sl_float_to_bf16(value);
  } else if (dtype == SL_F16) {
    ((uint16_t *)data)[index] = sl_float_to_f16(value);
  } else {
    ((float *)data)[index] = value;
  }
}

static inline void pack_rows(sl_dtype dtype, float *packed, int64_t packed_stride, const sl_token_rows *source,
                             const int32_t *index, int64_t count, float factor) {
  for (int64_t r = 0; r < sl_round_up(count, ROWS); ++r) {
    int64_t channels = r < count ? source->channels : 0;
    int64_t start = r < count ? index[r] * source->token_stride : 0;
    for (int64_t c = 0; c < channels; ++c) {
      packed[r * packed_stride + c] = factor * load(dtype, source->data, start + c);
    }
    for (int64_t c = channels; c < packed_stride; ++c) packed[r * packed_stride + c] = 0;
  }
}

static inline void pack_columns(sl_dtype dtype, float *packed, const sl_token_rows *source, const int32_t *index,
                                int64_t count) {
  for (int64_t first = 0; first < count; first += PANEL, packed += source->channels * PANEL) {
    for (int64_t t = 0; t < PANEL; ++t) {
      int64_t start = first + t < count ? index[first + t] * source->token_stride : 0;
      for (int64_t c = 0; c < source->channels; ++c) {
        packed[c * PANEL + t] = first + t < count ? load(dtype, source->data, start + c) : 0;
      }
    }
  }
}

static inline void pack_depths(sl_dtype dtype, float *packed, int64_t capacity, const sl_token_rows *source,
                               const int32_t *index, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    int64_t start = index[t] * source->token_stride;
    for (int64_t c = 0; c < sl_round_up(source->channels, PANEL); ++c) {
      packed[(c / PANEL * capacity + t) * PANEL + c % PANEL] =
          c < source->channels ? load(dtype, source->data, start + c) : 0;
    }
  }
}

static void multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                        const void *columns, int64_t depth, float *scores, int64_t score_stride) {
  for (int64_t first = 0; first < rows && lengths[first] > 0; first += ROWS) {
    const float *a = (const float *)left + first * left_stride;
    for (int64_t column = 0; column < lengths[first]; column += PANEL) {
      const float *b = (const float *)columns + column * depth;
      float sum[ROWS][PANEL] = {{0}};
      for (int64_t d = 0; d < depth; ++d) {
        for (int r = 0; r < ROWS; ++r) {
          for (int c = 0; c < PANEL; ++c) sum[r][c] += a[r * left_stride + d] * b[d * PANEL + c];
        }
      }
      for (int r = 0; r < ROWS; ++r) memcpy(scores + (first + r) * score_stride + column, sum[r], sizeof sum[r]);
    }
  }
}

static void multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                        int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  for (int64_t first = 0; first < rows && lengths[first] > 0; first += ROWS) {
    const float *a = (const float *)left + first * left_stride;
    for (int64_t column = 0; column < width; column += PANEL) {
      const float *b = (const float *)depths + column * capacity;
      float sum[ROWS][PANEL];
      for (int r = 0; r < ROWS; ++r) memcpy(sum[r], out + (first + r) * out_stride + column, sizeof sum[r]);
      for (int64_t d = 0; d < lengths[first]; ++d) {
        for (int r = 0; r < ROWS; ++r) {
          for (int c = 0; c < PANEL; ++c) sum[r][c] += a[r * left_stride + d] * b[d * PANEL + c];
        }
      }
      for (int r = 0; r < ROWS; ++r) memcpy(out + (first + r) * out_stride + column, sum[r], sizeof sum[r]);
    }
  }
}

static void multiply_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                        int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < lengths[r]; ++j) {
      float weight = ((const float *)left)[r * left_stride + j];
      for (int64_t column = 0; column < width; column += PANEL) {
        const float *b = (const float *)depths + column * capacity + r * PANEL;
        for (int c = 0; c < PANEL; ++c) out[j * out_stride + column + c] += weight * b[c];
      }
    }
  }
}

static void mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                      const int32_t *positions, const int32_t *lowest, const int32_t *highest) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < lengths[r]; ++j) {
      if (positions[j] < lowest[r] || positions[j] > highest[r]) scores[r * score_stride + j] = -INFINITY;
    }
  }
}

static void bend_tile(const sl_bend_tile *tile) {
  for (int64_t r = 0; r < tile->rows; ++r) {
    float *scores = tile->scores + r * tile->score_stride;
    for (int64_t j = 0; j < tile->lengths[r]; ++j) {
      float score = tile->scale * scores[j];
      if (tile->softcap > 0) {
        float bent = tanhf(score / tile->softcap);
        score = tile->softcap * bent;
        if (tile->bend) tile->bend[r * tile->score_stride + j] = 1 - bent * bent;
      }
      score -= tile->slope * fabsf((float)(tile->key_positions[j] - tile->row_positions[r]));
      if (tile->mask) score += tile->mask[r * tile->score_stride + j];
      scores[j] = score;
    }
  }
}

static void softmax_row(const sl_softmax_tile *tile, int64_t r, int64_t width) {
  const float *scores = tile->scores + r * tile->score_stride;
  float *weights = (float *)tile->weights + r * tile->weight_stride;
  float scale = tile->scale_log2e;
  float maximum = tile->maximum[r];
  for (int64_t j = 0; j < tile->lengths[r]; ++j) {
    if (!(scores[j] <= maximum)) maximum = scores[j];
  }
  float shift = maximum == -INFINITY ? 0 : scale * maximum;
  float *out = tile->out + r * tile->out_stride;
  if (!(maximum == tile->maximum[r])) {
    float shrink = exp2f(scale * tile->maximum[r] - shift);
    for (int64_t c = 0; c < tile->out_width; ++c) out[c] *= shrink;
    tile->sum[r] *= shrink;
    tile->maximum[r] = maximum;
  }
  float sum = 0;
  for (int64_t j = 0; j < tile->lengths[r]; ++j) {
    float weight = exp2f(scale * scores[j] - shift);
    sum += weight;
    weights[j] = tile->exp_minus_a ? weight / (1 + tile->exp_minus_a[r] * tile->exp_minus_b[j]) : weight;
  }
  for (int64_t j = tile->lengths[r]; j < width; ++j) weights[j] = 0;
  tile->sum[r] += sum;
}

static void softmax_tile(const sl_softmax_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += ROWS) {
    for (int64_t r = first; r < first + ROWS; ++r) {
      if (tile->lengths[r] > 0) {
        softmax_row(tile, r, tile->lengths[first]);
      } else {
        memset((float *)tile->weights + r * tile->weight_stride, 0, (size_t)tile->lengths[first] * sizeof(float));
      }
    }
  }
}

static void softmax_gradient_tile(const sl_softmax_gradient_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += ROWS) {
    int64_t width = sl_round_up(tile->lengths[first], PANEL);
    for (int64_t r = first; r < first + ROWS; ++r) {
      const float *scores = tile->scores + r * tile->score_stride;
      const float *dout_values = tile->dout_values + r * tile->score_stride;
      float *weights = (float *)tile->weights + r * tile->weight_stride;
      float *score_gradient = (float *)tile->score_gradient + r * tile->weight_stride;
      float da = 0;
      for (int64_t j = 0; j < tile->lengths[r]; ++j) {
        float p = tile->lse_log2[r] == -INFINITY ? 0 : exp2f(tile->scale_log2e * scores[j] - tile->lse_log2[r]);
        float e = dout_values[j], gate = 1;
        if (tile->exp_minus_a) {
          float odds = tile->exp_minus_a[r] * tile->exp_minus_b[j]; /* (1 - g) / g */
          gate = 1 / (1 + odds);
          float dz = p * e * gate * (odds * gate);
          da += dz;
          tile->db[j] += dz;
        }
        weights[j] = p * gate;
        score_gradient[j] = p * (gate * e - tile->mean[r]);
      }
      for (int64_t j = tile->lengths[r]; j < width; ++j) weights[j] = score_gradient[j] = 0;
      if (tile->exp_minus_a && tile->lengths[r] > 0) tile->da[r] += da;
    }
  }
}

static inline void store_rows(sl_dtype dtype, void *target, int64_t token_stride, int64_t channels,
                              const int32_t *index, int64_t count, const float *out, int64_t out_stride,
                              const float *factors) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      store(dtype, target, index[r] * token_stride + c, factors[r] * out[r * out_stride + c]);
    }
  }
}

static inline void dot_rows(sl_dtype dtype, const float *rows, int64_t row_stride, int64_t row_count,
                            const sl_row_list *list, float *scores, int64_t score_stride) {
  const sl_token_rows *source = list->source;
  for (int64_t j = 0; j < list->count; ++j) {
    for (int64_t r = 0; r < row_count; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < source->channels; ++c) {
        sum += rows[r * row_stride + c] * load(dtype, source->data, list->index[j] * source->token_stride + c);
      }
      scores[r * score_stride + j] = sum;
    }
  }
}

static inline void add_rows(sl_dtype dtype, float *out, int64_t out_stride, int64_t row_count, const float *weights,
                            int64_t weight_stride, const sl_row_list *list) {
  const sl_token_rows *source = list->source;
  for (int64_t j = 0; j < list->count; ++j) {
    for (int64_t r = 0; r < row_count; ++r) {
      float weight = weights[r * weight_stride + j];
      for (int64_t c = 0; c < source->channels; ++c) {
        out[r * out_stride + c] += weight * load(dtype, source->data, list->index[j] * source->token_stride + c);
      }
    }
  }
}

static void weigh_row(sl_weigh_row *row) {
  float maximum = -INFINITY, scale = row->scale_log2e;
  for (int64_t j = 0; j < row->count; ++j) {
    if (row->logits[j] == -INFINITY) row->scores[j] = -INFINITY;
    if (!(row->scores[j] <= maximum)) maximum = row->scores[j];
  }
  float shift = maximum == -INFINITY ? 0 : scale * maximum;
  row->maximum = maximum;
  row->sum = 0;
  for (int64_t j = 0; j < row->count; ++j) {
    float weight = exp2f(scale * row->scores[j] - shift);
    row->sum += weight;
    row->scores[j] = row->logits[j] == -INFINITY ? 0 : weight / (1 + expf(-row->logits[j]));
  }
}

/* What depends on the dtype, once per dtype with the dtype a constant. */
#define SCALAR_TABLE(suffix, dtype_)                                                                                  \
  static void pack_rows_##suffix(void *packed, int64_t packed_stride, const sl_token_rows *source,                    \
                                 const int32_t *index, int64_t count, float factor) {                                 \
    pack_rows(dtype_, packed, packed_stride, source, index, count, factor);                                           \
  }                                                                                                                   \
  static void pack_columns_##suffix(void *packed, const sl_token_rows *source, const int32_t *index, int64_t count) { \
    pack_columns(dtype_, packed, source, index, count);                                                               \
  }                                                                                                                   \
  static void pack_depths_##suffix(void *packed, int64_t capacity, const sl_token_rows *source, const int32_t *index, \
                                   int64_t count) {                                                                   \
    pack_depths(dtype_, packed, capacity, source, index, count);                                                      \
  }                                                                                                                   \
  static void store_rows_##suffix(void *target, int64_t token_stride, int64_t channels, const int32_t *index,         \
                                  int64_t count, const float *out, int64_t out_stride, const float *factors) {        \
    store_rows(dtype_, target, token_stride, channels, index, count, out, out_stride, factors);                       \
  }                                                                                                                   \
  static void dot_rows_##suffix(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,    \
                                float *scores, int64_t score_stride) {                                                \
    dot_rows(dtype_, rows, row_stride, row_count, list, scores, score_stride);                                        \
  }                                                                                                                   \
  static void add_rows_##suffix(float *out, int64_t out_stride, int64_t row_count, const float *weights,              \
                                int64_t weight_stride, const sl_row_list *list) {                                     \
    add_rows(dtype_, out, out_stride, row_count, weights, weight_stride, list);                                       \
  }                                                                                                                   \
  const sl_attention_kernel sl_attention_scalar_##suffix##_4x8 = {                                                    \
      .name = "scalar_" #suffix "_4x8",                                                                               \
      .isa = SL_ISA_SCALAR,                                                                                           \
      .dtype = dtype_,                                                                                                \
      .row_tile = ROWS,                                                                                               \
      .panel = PANEL,                                                                                                 \
      .depth_step = 1,                                                                                                \
      .element_size = sizeof(float),                                                                                  \
      .pack_rows = pack_rows_##suffix,                                                                                \
      .pack_columns = pack_columns_##suffix,                                                                          \
      .pack_depths = pack_depths_##suffix,                                                                            \
      .multiply_nt = multiply_nt,                                                                                     \
      .multiply_nn = multiply_nn,                                                                                     \
      .multiply_tn = multiply_tn,                                                                                     \
      .mask_tile = mask_tile,                                                                                         \
      .bend_tile = bend_tile,                                                                                         \
      .softmax_tile = softmax_tile,                                                                                   \
      .softmax_gradient_tile = softmax_gradient_tile,                                                                 \
      .store_rows = store_rows_##suffix,                                                                              \
      .dot_rows = dot_rows_##suffix,                                                                                  \
      .add_rows = add_rows_##suffix,                                                                                  \
      .weigh_row = weigh_row,                                                                                         \
  }

SCALAR_TABLE(f32, SL_F32);
SCALAR_TABLE(bf16, SL_BF16);
SCALAR_TABLE(f16, SL_F16);
