/* The kernel table for AVX2. The two instructions for 8-bit products have a flaw each: vpmaddubsw saturates its 16-bit
 * sums, so it is used only where they are known to be small (4-bit weights, multiply4); vpmaddwd wants 16-bit operands,
 * so 8-bit weights are widened in registers, which leaves 16-bit activations at the price of 8-bit ones. */
#include <stddef.h>
#include <string.h>

#include "quantize/row_loops.h"
#include "runtime/simd.h"

static __m256 load_half(sl_dtype dtype, const uint16_t *x) {
  __m128i bits = _mm_loadu_si128((const __m128i *)x);
  if (dtype == SL_F16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

static void load_row(sl_dtype dtype, const void *x, int64_t count, float *out) {
  const uint16_t *from = x;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load_half(dtype, from + i));
  for (; i < count; ++i) out[i] = sl_load_value(dtype, x, i);
}

static void measure_row(const float *x, int64_t count, uint32_t *amax_bits, double *sumsq) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 values = _mm256_loadu_ps(x + i);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
    __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
    __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
    low = _mm256_fmadd_pd(first, first, low), high = _mm256_fmadd_pd(second, second, high);
  }
  uint32_t lanes[8], most = 0;
  double sums[4], sum;
  _mm256_storeu_si256((__m256i *)lanes, largest);
  _mm256_storeu_pd(sums, _mm256_add_pd(low, high));
  for (int lane = 0; lane < 8; ++lane) most = lanes[lane] > most ? lanes[lane] : most;
  sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (; i < count; ++i) {
    uint32_t bits = sl_float_bits(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
    sum += (double)x[i] * (double)x[i];
  }
  *amax_bits = most, *sumsq = sum;
}

static void measure_channels(const float *x, int64_t count, float *channel_amax) {
  sl_loop_measure_channels(x, count, channel_amax);
}

static __m256i quantize_eight(const float *x, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse)); /* to nearest even */
}

static void quantize_row(const float *x, int64_t count, float inverse, int32_t qmax, int16_t *q) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i most = _mm256_set1_epi16((int16_t)qmax), least = _mm256_set1_epi16((int16_t)-qmax);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    /* |x * inverse| is at most qmax and a rounding error: nothing saturates before it is clamped. */
    __m256i pair = _mm256_packs_epi32(quantize_eight(x + i, factor), quantize_eight(x + i + 8, factor));
    pair = _mm256_permute4x64_epi64(pair, 0xd8);
    pair = _mm256_max_epi16(_mm256_min_epi16(pair, most), least);
    _mm256_storeu_si256((__m256i *)(q + i), pair);
  }
  for (; i < count; ++i) q[i] = (int16_t)sl_round_to_integer(x[i], inverse, qmax);
}

static void narrow_row(const int16_t *q, int64_t count, int8_t *high, int8_t *low) {
  sl_loop_narrow_row(q, count, high, low);
}

static int32_t sum_row(const int8_t *q, int64_t count) { return sl_loop_sum_row(q, count); }

/* Bits of int32 or four bytes at an address of any alignment, in all lanes. */
static inline __m256i broadcast(const void *from) {
  int32_t bits;
  memcpy(&bits, from, sizeof bits);
  return _mm256_set1_epi32(bits);
}

/* out += scale * sums, for the two halves of a row of a tile. */
static inline void add_to_tile(float *out, const float *scale, __m256i low, __m256i high) {
  __m256 first = _mm256_fmadd_ps(_mm256_loadu_ps(scale), _mm256_cvtepi32_ps(low), _mm256_loadu_ps(out));
  __m256 second = _mm256_fmadd_ps(_mm256_loadu_ps(scale + 8), _mm256_cvtepi32_ps(high), _mm256_loadu_ps(out + 8));
  _mm256_storeu_ps(out, first), _mm256_storeu_ps(out + 8, second);
}

/* A function for each number of rows: with it constant, the sums of all rows stay in registers. */
#define FOR_EACH_HEIGHT(function, tile)       \
  switch ((tile)->rows) {                     \
    case 1: function(tile, 1); break;         \
    case 2: function(tile, 2); break;         \
    case 3: function(tile, 3); break;         \
    case 4: function(tile, 4); break;         \
    case 5: function(tile, 5); break;         \
    default: function(tile, 6); break;        \
  }
#define INLINE static inline __attribute__((always_inline))

/* Inputs 0 and 1 of a block of 4 are the even bytes, 2 and 3 the odd ones: as int16 pairs, each one or two shifts. */
INLINE void multiply8_rows(const sl_quantize_tile *tile, const int rows) {
  __m256i sums[SL_QUANTIZE_TILE_ROWS][2];
  const int16_t *x[SL_QUANTIZE_TILE_ROWS];
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    x[r] = tile->activations[r];
  }
  const uint8_t *block = tile->weight;
  for (int64_t k = 0; k < tile->depth; k += 4, block += 64) {
    for (int half = 0; half < 2; ++half) {
      __m256i bytes = _mm256_loadu_si256((const __m256i *)(block + 32 * half));
      __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
      for (int r = 0; r < rows; ++r) {
        __m256i products = _mm256_madd_epi16(broadcast(x[r] + k), even);
        sums[r][half] = _mm256_add_epi32(sums[r][half], products);
        products = _mm256_madd_epi16(broadcast(x[r] + k + 2), odd);
        sums[r][half] = _mm256_add_epi32(sums[r][half], products);
      }
    }
  }
  for (int r = 0; r < rows; ++r) add_to_tile(tile->out + r * SL_QUANTIZE_PANEL, tile->scale, sums[r][0], sums[r][1]);
}
static void multiply8(const sl_quantize_tile *tile) { FOR_EACH_HEIGHT(multiply8_rows, tile) }

