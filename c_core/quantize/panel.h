/* One panel of output channels times any number of rows: what linear layers and convolutions share. */
#ifndef SL_QUANTIZE_PANEL_H
#define SL_QUANTIZE_PANEL_H

#include <string.h>

#include "quantize/rounding.h"

/* A row of activations here is one plane: an int16_t row, an int8_t row, or one of the two int8_t rows of a 16-bit one.
 * Each has sl_padded_inputs() elements, the last ones 0. */
typedef struct sl_panel_product {
  const sl_quantize_kernel *kernel;
  const sl_quantized_weight *weight;
  int64_t rows;
  bool wide;                      /* int16_t rows */
  const void *const *activations; /* [rows] */
  const int32_t *const *sums;     /* [rows]: of each segment; not read for int16_t rows */
  void *unpacked;                 /* scratch, SL_PANEL_SCRATCH bytes */
  float *tile;                    /* written, [rows, SL_QUANTIZE_PANEL] */
} sl_panel_product;

enum { SL_PANEL_SCRATCH = 2 * SL_QUANTIZE_SEGMENT * SL_QUANTIZE_PANEL };

/* panel counts through all groups of output channels. */
void sl_multiply_panel(const sl_panel_product *product, int64_t panel);

/* Whether rows for weights of this width are int16_t, */
static inline bool sl_rows_are_wide(const sl_quantize_kernel *kernel, int32_t weight_bits) {
  return weight_bits == 8 && kernel->wide_activations;
}
/* and whether one of so few bits (0: not finite) is. */
static inline bool sl_row_is_wide(const sl_quantize_kernel *kernel, int32_t weight_bits, int bits) {
  return sl_rows_are_wide(kernel, weight_bits) && !(kernel->multiply7 && bits <= 7);
}

/* Tells finish which channels the panel has, of `left` that are still to come, and their bias (NULL: none), for which
 * it is lent memory. */
static inline void sl_set_panel_channels(sl_quantize_finish *finish, int64_t left, const float *bias,
                                         float lent[SL_QUANTIZE_PANEL]) {
  finish->channels = left < SL_QUANTIZE_PANEL ? (int)left : SL_QUANTIZE_PANEL;
  memset(lent, 0, SL_QUANTIZE_PANEL * sizeof(float));
  if (bias) memcpy(lent, bias, (size_t)finish->channels * sizeof(float));
  finish->bias = lent;
}

/* Sum of each segment of an int8_t row. */
void sl_sum_segments(const sl_quantize_kernel *kernel, const sl_quantized_weight *weight, const int8_t *row,
                     int32_t *sums);

#endif
