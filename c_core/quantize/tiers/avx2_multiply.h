/* What the multiplications of the AVX2 table share. */
#ifndef SL_QUANTIZE_AVX2_MULTIPLY_H
#define SL_QUANTIZE_AVX2_MULTIPLY_H

#include <string.h>

#include "quantize/kernel.h"
#include "runtime/tiers/simd.h"

#define INLINE static inline __attribute__((always_inline))

/* DO(r) for each of the first five rows that there are; `rows` is a constant where it stands. */
#define EACH_OF_FIVE_ROWS(DO) \
  DO(0)                       \
  if (rows > 1) {             \
    DO(1)                     \
  }                           \
  if (rows > 2) {             \
    DO(2)                     \
  }                           \
  if (rows > 3) {             \
    DO(3)                     \
  }                           \
  if (rows > 4) {             \
    DO(4)                     \
  }

/* Bits of int32 or four bytes at an address of any alignment, in all lanes. */
INLINE __m256i sl_quantize_avx2_broadcast(const void *from) {
  int32_t bits;
  memcpy(&bits, from, sizeof bits);
  return _mm256_set1_epi32(bits);
}

/* Asks for the block that comes so much later: the processor's own prefetching ends at each page, which a stream of
 * weights from memory waits for (4096 x 4096, one row: 1.3 times as fast; 8 rows: 1.25 times). */
INLINE void sl_quantize_avx2_fetch(const uint8_t *block) { _mm_prefetch((const char *)block + 2048, _MM_HINT_T0); }

/* At most so many rows. */
enum { SL_QUANTIZE_AVX2_ROWS7 = 5 };
void sl_quantize_avx2_multiply7(const sl_quantize_tile *tile);

#endif
