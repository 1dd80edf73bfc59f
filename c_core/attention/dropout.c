/* Dropout of a tile of weights. */
#include "attention/dropout.h"

#include <math.h>

/* A mix of 64 bits (splitmix64's): the next number of a stream, and its bits. */
static uint64_t mix64(uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

sl_dropout_row sl_dropout_of_row(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query) {
  sl_dropout_row row = {.all = args->dropout_p == 0};
  if (row.all) return row;
  uint64_t number = (uint64_t)(args->dropout_first_row + (batch * args->heads_q + head) * args->n_q + query);
  uint64_t bits = mix64(mix64((uint64_t)*args->dropout_seed) + number);
  row.first = (uint32_t)bits;
  row.second = (uint32_t)(bits >> 32);
  double threshold = ceil(args->dropout_p * 4294967296.0);
  row.threshold = threshold > 4294967295.0 ? UINT32_MAX : (uint32_t)threshold;
  return row;
}

void sl_dropout_clear(const sl_gated_attention_args *args, int64_t batch, int64_t head, const int32_t *queries,
                      const int32_t *keys, int64_t rows, const int32_t *lengths, void *tile, int64_t stride,
                      size_t element_size) {
  if (args->dropout_p == 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    sl_dropout_row row = sl_dropout_of_row(args, batch, head, queries[r]);
    row.all = false;
    if (element_size == sizeof(float)) {
      float *elements = (float *)tile + r * stride;
      for (int64_t j = 0; j < lengths[r]; ++j) elements[j] = sl_dropout_keeps(&row, keys[j]) ? elements[j] : 0;
    } else {
      uint16_t *elements = (uint16_t *)tile + r * stride;
      for (int64_t j = 0; j < lengths[r]; ++j) elements[j] = sl_dropout_keeps(&row, keys[j]) ? elements[j] : 0;
    }
  }
}
