/* The micro-op table: what one instruction-set tier supplies for gated attention. Control flow (which rows meet which
 * keys) is plain C and the same everywhere; every micro-op works on a whole tile, so a call through the table costs
 * nothing, and each is tested alone against the scalar table.
 *
 * VOCABULARY
 *   row        a query (or, in the backward, a dout row). Rows come in groups of row_tile: every count of rows is
 *              rounded up to whole groups by the micro-op; the caller owns the memory of the padding rows.
 *   token row  one row of channels in the caller's tensor, of the table's dtype, picked by an index list.
 *   element    the table's own type of a packed operand (float here, bfloat16 on avx512bf16): element_size bytes.
 *   columns    packed right operand in which tokens became columns:  [panels of `panel` tokens][depth][panel],
 *              where depth = round_up(channels, depth_step): what A . B^T needs.
 *   depths     packed right operand in which tokens became depth: [panels of `panel` channels][capacity][panel],
 *              where capacity counts tokens and is a multiple of depth_step: what A . B needs.
 *              (A tier with depth_step 2 stores pairs: [depth / 2][panel][2].)
 *   lengths    the staircase: lengths[r] leading keys of this block belong to row r. Never increasing with r, 0 is
 *              allowed, and 0 for padding rows. A group of rows is worked on as wide as its first row.
 *
 * Alignment: packed operands, scores, weights and out rows start on 64 bytes and strides keep it (multiples of
 * SL_ATTENTION_STRIDE elements or floats); token rows have only the alignment of their type. */
#ifndef SL_ATTENTION_KERNEL_H
#define SL_ATTENTION_KERNEL_H

#include <sluice/cpu.h>
#include <sluice/types.h>
#include <stdint.h>

/* Row strides of packed rows, scores, weights and out are multiples of this, in elements. At least any panel. */
enum { SL_ATTENTION_STRIDE = 32 };

/* Rows that read unpacked token rows together. */
enum { SL_ATTENTION_TEAM = 4 };

/* The token rows of one (batch, head). */
typedef struct sl_token_rows {
  const void *data;
  int64_t token_stride; /* elements */
  int64_t channels;
} sl_token_rows;

/* Token rows where they lie, in the order in which they are read. */
typedef struct sl_row_list {
  const sl_token_rows *source;
  const int32_t *index;
  int64_t count;  /* rows to work on */
  int64_t listed; /* at least count: so far index goes on. What comes behind count is next, and is asked for ahead */
} sl_row_list;

/* Online softmax of one block of keys, and the gate. With m the new maximum of row r and c = scale_log2e:
 *   weights[r][j] = exp2(c s_rj - c m) * gate_rj   for j < lengths[r],
 *                   0 from there to the width that multiply_nn reads for the row's group
 *   gate_rj       = 1 / (1 + exp_minus_a[r] * exp_minus_b[j]), or 1 if exp_minus_a is NULL
 *   sum[r]        = sum[r] * exp2(c m_old - c m) + sum of exp2(c s_rj - c m)      (without the gate)
 *   out[r][:]     = out[r][:] * exp2(c m_old - c m)
 * A score of -inf is a dropped pair. A row that has seen only dropped pairs keeps maximum -inf and sum 0. NaN scores
 * make sum NaN. Rows of length 0 change nothing but their weights. scale_log2e > 0. */
typedef struct sl_softmax_tile {
  int64_t rows;
  const int32_t *lengths;
  const float *scores;
  int64_t score_stride;
  void *weights; /* elements; may be the scores themselves where element_size is 4 */
  int64_t weight_stride;
  float scale_log2e;
  const float *exp_minus_a; /* [rows], or NULL: no gate */
  const float *exp_minus_b; /* [keys of this block], 64-byte aligned, readable up to a whole panel */
  float *maximum, *sum;     /* [rows], in units of the raw score */
  float *out;
  int64_t out_stride, out_width; /* out_width is a multiple of panel */
} sl_softmax_tile;

/* What happens to a block of scores between the product and the softmax: scores become
 *   cap(scale * s_rj) - slope |positions[j] - row_positions[r]| + mask[r][j]   with cap(x) = softcap tanh(x / softcap)
 * for j < lengths[r]; from there to a whole panel anything may be written. */
