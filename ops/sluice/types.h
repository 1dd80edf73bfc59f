/* Element types that cross the contract. */
#ifndef SLUICE_TYPES_H
#define SLUICE_TYPES_H

#include <stddef.h>
#include <stdint.h>

#include <sluice/status.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sl_dtype {
  SL_F32 = 0,  /* IEEE binary32 */
  SL_BF16 = 1, /* bfloat16: the upper half of a binary32 */
  SL_F16 = 2,  /* IEEE binary16 */
  SL_F64 = 3,  /* IEEE binary64; outside comm served by the reference tier only */
  /* In comm only: every other family answers these with SL_UNSUPPORTED. */
  SL_I8 = 4,
  SL_U8 = 5,
  SL_I16 = 6,
  SL_I32 = 7,
  SL_I64 = 8,
  SL_BOOL = 9, /* a byte: 0 is false, anything else true; results are 0 or 1 */
} sl_dtype;

/* Bytes of one element; 0 for a value outside the enum. */
SL_API size_t sl_dtype_size(sl_dtype dtype);

/* "float32", "bfloat16", ...; never NULL. */
SL_API const char *sl_dtype_name(sl_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
