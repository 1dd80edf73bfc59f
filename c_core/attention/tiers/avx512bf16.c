/* AVX-512-BF16 overlay of the forward: bfloat16 operands stay bfloat16, and every product is taken in pairs by dpbf16,
 * which adds into float and takes subnormal numbers for 0. Weights are rounded to bfloat16 before they meet v; maxima,
 * sums and the gate are float. The backward has no table here: dS rounded to bfloat16 costs dq half a percent of its
 * size, so it runs on avx512_bf16, which widens. */

#include <sluice/gated_attention.h>

#include "runtime/tiers/simd.h"

#define WORD 2
#define ELEMENT_SIZE 2
#define multiply_add(sum, left, right) _mm512_dpbf16_ps(sum, (__m512bh)(left), (__m512bh)(right))
#define store_elements(weights, j, values) \
  _mm256_store_si256((__m256i *)((uint16_t *)(weights) + (j)), (__m256i)_mm512_cvtneps_pbh(values))

#include "attention/tiers/avx512_multiply.h"
#include "attention/tiers/avx512_softmax.h"

typedef uint16_t bf16;

SL_INLINE __m256i load_half(const bf16 *data, int64_t count) {
  return _mm256_maskz_loadu_epi16(sl_avx512_first_lanes(count), data);
}

SL_INLINE __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

/* Words (first, second), 16 of them. */
SL_INLINE __m512i pair_up(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

SL_INLINE const bf16 *token_row(const sl_token_rows *source, int32_t token) {
  return (const bf16 *)source->data + token * source->token_stride;
}

static void pack_rows(void *packed, int64_t packed_stride, const sl_token_rows *source, const int32_t *index,
                      int64_t count, float factor) {
  __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < sl_round_up(count, ROWS); ++r) {
    bf16 *target = (bf16 *)packed + r * packed_stride;
    for (int64_t c = 0; c < packed_stride; c += 16) {
      __m256i half = r < count && c < source->channels
                         ? load_half(token_row(source, index[r]) + c, source->channels - c)
                         : _mm256_setzero_si256();
      if (factor != 1) half = sl_avx512_round_to_bf16(_mm512_mul_ps(widen(half), scale));
      _mm256_store_si256((__m256i *)(target + c), half);
    }
  }
}

/* Neighbouring channels of a token are a word already: 32-bit words are transposed. */
static void pack_columns(void *packed, const sl_token_rows *source, const int32_t *index, int64_t count) {
  int64_t channels = source->channels, words = (channels + 1) / 2;
  float *target = packed;
  for (int64_t first = 0; first < count; first += PANEL, target += words * PANEL) {
    for (int64_t part = 0; part < PANEL; part += 16) {
      for (int64_t w = 0; w < words; w += 16) {
        __m512 block[16];
        for (int i = 0; i < 16; ++i) {
          int64_t token = first + part + i, left = channels - 2 * w;
          __mmask32 lanes = left >= 32 ? (__mmask32)0xffffffff : (__mmask32)((UINT32_C(1) << left) - 1);
          block[i] = token < count
                         ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, token_row(source, index[token]) + 2 * w))
                         : _mm512_setzero_ps();
        }
        sl_avx512_transpose(block);
        for (int64_t i = 0; i < 16 && w + i < words; ++i) _mm512_store_ps(target + (w + i) * PANEL + part, block[i]);
      }
    }
  }
}

static void pack_depths(void *packed, int64_t capacity, const sl_token_rows *source, const int32_t *index,
                        int64_t count) {
  int64_t channels = source->channels;
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t c = 0; c < sl_round_up(channels, PANEL); c += 16) {
      __m256i first = _mm256_setzero_si256(), second = first;
      if (c < channels) first = load_half(token_row(source, index[t]) + c, channels - c);
      if (c < channels && t + 1 < count) second = load_half(token_row(source, index[t + 1]) + c, channels - c);
      bf16 *target = (bf16 *)packed + c / PANEL * PANEL * capacity + t * PANEL + c % PANEL * 2;
      _mm512_store_si512((void *)target, pair_up(first, second));
    }
  }
}

/* The rows hold bfloat16 numbers, so that products are exact here as well. */
SL_INLINE void dot_four(const bf16 *rows, const int R, const bf16 *const key[4], int64_t channels, float *scores,
                        int64_t score_stride, int64_t count) {
  __m512 sum[SL_ATTENTION_TEAM][4];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < channels; c += 32) {
    __m512i keys[4];
    int64_t left = channels - c;
    __mmask32 lanes = left >= 32 ? (__mmask32)0xffffffff : (__mmask32)((UINT32_C(1) << left) - 1);
    for (int i = 0; i < 4; ++i) {
      keys[i] =
          left >= 32 ? _mm512_loadu_si512((const void *)(key[i] + c)) : _mm512_maskz_loadu_epi16(lanes, key[i] + c);
    }
    for (int r = 0; r < R; ++r) {
      __m512i row = _mm512_load_si512((const void *)(rows + r * SL_ATTENTION_MAX_HEAD_DIM + c));
      for (int i = 0; i < 4; ++i) sum[r][i] = multiply_add(sum[r][i], row, keys[i]);
    }
  }
  for (int r = 0; r < R; ++r)
    sl_avx512_store_four(scores + r * score_stride, sl_avx512_add_lanes_of_four(sum[r]), count);
}

SL_INLINE void dot_list(const bf16 *rows, const int R, const sl_row_list *list, float *scores, int64_t score_stride) {
  for (int64_t j = 0; j < list->count; j += 4) {
    int64_t count = list->count - j;
    const bf16 *key[4];
    for (int64_t i = 0; i < 4; ++i) {
      key[i] = token_row(list->source, list->index[i < count ? j + i : j]);
      sl_attention_prefetch_row(list, sizeof(bf16), j + i);
    }
    dot_four(rows, R, key, list->source->channels, scores + j, score_stride, count);
  }
}

static void dot_rows(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list, float *scores,
                     int64_t score_stride) {
  _Alignas(64) bf16 half[SL_ATTENTION_TEAM * SL_ATTENTION_MAX_HEAD_DIM];
  int64_t channels = list->source->channels;
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t c = 0; c < sl_round_up(channels, 32); c += 16) {
      __m512 values = sl_avx512_load_part(SL_F32, rows + r * row_stride + c, channels - c);
      store_elements(half + r * SL_ATTENTION_MAX_HEAD_DIM, c, values);
    }
  }
  switch (row_count) {
    case 1: dot_list(half, 1, list, scores, score_stride); break;
    case 2: dot_list(half, 2, list, scores, score_stride); break;
    case 3: dot_list(half, 3, list, scores, score_stride); break;
    default: dot_list(half, 4, list, scores, score_stride);
  }
}

const sl_attention_kernel sl_attention_avx512bf16_bf16_12x32 = {
    .name = "avx512bf16_bf16_12x32",
    .isa = SL_ISA_AVX512BF16,
    .dtype = SL_BF16,
    .row_tile = ROWS,
    .panel = PANEL,
    .depth_step = 2,
    .element_size = sizeof(bf16),
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .pack_depths = pack_depths,
    .multiply_nt = multiply_nt,
    .multiply_nn = multiply_nn,
    .mask_tile = sl_avx512_mask_tile,
    .bend_tile = sl_avx512_bend_tile,
    .softmax_tile = softmax_tile,
    .store_rows = sl_avx512_store_rows_bf16,
    .dot_rows = dot_rows,
    .add_rows = sl_avx512_add_rows_bf16,
    .weigh_row = sl_avx512_weigh_row,
};
