/* Which pairs dropout lets through: a hash of the seed and of where the pair is, so that every path and pass agrees. */
#ifndef SL_ATTENTION_DROPOUT_H
#define SL_ATTENTION_DROPOUT_H

#include "attention/plan.h"

/* What a row of a query head needs; all: nothing is dropped. */
typedef struct sl_dropout_row {
  bool all;
  uint32_t first, second; /* keys of the two rounds */
  uint32_t threshold;     /* a pair stays if its hash is at least this */
} sl_dropout_row;

sl_dropout_row sl_dropout_of_row(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query);

/* The finalizer of MurmurHash3: every bit of the input changes every bit of the result in half of the cases. */
static inline uint32_t sl_dropout_mix(uint32_t bits) {
  bits ^= bits >> 16;
  bits *= 0x85ebca6bu;
  bits ^= bits >> 13;
  bits *= 0xc2b2ae35u;
  return bits ^ (bits >> 16);
}

/* Whether a pair stays. */
static inline bool sl_dropout_keeps(const sl_dropout_row *row, int32_t key) {
  uint32_t hash = sl_dropout_mix(sl_dropout_mix((uint32_t)key + row->first) ^ row->second);
  return row->all || hash >= row->threshold;
}

/* What pairs that stay are multiplied by. */
static inline float sl_dropout_scale(const sl_gated_attention_args *args) { return (float)(1 / (1 - args->dropout_p)); }

/* Clears the elements, of element_size 2 or 4 bytes, of pairs that go: keys[0 .. lengths[r]) of each row. */
void sl_dropout_clear(const sl_gated_attention_args *args, int64_t batch, int64_t head, const int32_t *queries,
                      const int32_t *keys, int64_t rows, const int32_t *lengths, void *tile, int64_t stride,
                      size_t element_size);

#endif