typedef struct sl_bend_tile {
  int64_t rows;
  const int32_t *lengths;
  float *scores;
  int64_t score_stride;
  float scale, softcap, slope;                  /* softcap 0: no cap */
  const int32_t *row_positions, *key_positions; /* [rows], [keys of this block], readable up to a whole panel */
  const float *mask;                            /* like scores; or NULL */
  float *bend;                                  /* like scores: gets 1 - tanh(x / softcap)^2; or NULL */
} sl_bend_tile;

/* The gradient of the same block; see softmax_gradient_tile below. */
typedef struct sl_softmax_gradient_tile {
  int64_t rows;
  const int32_t *lengths;
  const float *scores;            /* s_rj, raw; -inf: dropped */
  const float *dout_values;       /* e_rj = <dout_r, v_j> */
  int64_t score_stride;           /* of both */
  void *weights, *score_gradient; /* elements: P_rj g_rj and P_rj (g_rj e_rj - mean_r); may be the two inputs themselves
                                     where element_size is 4 */
  int64_t weight_stride;          /* of both */
  float scale_log2e;
  const float *exp_minus_a, *exp_minus_b; /* as above; exp_minus_a NULL: no gate, da and db stay */
  const float *lse_log2;                  /* [rows] lse * log2(e); -inf: the row keeps nothing, all its results are 0 */
  const float *mean;                      /* [rows] D_r = <dout_r, out_r> - dlse_r */
  float *da, *db; /* [rows] and [keys of this block], owned up to a whole panel: dz_rj is added to both */
} sl_softmax_gradient_tile;

/* Softmax of one row over unpacked token rows, and the gate. With m the maximum and c = scale_log2e:
 *   scores[j] becomes exp2(c s_j - c m) / (1 + exp(-logits[j]))        sum = sum of exp2(c s_j - c m)
 * A logit of inf is that of a pair without gate, one of -inf that of a dropped pair: its score may be anything, and
 * becomes 0. A score of -inf is a dropped pair, too. Without any other pair m is -inf and sum 0. NaN makes sum or the
 * weight NaN. */
typedef struct sl_weigh_row {
  int64_t count;
  float *scores;       /* this and logits: 64-byte aligned, owned up to a multiple of SL_ATTENTION_STRIDE */
  const float *logits; /* within +-2 SL_GATE_LOGIT_LIMIT, infinite or NaN */
  float scale_log2e;
  float maximum, sum; /* written */
} sl_weigh_row;

