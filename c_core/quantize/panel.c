/* One panel of output channels times any number of rows. Segments are the outer loop: a segment of a panel stays in the
 * first-level cache while all rows pass by. */
#include "quantize/panel.h"

#include <string.h>

/* From here on it pays to unpack a segment once for all rows. */
enum { MANY_ROWS = 2 * SL_QUANTIZE_TILE_ROWS + 1 };

static void multiply_segment(const sl_panel_product *product, sl_quantize_tile *tile, int64_t begin, int64_t segment,
                             size_t element, void (*multiply)(const sl_quantize_tile *)) {
  int64_t tiles = sl_ceil_divide(product->rows, SL_QUANTIZE_TILE_ROWS);
  for (int64_t i = 0; i < tiles; ++i) { /* tiles of equal height, so that none is left with one row */
    int64_t first = product->rows * i / tiles, end = product->rows * (i + 1) / tiles;
    const void *activations[SL_QUANTIZE_TILE_ROWS];
    int32_t sums[SL_QUANTIZE_TILE_ROWS];
    for (int64_t row = first; row < end; ++row) {
      activations[row - first] = (const char *)product->activations[row] + begin * (int64_t)element;
      if (product->sums) sums[row - first] = product->sums[row][segment];
    }
    tile->rows = (int)(end - first);
    tile->activations = activations, tile->sums = product->sums ? sums : NULL;
    tile->out = product->tile + first * SL_QUANTIZE_PANEL;
    multiply(tile);
  }
}

void sl_multiply_panel(const sl_panel_product *product, int64_t panel) {
  const sl_quantize_kernel *kernel = product->kernel;
  const sl_quantized_weight *weight = product->weight;
  bool unpack = weight->bits == 8 && kernel->unpack_segment && product->rows >= MANY_ROWS;
  size_t element = sl_rows_are_wide(kernel, weight->bits) ? 2 : 1;
  void (*multiply)(const sl_quantize_tile *) = weight->bits == 4 ? kernel->multiply4
                                               : unpack          ? kernel->multiply8_unpacked
                                                                 : kernel->multiply8;
  const uint8_t *bytes = weight->packed;
  if (bytes) bytes += panel * sl_panel_bytes(weight, sl_padded_inputs(weight));
  int64_t columns = sl_padded_outputs(weight), segment = 0, end;
  memset(product->tile, 0, (size_t)product->rows * SL_QUANTIZE_PANEL * sizeof(float));
  for (int64_t begin = 0; begin < weight->in_features; begin = end, ++segment) {
    end = sl_segment_end(weight, begin);
    sl_quantize_tile tile = {0};
    tile.depth = end - begin;
    tile.weight = bytes + sl_panel_bytes(weight, begin);
    tile.scale = weight->scale + begin / sl_scale_inputs(weight) * columns + panel * SL_QUANTIZE_PANEL;
    if (unpack) {
      kernel->unpack_segment(tile.weight, tile.depth, product->unpacked);
      tile.weight = product->unpacked;
    }
    multiply_segment(product, &tile, begin, segment, element, multiply);
  }
}

void sl_sum_segments(const sl_quantize_kernel *kernel, const sl_quantized_weight *weight, const int8_t *row,
                     int32_t *sums) {
  int64_t segment = 0, end;
  for (int64_t begin = 0; begin < weight->in_features; begin = end) {
    end = sl_segment_end(weight, begin);
    sums[segment++] = kernel->sum_row(row + begin, end - begin);
  }
}
