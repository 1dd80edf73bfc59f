/* The kernel table for AVX2. The two instructions for 8-bit products have a flaw each: vpmaddubsw saturates its 16-bit
 * sums, so it is used only where they are known to be small (multiply4, with 4-bit weights, and avx2_seven.c, with
 * 7-bit activations); vpmaddwd wants 16-bit operands, so 8-bit weights are widened in registers, which leaves 16-bit
 * activations at the price of 8-bit ones. */
#include <stddef.h>
#include <string.h>

#include "quantize/tiers/avx2_multiply.h"
#include "quantize/tiers/avx2_rows.h"
#include "runtime/tiers/simd.h"

/* out += scale * sums, for the two halves of a row of a tile. */
static inline void add_to_tile(float *out, const float *scale, __m256i low, __m256i high) {
  __m256 first = _mm256_fmadd_ps(_mm256_loadu_ps(scale), _mm256_cvtepi32_ps(low), _mm256_loadu_ps(out));
  __m256 second = _mm256_fmadd_ps(_mm256_loadu_ps(scale + 8), _mm256_cvtepi32_ps(high), _mm256_loadu_ps(out + 8));
  _mm256_storeu_ps(out, first), _mm256_storeu_ps(out + 8, second);
}

/* Twelve sums and what they are made of need all sixteen registers, which takes care: the sums are variables with
 * names, since gcc keeps an array in memory; there is a function for each number of rows; and a product and its sum
 * are one piece, since gcc would start all products at once, or copy sums from one register to another. */
#if defined(SL_EMULATED)
#define ADD_WORDS(sum, x, weight) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, weight));
#define ADD_BYTES(sum, x, weight) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weight, x));
#else
#define ADD_PIECE(multiply, add, sum, x, weight)                           \
  {                                                                        \
    __m256i product;                                                       \
    __asm__(multiply " %[x_], %[w_], %[p_]\n\t" add " %[p_], %[s_], %[s_]" \
            : [s_] "+x"(sum), [p_] "=&x"(product)                          \
            : [x_] "x"(x), [w_] "x"(weight));                              \
  }
#define ADD_WORDS(sum, x, weight) ADD_PIECE("vpmaddwd", "vpaddd", sum, x, weight)
#define ADD_BYTES(sum, x, weight) ADD_PIECE("vpmaddubsw", "vpaddw", sum, x, weight)
#endif
#define EACH_ROW(DO)    \
  EACH_OF_FIVE_ROWS(DO) \
  if (rows > 5) {       \
    DO(5)               \
  }
#define EACH_HEIGHT(function, tile)    \
  switch ((tile)->rows) {              \
    case 1: function(tile, 1); break;  \
    case 2: function(tile, 2); break;  \
    case 3: function(tile, 3); break;  \
    case 4: function(tile, 4); break;  \
    case 5: function(tile, 5); break;  \
    default: function(tile, 6); break; \
  }
#define TAKE_ROWS(type)                                                                   \
  const type *const *list = (const type *const *)tile->activations;                       \
  const type *x0 = list[0], *x1 = rows > 1 ? list[1] : x0, *x2 = rows > 2 ? list[2] : x0; \
  const type *x3 = rows > 3 ? list[3] : x0, *x4 = rows > 4 ? list[4] : x0, *x5 = rows > 5 ? list[5] : x0;
#define ZERO_SUMS                                                                       \
  __m256i low0, low1, low2, low3, low4, low5, high0, high1, high2, high3, high4, high5; \
  low0 = low1 = low2 = low3 = low4 = low5 = high0 = high1 = high2 = high3 = high4 = high5 = _mm256_setzero_si256();
