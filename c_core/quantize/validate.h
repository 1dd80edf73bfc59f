/* Checks of the arguments of quantize: every message names the argument, its value and what was expected. */
#ifndef SL_QUANTIZE_VALIDATE_H
#define SL_QUANTIZE_VALIDATE_H

#include <sluice/quantize_recurrent.h>

#include "quantize/kernel.h"

/* The sizes of a weight; with data, also its pointers. */
sl_status sl_quantize_validate_weight(const sl_quantized_weight *weight, bool data);

/* Sizes and options; with data, also pointers and the executor. */
sl_status sl_quantize_validate_quantize(const sl_quantize_dynamic_args *args, bool data);
sl_status sl_quantize_validate_linear(const sl_linear_dynamic_args *args, bool data);
sl_status sl_quantize_validate_conv2d(const sl_conv2d_dynamic_args *args, bool data);

/* All of the arguments, every row, too. */
sl_status sl_quantize_validate_lookup(const sl_lookup_weight_args *args);

sl_status sl_quantize_validate_recurrent(const sl_recurrent_dynamic_args *args, int gates, bool data);

sl_status sl_quantize_validate_dtype(const char *name, sl_dtype dtype);

#endif
