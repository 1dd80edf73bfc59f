/* One element of a tensor of any of the family's dtypes, as a double. */
#ifndef SL_ATTENTION_ELEMENT_H
#define SL_ATTENTION_ELEMENT_H

#include <sluice/types.h>

#include "runtime/number.h"

static inline double sl_element_load(sl_dtype dtype, const void *data, int64_t index) {
  switch (dtype) {
    case SL_F32: return (double)((const float *)data)[index];
    case SL_BF16: return (double)sl_bf16_to_float(((const uint16_t *)data)[index]);
    case SL_F16: return (double)sl_f16_to_float(((const uint16_t *)data)[index]);
    case SL_F64: return ((const double *)data)[index];
    default: return 0; /* refused by validation */
  }
}

static inline void sl_element_store(sl_dtype dtype, void *data, int64_t index, double value) {
  switch (dtype) {
    case SL_F32: ((float *)data)[index] = (float)value; break;
    case SL_BF16: ((uint16_t *)data)[index] = sl_float_to_bf16((float)value); break;
    case SL_F16: ((uint16_t *)data)[index] = sl_float_to_f16((float)value); break;
    case SL_F64: ((double *)data)[index] = value; break;
    default: break; /* refused by validation */
  }
}

#endif