#define ADD_ROW(r) add_to_tile(tile->out + (r) * SL_QUANTIZE_PANEL, scale, low##r, high##r);
/* Inputs 0 and 1 of a block of 4 are the even bytes, 2 and 3 the odd ones: as int16 pairs, each one or two shifts. */
INLINE void multiply8_rows(const sl_quantize_tile *tile, const int rows) {
  TAKE_ROWS(int16_t)
  const uint8_t *block = tile->weight;
  const int64_t depth = tile->depth;
  const float *scale = tile->scale;
  int64_t k = 0;
  for (int64_t segment = 0; segment < tile->segments; ++segment, scale += tile->scale_stride) {
    ZERO_SUMS
    for (const int64_t end = k + depth; k < end; k += 4, block += 64) {
      sl_quantize_avx2_fetch(block);
      __m256i bytes = _mm256_loadu_si256((const __m256i *)block);
      __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
#define STEP(r)                                                 \
  ADD_WORDS(low##r, sl_quantize_avx2_broadcast(x##r + k), even) \
  ADD_WORDS(low##r, sl_quantize_avx2_broadcast(x##r + k + 2), odd)
      EACH_ROW(STEP)
#undef STEP
      bytes = _mm256_loadu_si256((const __m256i *)(block + 32));
      even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
#define STEP(r)                                                  \
  ADD_WORDS(high##r, sl_quantize_avx2_broadcast(x##r + k), even) \
  ADD_WORDS(high##r, sl_quantize_avx2_broadcast(x##r + k + 2), odd)
      EACH_ROW(STEP)
#undef STEP
    }
    EACH_ROW(ADD_ROW)
  }
}
static void multiply8(const sl_quantize_tile *tile) { EACH_HEIGHT(multiply8_rows, tile) }

/* Blocks as multiply8 makes of them: for inputs k and k + 1, the int16 pairs of 16 channels. */
static void unpack_segment(const uint8_t *weight, int64_t depth, void *out) {
  __m256i *to = out;
  for (int64_t k = 0; k < depth; k += 4, weight += 64, to += 4) {
    sl_quantize_avx2_fetch(weight);
    __m256i low = _mm256_loadu_si256((const __m256i *)weight);
    __m256i high = _mm256_loadu_si256((const __m256i *)(weight + 32));
    _mm256_store_si256(to, _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8));
    _mm256_store_si256(to + 1, _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8));
    _mm256_store_si256(to + 2, _mm256_srai_epi16(low, 8));
    _mm256_store_si256(to + 3, _mm256_srai_epi16(high, 8));
  }
}

INLINE void multiply8_unpacked_rows(const sl_quantize_tile *tile, const int rows) {
  TAKE_ROWS(int16_t)
  ZERO_SUMS
  const __m256i *pairs = (const __m256i *)tile->weight;
  const int64_t depth = tile->depth;
  const float *scale = tile->scale;
#define STEP(r)                                          \
  {                                                      \
    __m256i two = sl_quantize_avx2_broadcast(x##r + at); \
    ADD_WORDS(low##r, two, left)                         \
    ADD_WORDS(high##r, two, right)                       \
  }
  for (int64_t k = 0; k < depth; k += 4, pairs += 4) {
    __m256i left = _mm256_load_si256(pairs), right = _mm256_load_si256(pairs + 1);
    int64_t at = k;
    EACH_ROW(STEP)
    left = _mm256_load_si256(pairs + 2), right = _mm256_load_si256(pairs + 3), at = k + 2;
    EACH_ROW(STEP)
  }
#undef STEP
  EACH_ROW(ADD_ROW)
}
static void multiply8_unpacked(const sl_quantize_tile *tile){EACH_HEIGHT(multiply8_unpacked_rows, tile)}

/* Weights are the unsigned operand, w + 8 in 1 .. 15, activations in [-128, 127] the signed one. A 16-bit lane takes
 * 2 products an instruction, 16 in 8 instructions: at most 16 * 15 * 128 = 30720, so it is widened each 32 inputs.
 * What the 8 adds, 8 * the sum of the activations, is taken off in advance. */
INLINE void multiply4_rows(const sl_quantize_tile *tile, const int rows) {
  TAKE_ROWS(int8_t)
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const uint8_t *block = tile->weight;
  const int64_t depth = tile->depth;
  const float *scale = tile->scale;
  int64_t k = 0;
  for (int64_t segment = 0; segment < tile->segments; ++segment, scale += tile->scale_stride) {
    __m256i wide[2 * SL_QUANTIZE_TILE_ROWS]; /* in memory: there are no registers left */
    for (int i = 0; i < 2 * rows; ++i) wide[i] = _mm256_set1_epi32(-8 * tile->sums[i / 2][segment]);
    for (const int64_t segment_end = k + depth; k < segment_end;) {
      ZERO_SUMS
      for (const int64_t end = k + 32 < segment_end ? k + 32 : segment_end; k < end; k += 8, block += 64) {
        sl_quantize_avx2_fetch(block);
        __m256i pairs = _mm256_loadu_si256((const __m256i *)block);
        __m256i left = _mm256_and_si256(pairs, nibble);
        __m256i next_left = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
        pairs = _mm256_loadu_si256((const __m256i *)(block + 32));
        __m256i right = _mm256_and_si256(pairs, nibble);
        __m256i next_right = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
#define STEP(r)                                          \
  {                                                      \
    __m256i four = sl_quantize_avx2_broadcast(x##r + k); \
    ADD_BYTES(low##r, four, left)                        \
    ADD_BYTES(high##r, four, right)                      \
    four = sl_quantize_avx2_broadcast(x##r + k + 4);     \
    ADD_BYTES(low##r, four, next_left)                   \
    ADD_BYTES(high##r, four, next_right)                 \
  }
        EACH_ROW(STEP)
#undef STEP
      }
#define WIDEN(r)                                                                \
  wide[2 * r] = _mm256_add_epi32(wide[2 * r], _mm256_madd_epi16(low##r, ones)); \
  wide[2 * r + 1] = _mm256_add_epi32(wide[2 * r + 1], _mm256_madd_epi16(high##r, ones));
      EACH_ROW(WIDEN)
#undef WIDEN
    }
    for (int r = 0; r < rows; ++r) {
      add_to_tile(tile->out + r * SL_QUANTIZE_PANEL, scale, wide[2 * r], wide[2 * r + 1]);
    }
  }
}
static void multiply4(const sl_quantize_tile *tile) { EACH_HEIGHT(multiply4_rows, tile) }

/* The customary sequence of 32 products: vpmaddubsw, vpmaddwd, vpaddd; 12 sums hide its latency. */
static int64_t run_peak(int64_t count) {
  enum { SUMS = 12 };
  __m256i sums[SUMS], left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  for (int i = 0; i < SUMS; ++i) sums[i] = _mm256_setzero_si256();
  int64_t done = 0;
  for (; done < count; done += 32 * SUMS) {
#if !defined(SL_EMULATED)
    __asm__ volatile("" : "+x"(left), "+x"(right)); /* the compiler must not know that nothing changes */
#endif
    for (int i = 0; i < SUMS; ++i) {
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(left, right), ones));
    }
  }
  volatile int32_t sink = 0;
  for (int i = 0; i < SUMS; ++i) sink = sink ^ _mm256_extract_epi32(sums[i], 0);
  return done;
}

const sl_quantize_kernel sl_quantize_avx2 = {
    .name = "avx2",
    .isa = SL_ISA_AVX2,
    .wide_activations = true,
    .height8 = 3, /* with four and more, widening waits for registers */
    .height8_unpacked = SL_QUANTIZE_TILE_ROWS,
    .height7 = SL_QUANTIZE_AVX2_ROWS7,
    .height4 = 4,
    .load_row = sl_quantize_avx2_load_row,
    .measure_row = sl_quantize_avx2_measure_row,
    .measure_channels = sl_quantize_avx2_measure_channels,
    .quantize_row = sl_quantize_avx2_quantize_row,
    .narrow_row = sl_quantize_avx2_narrow_row,
    .sum_row = sl_quantize_avx2_sum_row,
    .multiply8 = multiply8,
    .multiply4 = multiply4,
    .multiply7 = sl_quantize_avx2_multiply7,
    .unpack_segment = unpack_segment,
    .multiply8_unpacked = multiply8_unpacked,
    .finish = sl_quantize_avx2_finish,
    .lstm_gates = sl_quantize_avx2_lstm_gates,
    .gru_gates = sl_quantize_avx2_gru_gates,
    .run_peak = run_peak,
};
