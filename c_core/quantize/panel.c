/* One panel of output channels times any number of rows. Segments are the outer loop: a segment of a panel stays in the
 * first-level cache while all rows pass by. */
#include "quantize/panel.h"

#include <stddef.h>
#include <string.h>

/* From here on it pays to unpack a segment once for all rows. */
enum { MANY_ROWS = 2 * SL_QUANTIZE_TILE_ROWS + 1 };

/* Segments first to first + tile->segments, which begin at input begin. */
static void multiply_segments(const sl_panel_product *product, sl_quantize_tile *tile, int64_t begin, int64_t first,
                              size_t element, int height, void (*multiply)(const sl_quantize_tile *)) {
  int64_t tiles = sl_ceil_divide(product->rows, height);
  for (int64_t i = 0; i < tiles; ++i) { /* tiles of equal height, so that none is left with one row */
    int64_t top = product->rows * i / tiles, end = product->rows * (i + 1) / tiles;
    const void *activations[SL_QUANTIZE_TILE_ROWS];
    const int32_t *sums[SL_QUANTIZE_TILE_ROWS];
    for (int64_t row = top; row < end; ++row) {
      activations[row - top] = (const char *)product->activations[row] + begin * (int64_t)element;
      if (!product->wide) sums[row - top] = product->sums[row] + first;
    }
    tile->rows = (int)(end - top);
    tile->activations = activations, tile->sums = product->wide ? NULL : sums;
    tile->out = product->tile + top * SL_QUANTIZE_PANEL;
    multiply(tile);
  }
}

void sl_multiply_panel(const sl_panel_product *product, int64_t panel) {
  const sl_quantize_kernel *kernel = product->kernel;
  const sl_quantized_weight *weight = product->weight;
  bool seven = weight->bits == 8 && kernel->wide_activations && !product->wide;
  bool unpack = weight->bits == 8 && !seven && kernel->unpack_segment && product->rows >= MANY_ROWS;
  size_t element = product->wide ? 2 : 1;
  void (*multiply)(const sl_quantize_tile *) = weight->bits == 4 ? kernel->multiply4
                                               : seven           ? kernel->multiply7
                                               : unpack          ? kernel->multiply8_unpacked
                                                                 : kernel->multiply8;
  int height = weight->bits == 4 ? kernel->height4
               : seven           ? kernel->height7
               : unpack          ? kernel->height8_unpacked
                                 : kernel->height8;
  const uint8_t *bytes = weight->packed;
  if (bytes) bytes += panel * sl_panel_bytes(weight, sl_padded_inputs(weight));
  int64_t columns = sl_padded_outputs(weight), segment = 0, begin = 0;
  bool aligned = weight->group_size > 0 && weight->group_size <= SL_QUANTIZE_SEGMENT; /* a segment is a group */
  memset(product->tile, 0, (size_t)product->rows * SL_QUANTIZE_PANEL * sizeof(float));
  while (begin < weight->in_features) {
    sl_quantize_tile tile = {0};
    tile.depth = sl_segment_end(weight, begin) - begin;
    tile.segments = 1;
    while (aligned && !unpack && (tile.segments + 1) * tile.depth <= SL_QUANTIZE_SEGMENT &&
           begin + (tile.segments + 1) * tile.depth <= weight->in_features) {
      ++tile.segments;
    }
    tile.weight = bytes + sl_panel_bytes(weight, begin);
    tile.scale = weight->scale + begin / sl_scale_inputs(weight) * columns + panel * SL_QUANTIZE_PANEL;
    tile.scale_stride = columns;
    if (unpack) {
      kernel->unpack_segment(tile.weight, tile.depth, product->unpacked);
      tile.weight = product->unpacked;
    }
    multiply_segments(product, &tile, begin, segment, element, height, multiply);
    segment += tile.segments, begin += tile.segments * tile.depth;
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
