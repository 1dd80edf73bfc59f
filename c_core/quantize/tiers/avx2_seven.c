/* 8-bit weights times activations of at most 7 bits, for AVX2. The weights are the unsigned operand of vpmaddubsw,
 * w + 128 in 1 .. 255, activations in -63 .. 63 the signed one: two products are at most 2 * 255 * 63 = 32130, which
 * 16 bits hold. What the 128 adds, 128 * the sum of the activations, is taken off in advance.
 *
 * Ten sums (five rows, two halves of a panel), two halves of a block, four activations, a product and the ones are
 * fifteen of sixteen registers: hence sums with names, and a product and its sum in one piece, as in avx2.c. (Twelve
 * rows times half a panel read every weight twice, which is slower.) */
#include <stddef.h>

#include "quantize/tiers/avx2_multiply.h"

#if defined(SL_EMULATED)
#define ADD_PRODUCTS(sum, x, weight, ones) \
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, x), ones));
#else
#define ADD_PRODUCTS(sum, x, weight, ones)                                                                    \
  {                                                                                                           \
    __m256i product;                                                                                          \
    __asm__("vpmaddubsw %[x_], %[w_], %[p_]\n\tvpmaddwd %[ones_], %[p_], %[p_]\n\tvpaddd %[p_], %[s_], %[s_]" \
            : [s_] "+x"(sum), [p_] "=&x"(product)                                                             \
            : [x_] "x"(x), [w_] "x"(weight), [ones_] "x"(ones));                                              \
  }
#endif

INLINE __m256i read_weights(const uint8_t *half_block) {
  const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, /* as packed */
                                         0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  __m256i weights = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)half_block), order);
  return _mm256_xor_si256(weights, _mm256_set1_epi8((char)0x80));
}

INLINE void add_to_tile(float *out, const float *scale, __m256i sums) {
  __m256 added = _mm256_fmadd_ps(_mm256_loadu_ps(scale), _mm256_cvtepi32_ps(sums), _mm256_loadu_ps(out));
  _mm256_storeu_ps(out, added);
}

INLINE void multiply_rows(const sl_quantize_tile *tile, const int rows) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int8_t *const *list = (const int8_t *const *)tile->activations;
  const int8_t *x0 = NULL, *x1 = NULL, *x2 = NULL, *x3 = NULL, *x4 = NULL;
#define TAKE(r) x##r = list[r];
  EACH_OF_FIVE_ROWS(TAKE)
  const uint8_t *block = tile->weight;
  const float *scale = tile->scale;
  const int64_t depth = tile->depth;
  int64_t k = 0;
  for (int64_t segment = 0; segment < tile->segments; ++segment, scale += tile->scale_stride) {
    __m256i low0, low1, low2, low3, low4, high0, high1, high2, high3, high4;
    low1 = low2 = low3 = low4 = high1 = high2 = high3 = high4 = _mm256_setzero_si256();
#define START(r) low##r = high##r = _mm256_set1_epi32(-128 * tile->sums[r][segment]);
    EACH_OF_FIVE_ROWS(START)
    for (const int64_t end = k + depth; k < end; k += 4, block += 64) {
      sl_quantize_avx2_fetch(block);
      __m256i left = read_weights(block), right = read_weights(block + 32);
#define STEP(r)                                          \
  {                                                      \
    __m256i four = sl_quantize_avx2_broadcast(x##r + k); \
    ADD_PRODUCTS(low##r, four, left, ones)               \
    ADD_PRODUCTS(high##r, four, right, ones)             \
  }
      EACH_OF_FIVE_ROWS(STEP)
    }
#define FINISH(r)                                                  \
  add_to_tile(tile->out + (r) * SL_QUANTIZE_PANEL, scale, low##r); \
  add_to_tile(tile->out + (r) * SL_QUANTIZE_PANEL + 8, scale + 8, high##r);
    EACH_OF_FIVE_ROWS(FINISH)
  }
}

void sl_quantize_avx2_multiply7(const sl_quantize_tile *tile) {
  switch (tile->rows) {
    case 1: multiply_rows(tile, 1); break;
    case 2: multiply_rows(tile, 2); break;
    case 3: multiply_rows(tile, 3); break;
    case 4: multiply_rows(tile, 4); break;
    default: multiply_rows(tile, SL_QUANTIZE_AVX2_ROWS7); break;
  }
}
