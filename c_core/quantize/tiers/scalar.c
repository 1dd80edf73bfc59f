/* The kernel table in plain C, which every machine has. */
#include <stddef.h>

#include "quantize/tiers/gate_loops.h"
#include "quantize/tiers/row_loops.h"

static void load_row(sl_dtype dtype, const void *x, int64_t count, float *out) {
  for (int64_t i = 0; i < count; ++i) out[i] = sl_load_value(dtype, x, i);
}

static void measure_row(const float *x, int64_t count, uint32_t *amax_bits, double *sumsq) {
  uint32_t largest = 0;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = sl_float_bits(x[i]) & 0x7fffffffu;
    if (bits > largest) largest = bits;
    sum += (double)x[i] * (double)x[i];
  }
  *amax_bits = largest, *sumsq = sum;
}

static void measure_channels(const float *x, int64_t count, float *channel_amax) {
  sl_loop_measure_channels(x, count, channel_amax);
}

static void quantize_row(const float *x, int64_t count, float inverse, int32_t qmax, int16_t *q) {
  for (int64_t i = 0; i < count; ++i) q[i] = (int16_t)sl_round_to_integer(x[i], inverse, qmax);
}

static void narrow_row(const int16_t *q, int64_t count, int8_t *high, int8_t *low) {
  sl_loop_narrow_row(q, count, high, low);
}

static int32_t sum_row(const int8_t *q, int64_t count) { return sl_loop_sum_row(q, count); }

static void add_tile_row(const sl_quantize_tile *tile, int row, int64_t segment, const int32_t *sums) {
  float *out = tile->out + row * SL_QUANTIZE_PANEL;
  const float *scale = tile->scale + segment * tile->scale_stride;
  for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) out[c] += scale[c] * (float)sums[c];
}

static void multiply8(const sl_quantize_tile *tile) {
  for (int row = 0; row < tile->rows; ++row) {
    const int16_t *x = tile->activations[row];
    const int8_t *block = (const int8_t *)tile->weight;
    for (int64_t segment = 0; segment < tile->segments; ++segment) {
      int32_t sums[SL_QUANTIZE_PANEL] = {0};
      for (int64_t k = 0; k < tile->depth; k += 4, x += 4, block += 64) {
        for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) {
          const int8_t *w = block + 4 * c;
          sums[c] += x[0] * w[0] + x[1] * w[2] + x[2] * w[1] + x[3] * w[3];
        }
      }
      add_tile_row(tile, row, segment, sums);
    }
  }
}

static void multiply4(const sl_quantize_tile *tile) {
  for (int row = 0; row < tile->rows; ++row) {
    const int8_t *x = tile->activations[row];
    const uint8_t *block = tile->weight;
    for (int64_t segment = 0; segment < tile->segments; ++segment) {
      int32_t sums[SL_QUANTIZE_PANEL];
      for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) sums[c] = -8 * tile->sums[row][segment];
      for (int64_t k = 0; k < tile->depth; k += 8, x += 8, block += 64) {
        for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) {
          const uint8_t *w = block + 4 * c;
          for (int i = 0; i < 4; ++i) sums[c] += x[i] * (w[i] & 15) + x[4 + i] * (w[i] >> 4);
        }
      }
      add_tile_row(tile, row, segment, sums);
    }
  }
}

static void finish(const sl_quantize_finish *work) { sl_loop_finish(work); }

static void lstm_gates(const float *x, const float *h, int64_t size, float *cell, float *out) {
  sl_loop_lstm_gates(x, h, size, cell, out);
}

static void gru_gates(const float *x, const float *h, int64_t size, float *state) {
  sl_loop_gru_gates(x, h, size, state);
}

static int64_t run_peak(int64_t count) {
  enum { LANES = 64 };
  int32_t sums[LANES] = {0};
  volatile int8_t seed = 3; /* the compiler must not know the values */
  int8_t x[LANES], w[LANES];
  for (int i = 0; i < LANES; ++i) x[i] = (int8_t)(seed + i), w[i] = (int8_t)(seed - i);
  int64_t done = 0;
  for (; done < count; done += LANES) {
    for (int i = 0; i < LANES; ++i) sums[i] = (int32_t)((uint32_t)sums[i] + (uint32_t)(x[i] * w[i]));
    x[done / LANES % LANES] ^= 1;
  }
  volatile int32_t sink = 0;
  for (int i = 0; i < LANES; ++i) sink = sink ^ sums[i];
  return done;
}

const sl_quantize_kernel sl_quantize_scalar = {
    .name = "scalar",
    .isa = SL_ISA_SCALAR,
    .wide_activations = true,
    .height8 = 1,
    .height8_unpacked = 1,
    .height4 = 1,
    .load_row = load_row,
    .measure_row = measure_row,
    .measure_channels = measure_channels,
    .quantize_row = quantize_row,
    .narrow_row = narrow_row,
    .sum_row = sum_row,
    .multiply8 = multiply8,
    .multiply4 = multiply4,
    .finish = finish,
    .lstm_gates = lstm_gates,
    .gru_gates = gru_gates,
    .run_peak = run_peak,
};