/* Blocks as multiply8 makes of them: for inputs k and k + 1, the int16 pairs of 16 channels. */
static void unpack_segment(const uint8_t *weight, int64_t depth, void *out) {
  __m256i *to = out;
  for (int64_t k = 0; k < depth; k += 4, weight += 64, to += 4) {
    __m256i low = _mm256_loadu_si256((const __m256i *)weight);
    __m256i high = _mm256_loadu_si256((const __m256i *)(weight + 32));
    _mm256_store_si256(to, _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8));
    _mm256_store_si256(to + 1, _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8));
    _mm256_store_si256(to + 2, _mm256_srai_epi16(low, 8));
    _mm256_store_si256(to + 3, _mm256_srai_epi16(high, 8));
  }
}

INLINE void multiply8_unpacked_rows(const sl_quantize_tile *tile, const int rows) {
  __m256i sums[SL_QUANTIZE_TILE_ROWS][2];
  const int16_t *x[SL_QUANTIZE_TILE_ROWS];
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    x[r] = tile->activations[r];
  }
  const __m256i *pairs = (const __m256i *)tile->weight;
  for (int64_t k = 0; k < tile->depth; k += 2, pairs += 2) {
    __m256i low = _mm256_load_si256(pairs), high = _mm256_load_si256(pairs + 1);
    for (int r = 0; r < rows; ++r) {
      __m256i two = broadcast(x[r] + k);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(two, low));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(two, high));
    }
  }
  for (int r = 0; r < rows; ++r) add_to_tile(tile->out + r * SL_QUANTIZE_PANEL, tile->scale, sums[r][0], sums[r][1]);
}
static void multiply8_unpacked(const sl_quantize_tile *tile) { FOR_EACH_HEIGHT(multiply8_unpacked_rows, tile) }

/* Weights are the unsigned operand, w + 8 in 1 .. 15, activations in [-128, 127] the signed one. A 16-bit lane takes
 * 2 products an instruction, 16 in 8 instructions: at most 16 * 15 * 128 = 30720, so it is widened each 32 inputs.
 * What the 8 adds, 8 * the sum of the activations, is taken off in advance. */
INLINE void multiply4_rows(const sl_quantize_tile *tile, const int rows) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sums[SL_QUANTIZE_TILE_ROWS][2];
  const int8_t *x[SL_QUANTIZE_TILE_ROWS];
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = sums[r][1] = _mm256_set1_epi32(-8 * tile->sums[r]);
    x[r] = tile->activations[r];
  }
  const uint8_t *block = tile->weight;
  for (int64_t k = 0; k < tile->depth;) {
    __m256i shorts[SL_QUANTIZE_TILE_ROWS][2];
    for (int r = 0; r < rows; ++r) shorts[r][0] = shorts[r][1] = _mm256_setzero_si256();
    int64_t end = k + 32 < tile->depth ? k + 32 : tile->depth;
    for (; k < end; k += 8, block += 64) {
      for (int half = 0; half < 2; ++half) {
        __m256i pairs = _mm256_loadu_si256((const __m256i *)(block + 32 * half));
        __m256i first = _mm256_and_si256(pairs, nibble);
        __m256i second = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
        for (int r = 0; r < rows; ++r) {
          __m256i products = _mm256_maddubs_epi16(first, broadcast(x[r] + k));
          shorts[r][half] = _mm256_add_epi16(shorts[r][half], products);
          products = _mm256_maddubs_epi16(second, broadcast(x[r] + k + 4));
          shorts[r][half] = _mm256_add_epi16(shorts[r][half], products);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(shorts[r][half], ones));
      }
    }
  }
  for (int r = 0; r < rows; ++r) add_to_tile(tile->out + r * SL_QUANTIZE_PANEL, tile->scale, sums[r][0], sums[r][1]);
}
static void multiply4(const sl_quantize_tile *tile) { FOR_EACH_HEIGHT(multiply4_rows, tile) }

static void finish(const sl_quantize_finish *work) { sl_loop_finish(work); }

/* The customary sequence of 32 products: vpmaddubsw, vpmaddwd, vpaddd; 12 sums hide its latency. */
static int64_t run_peak(int64_t count) {
  enum { SUMS = 12 };
  __m256i sums[SUMS], left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
  for (int i = 0; i < SUMS; ++i) sums[i] = _mm256_setzero_si256();
  int64_t done = 0;
  for (; done < count; done += 32 * SUMS) {
#if defined(__GNUC__)
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
    .load_row = load_row,
    .measure_row = measure_row,
    .measure_channels = measure_channels,
    .quantize_row = quantize_row,
    .narrow_row = narrow_row,
    .sum_row = sum_row,
    .multiply8 = multiply8,
    .multiply4 = multiply4,
    .unpack_segment = unpack_segment,
    .multiply8_unpacked = multiply8_unpacked,
    .finish = finish,
    .run_peak = run_peak,
};
