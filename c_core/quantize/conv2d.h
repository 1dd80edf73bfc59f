/* What the two implementations of conv2d_dynamic share. */
#ifndef SL_QUANTIZE_CONV2D_H
#define SL_QUANTIZE_CONV2D_H

#include "quantize/rounding.h"

static inline int64_t sl_conv2d_out_size(const sl_conv2d_dynamic_args *args, int axis) {
  int64_t size = axis ? args->width : args->height;
  int64_t reach = args->dilation[axis] * (args->kernel[axis] - 1) + 1;
  return (size + 2 * args->padding[axis] - reach) / args->stride[axis] + 1;
}

#endif
