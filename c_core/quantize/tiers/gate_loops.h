/* The gates of recurrent layers, in loops that a compiler turns into vector code by itself: included by a tier's file,
 * so that its flags decide how wide. */
#ifndef SL_QUANTIZE_GATE_LOOPS_H
#define SL_QUANTIZE_GATE_LOOPS_H

#include <stdbool.h>

#include "runtime/number.h"

/* yes where condition, else no: by bits, since compilers keep a conditional of floats as a branch, and a loop with one
 * as it is. */
static inline float sl_loop_select(bool condition, float yes, float no) {
  uint32_t mask = 0u - (uint32_t)condition;
  return sl_float_from_bits((sl_float_bits(yes) & mask) | (sl_float_bits(no) & ~mask));
}

/* e^x, NaN for NaN. e^-87 and e^88 where it would leave the normal numbers, which a sigmoid does not feel. The
 * polynomial is that of Cephes, expf. */
static inline float sl_loop_exp(float x) {
  const float round = 0x1.8p23f; /* added to a small number, it leaves the nearest integer in the last bits */
  x = sl_loop_select(x > 88.0f, 88.0f, x);
  x = sl_loop_select(x < -87.0f, -87.0f, x);
  float shifted = x * 1.44269504088896341f + round, n = shifted - round;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t exponent = sl_float_bits(shifted) - sl_float_bits(round);
  return p * sl_float_from_bits((exponent + 127u) << 23);
}

static inline float sl_loop_sigmoid(float x) { return 1.0f / (1.0f + sl_loop_exp(-x)); }

/* Near 0, where 1 - 2 / (e^2x + 1) would lose all digits, the polynomial of Cephes, tanhf. */
static inline float sl_loop_tanh(float x) {
  float far = 1.0f - 2.0f / (sl_loop_exp(2.0f * x) + 1.0f);
  float z = x * x, p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  float near = p * z * x + x;
  return sl_loop_select(z < 0.390625f, near, far);
}

static inline void sl_loop_lstm_gates(const float *restrict x, const float *restrict h, int64_t size,
                                      float *restrict cell, float *restrict out) {
  for (int64_t i = 0; i < size; ++i) {
    float in = sl_loop_sigmoid(x[i] + h[i]), forget = sl_loop_sigmoid(x[size + i] + h[size + i]);
    float value = sl_loop_tanh(x[2 * size + i] + h[2 * size + i]);
    float c = forget * cell[i] + in * value;
    cell[i] = c;
    out[i] = sl_loop_sigmoid(x[3 * size + i] + h[3 * size + i]) * sl_loop_tanh(c);
  }
}

static inline void sl_loop_gru_gates(const float *restrict x, const float *restrict h, int64_t size,
                                     float *restrict state) {
  for (int64_t i = 0; i < size; ++i) {
    float reset = sl_loop_sigmoid(x[i] + h[i]), update = sl_loop_sigmoid(x[size + i] + h[size + i]);
    float value = sl_loop_tanh(x[2 * size + i] + reset * h[2 * size + i]);
    state[i] = value + update * (state[i] - value);
  }
}

#endif
