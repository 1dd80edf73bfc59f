/* The kernel table for AVX-512 VNNI. vpdpbusd adds four products of an unsigned and a signed byte to each 32-bit lane,
 * without saturation: weights are the unsigned operand, as w + 128 or w + 8, and what that adds, 128 or 8 times the
 * sum of the activations, is taken off in advance. */
#include <stddef.h>
#include <string.h>

#include "quantize/tiers/avx2_rows.h"
#include "runtime/tiers/simd.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512i broadcast(const int8_t *from) {
  int32_t bits;
  memcpy(&bits, from, sizeof bits);
  return _mm512_set1_epi32(bits);
}

/* Blocks of 64 bytes: of 4 inputs in 8 bits, of 8 inputs in 4 bits. first and second are their two groups of 4
 * inputs in
 * the order of the activations; 8-bit weights take two blocks. */
INLINE void read_blocks(const uint8_t *block, const int bits, __m512i *first, __m512i *second) {
  if (bits == 4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i pairs = _mm512_loadu_si512(block);
    *first = _mm512_and_si512(pairs, nibble);
    *second = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
    return;
  }
  /* Inputs 0, 2, 1, 3 to 0, 1, 2, 3, and w to w + 128. */
  const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  *first = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_loadu_si512(block), order), sign);
  *second = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_loadu_si512(block + 64), order), sign);
}

/* Two sums a row, since vpdpbusd takes several cycles. */
INLINE void multiply_rows(const sl_quantize_tile *tile, const int bits, const int rows) {
  const uint8_t *block = tile->weight;
  const float *scale = tile->scale;
  int64_t k = 0;
  for (int64_t segment = 0; segment < tile->segments; ++segment, scale += tile->scale_stride) {
    __m512i even[SL_QUANTIZE_TILE_ROWS], odd[SL_QUANTIZE_TILE_ROWS];
    for (int r = 0; r < rows; ++r) {
      even[r] = _mm512_set1_epi32((bits == 4 ? -8 : -128) * tile->sums[r][segment]);
      odd[r] = _mm512_setzero_si512();
    }
    for (const int64_t end = k + tile->depth; k < end; k += 8, block += 16 * bits) {
      __m512i first, second;
      read_blocks(block, bits, &first, &second);
      for (int r = 0; r < rows; ++r) {
        const int8_t *x = (const int8_t *)tile->activations[r] + k;
        even[r] = _mm512_dpbusd_epi32(even[r], first, broadcast(x));
        odd[r] = _mm512_dpbusd_epi32(odd[r], second, broadcast(x + 4));
      }
    }
    for (int r = 0; r < rows; ++r) {
      float *out = tile->out + r * SL_QUANTIZE_PANEL;
      __m512 sums = _mm512_cvtepi32_ps(_mm512_add_epi32(even[r], odd[r]));
      _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_loadu_ps(scale), sums, _mm512_loadu_ps(out)));
    }
  }
}

#define EACH_HEIGHT(tile, bits)                   \
  switch ((tile)->rows) {                         \
    case 1: multiply_rows(tile, bits, 1); break;  \
    case 2: multiply_rows(tile, bits, 2); break;  \
    case 3: multiply_rows(tile, bits, 3); break;  \
    case 4: multiply_rows(tile, bits, 4); break;  \
    case 5: multiply_rows(tile, bits, 5); break;  \
    default: multiply_rows(tile, bits, 6); break; \
  }
static void multiply8(const sl_quantize_tile *tile) { EACH_HEIGHT(tile, 8) }
static void multiply4(const sl_quantize_tile *tile) { EACH_HEIGHT(tile, 4) }

static int64_t run_peak(int64_t count) {
  enum { SUMS = 12 };
  __m512i sums[SUMS], left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(2);
  for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_setzero_si512();
  int64_t done = 0;
  for (; done < count; done += 64 * SUMS) {
#if !defined(SL_EMULATED)
    __asm__ volatile("" : "+v"(left), "+v"(right)); /* the compiler must not know that nothing changes */
#endif
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], left, right);
  }
  volatile int32_t sink = 0;
  for (int i = 0; i < SUMS; ++i) sink = sink ^ _mm_cvtsi128_si32(_mm512_castsi512_si128(sums[i]));
  return done;
}

const sl_quantize_kernel sl_quantize_avx512vnni = {
    .name = "avx512vnni",
    .isa = SL_ISA_AVX512VNNI,
    .wide_activations = false,
    .height8 = SL_QUANTIZE_TILE_ROWS,
    .height4 = SL_QUANTIZE_TILE_ROWS,
    .load_row = sl_quantize_avx2_load_row,
    .measure_row = sl_quantize_avx2_measure_row,
    .measure_channels = sl_quantize_avx2_measure_channels,
    .quantize_row = sl_quantize_avx2_quantize_row,
    .narrow_row = sl_quantize_avx2_narrow_row,
    .sum_row = sl_quantize_avx2_sum_row,
    .multiply8 = multiply8,
    .multiply4 = multiply4,
    .finish = sl_quantize_avx2_finish,
    .lstm_gates = sl_quantize_avx2_lstm_gates,
    .gru_gates = sl_quantize_avx2_gru_gates,
    .run_peak = run_peak,
};