typedef struct sl_attention_kernel {
  const char *name; /* isa_dtype_tile, e.g. "avx2_f32_6x16" */
  sl_isa isa;
  sl_dtype dtype;
  int32_t row_tile;   /* rows of a register tile */
  int32_t panel;      /* columns of a register tile; divides SL_ATTENTION_STRIDE */
  int32_t depth_step; /* 1, or 2 where products are taken in pairs */
  size_t element_size;

  /* packed[r][c] = factor * source[index[r]][c] for r < count; channels up to packed_stride and padding rows are 0.
   * factor is -1, 0 or 1, so that it is exact in every element type. */
  void (*pack_rows)(void *packed, int64_t packed_stride, const sl_token_rows *source, const int32_t *index,
                    int64_t count, float factor);
  /* Tokens index[0..count) as columns / as depths. What is missing to a whole panel, to depth_step in the channels
   * (columns) or to depth_step in the tokens (depths) is 0. */
  void (*pack_columns)(void *packed, const sl_token_rows *source, const int32_t *index, int64_t count);
  void (*pack_depths)(void *packed, int64_t capacity, const sl_token_rows *source, const int32_t *index, int64_t count);

  /* scores[r][j] = <rows[r], columns[j]> for j < lengths[first row of r's group]; from there to a whole panel anything
   * may be written. */
  void (*multiply_nt)(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *columns,
                      int64_t depth, float *scores, int64_t score_stride);
  /* out[r][0..width) += sum over j < round_up(lengths[first row of r's group], depth_step) of
   * left[r][j] * depths[j][0..width). width is a multiple of panel. */
  void (*multiply_nn)(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                      int64_t capacity, int64_t width, float *out, int64_t out_stride);
  /* This and softmax_gradient_tile are the backward's, and both NULL where a tier leaves it to the next one below. A
   * table that has them has float elements.
   * out[j][0..width) += sum over r < rows with lengths[r] > j of left[r][j] * depths[r][0..width), j < lengths[0].
   * left must be 0 where lengths[r] <= j < round_up(lengths[r], panel). */
  void (*multiply_tn)(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                      int64_t capacity, int64_t width, float *out, int64_t out_stride);

  /* scores[r][j] = -inf unless lowest[r] <= positions[j] <= highest[r], for j < lengths[r]. */
  void (*mask_tile)(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride, const int32_t *positions,
                    const int32_t *lowest, const int32_t *highest);
  void (*bend_tile)(const sl_bend_tile *tile);
  void (*softmax_tile)(const sl_softmax_tile *tile);
  /* With P_rj = exp2(c s_rj - lse_log2[r]) and dz_rj = P_rj e_rj g_rj (1 - g_rj): fills weights and score_gradient for
   * j < lengths[r], 0 from there to round_up(lengths[first row of r's group], panel); adds dz to da and db. */
  void (*softmax_gradient_tile)(const sl_softmax_gradient_tile *tile);

  /* target[index[r]][c] = factors[r] * out[r][c] in the table's dtype, rounded to nearest even. */
  void (*store_rows)(void *target, int64_t token_stride, int64_t channels, const int32_t *index, int64_t count,
                     const float *out, int64_t out_stride, const float *factors);

  /* Without packing, for a team of at most SL_ATTENTION_TEAM rows, which have no alignment; each result depends on its
   * row and token row alone, and out is added to in the order of the list:
   * scores[r][j] = <rows[r], source[index[j]]>   and   out[r][:] += weights[r][j] * source[index[j]]  for j < count. */
  void (*dot_rows)(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list, float *scores,
                   int64_t score_stride);
  void (*add_rows)(float *out, int64_t out_stride, int64_t row_count, const float *weights, int64_t weight_stride,
                   const sl_row_list *list);
  void (*weigh_row)(sl_weigh_row *row);
} sl_attention_kernel;

/* dot_rows and add_rows of one row and one token row. */
static inline float sl_attention_dot_row(const sl_attention_kernel *kernel, const float *row,
                                         const sl_token_rows *source, int32_t index) {
  sl_row_list list = {source, &index, 1, 1};
  float score;
  kernel->dot_rows(row, 0, 1, &list, &score, 1);
  return score;
}

static inline void sl_attention_add_row(const sl_attention_kernel *kernel, float *out, float weight,
                                        const sl_token_rows *source, int32_t index) {
  sl_row_list list = {source, &index, 1, 1};
  kernel->add_rows(out, 0, 1, &weight, 1, &list);
}

/* For dot_rows and add_rows at index[j]: asks for a row that comes later, into the second-level cache, which can wait
 * for more lines than the first. */
static inline void sl_attention_prefetch_row(const sl_row_list *list, int64_t element_size, int64_t j) {
  enum { AHEAD = 32, LINE = 64 };
  const sl_token_rows *source = list->source;
  const int32_t *index = list->index + j;
  if (j + AHEAD >= list->listed) return;
  if (source->token_stride == source->channels && index[AHEAD] == index[0] + AHEAD) return;
  const char *row = (const char *)source->data + index[AHEAD] * source->token_stride * element_size;
  for (int64_t byte = 0; byte < source->channels * element_size; byte += LINE) __builtin_prefetch(row + byte, 0, 2);
}

/* The first table of kernels.def whose dtype fits and whose tier is at most isa; NULL for float64. */
const sl_attention_kernel *sl_attention_find_kernel(sl_dtype dtype, sl_isa isa);

/* The table at place `number` of kernels.def, best tier first; NULL after the last. For the tests and benchmarks. */
const sl_attention_kernel *sl_attention_list_kernels(int number);

static inline int64_t sl_round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

#endif
