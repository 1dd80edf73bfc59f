/* Stable radix sort of up to SL_ATTENTION_MAX_CHUNK floats, largest first. */
#include <string.h>

#include "attention/chunk.h"
#include "runtime/number.h"

enum { RADIX_BITS = 8, RADIX = 1 << RADIX_BITS, PASSES = 32 / RADIX_BITS, SMALL = 96 };

/* The unsigned number whose rising order is NaN first, then falling floats (+0 before -0). */
static inline uint32_t falling_code(float key) {
  uint32_t bits = sl_float_bits(key);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

/* Each key's place is the number of keys that go before it: all pairs, but without branches, and in vectors. */
static void sort_few(const float *keys, int64_t count, int32_t *order) {
  int32_t code[SMALL];
  for (int64_t i = 0; i < count; ++i) code[i] = (int32_t)(falling_code(keys[i]) ^ 0x80000000u);
  for (int64_t i = 0; i < count; ++i) {
    int32_t place = 0;
    for (int64_t j = 0; j < i; ++j) place += code[j] <= code[i];
    for (int64_t j = i + 1; j < count; ++j) place += code[j] < code[i];
    order[place] = (int32_t)i;
  }
}

void sl_sort_falling(const float *keys, int64_t count, int32_t *order) {
  if (count <= SMALL) {
    sort_few(keys, count, order);
    return;
  }
  uint64_t items[SL_ATTENTION_MAX_CHUNK], other[SL_ATTENTION_MAX_CHUNK]; /* code in the upper half, number below */
  uint64_t *from = items, *to = other;
  for (int64_t i = 0; i < count; ++i) items[i] = (uint64_t)falling_code(keys[i]) << 32 | (uint64_t)i;
  uint16_t starts[PASSES][RADIX];
  memset(starts, 0, sizeof starts);
  for (int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < PASSES; ++pass) ++starts[pass][items[i] >> (32 + pass * RADIX_BITS) & (RADIX - 1)];
  }
  for (int pass = 0; pass < PASSES; ++pass) {
    int shift = 32 + pass * RADIX_BITS;
    uint16_t *start = starts[pass];
    if (start[from[0] >> shift & (RADIX - 1)] == count) continue; /* all alike in these bits */
    uint16_t total = 0;
    for (int bucket = 0; bucket < RADIX; ++bucket) {
      uint16_t size = start[bucket];
      start[bucket] = total;
      total = (uint16_t)(total + size);
    }
    for (int64_t i = 0; i < count; ++i) to[start[from[i] >> shift & (RADIX - 1)]++] = from[i];
    uint64_t *swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = 0; i < count; ++i) order[i] = (int32_t)(uint32_t)from[i];
}
