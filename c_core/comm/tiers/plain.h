/* Reductions of integers and booleans in plain C, for the tiers to include, so that each has them compiled with its
 * flags. (scalar.c adds those of floating point, plain_floats.h.)
 *
 * A tile of sums is kept in the first-level cache while the sources are folded into it, one after the other. So every
 * buffer is read or written once, and out may be one of the sources: a tile is written after all of it was read. */
#ifndef SL_COMM_PLAIN_H
#define SL_COMM_PLAIN_H

#include <string.h>

#include "comm/kernel.h"
#include "runtime/number.h"

enum { TILE_BYTES = 4096 };

#define NAME(x) x##_i8
#define ELEMENT int8_t
#define BITS uint8_t
#include "comm/tiers/plain_integers.h"

#define NAME(x) x##_u8
#define ELEMENT uint8_t
#define BITS uint8_t
#include "comm/tiers/plain_integers.h"

#define NAME(x) x##_i16
#define ELEMENT int16_t
#define BITS uint16_t
#include "comm/tiers/plain_integers.h"

#define NAME(x) x##_i32
#define ELEMENT int32_t
#define BITS uint32_t
#include "comm/tiers/plain_integers.h"

#define NAME(x) x##_i64
#define ELEMENT int64_t
#define BITS uint64_t
#include "comm/tiers/plain_integers.h"

/* Truth values: 0 or 1 in the tile, any byte in memory. */
static void fold_bool(sl_reduce_op op, uint8_t *restrict sum, const uint8_t *restrict in, size_t count) {
  switch (op) {
    case SL_REDUCE_PRODUCT:
    case SL_REDUCE_MIN:
    case SL_REDUCE_BAND:
      for (size_t i = 0; i < count; ++i) sum[i] = (uint8_t)(sum[i] & (in[i] != 0));
      break;
    case SL_REDUCE_BXOR:
      for (size_t i = 0; i < count; ++i) sum[i] = (uint8_t)(sum[i] ^ (in[i] != 0));
      break;
    default:
      for (size_t i = 0; i < count; ++i) sum[i] = (uint8_t)(sum[i] | (in[i] != 0));
      break;
  }
}

static void reduce_bool(const sl_reduce_args *args) {
  uint8_t sum[TILE_BYTES];
  for (size_t first = 0; first < args->count; first += TILE_BYTES) {
    size_t left = args->count - first, count = left < TILE_BYTES ? left : TILE_BYTES;
    memset(sum, 0, count);
    fold_bool(SL_REDUCE_BOR, sum, (const uint8_t *)args->in[0] + first, count);
    for (int source = 1; source < args->sources; ++source) {
      fold_bool(args->op, sum, (const uint8_t *)args->in[source] + first, count);
    }
    memcpy((uint8_t *)args->out + first, sum, count);
  }
}

static void reduce_integers(const sl_reduce_args *args) {
  switch (args->dtype) {
    case SL_I8: reduce_i8(args); break;
    case SL_U8: reduce_u8(args); break;
    case SL_I16: reduce_i16(args); break;
    case SL_I32: reduce_i32(args); break;
    case SL_I64: reduce_i64(args); break;
    case SL_BOOL: reduce_bool(args); break;
    default: break; /* refused by sl_reduce_validate() */
  }
}

#endif
