/* Conversions between the half-precision formats and float: portable, round to nearest even, NaN stays NaN; and what
 * the bits of floats say. */
#ifndef SL_RUNTIME_NUMBER_H
#define SL_RUNTIME_NUMBER_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* What CUDA kernels call as well. */
#if defined(__CUDACC__)
#define SL_SHARED_INLINE static inline __host__ __device__
#else
#define SL_SHARED_INLINE static inline
#endif

SL_SHARED_INLINE uint32_t sl_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SL_SHARED_INLINE float sl_float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float sl_bf16_to_float(uint16_t value) { return sl_float_from_bits((uint32_t)value << 16); }

static inline uint16_t sl_float_to_bf16(float value) {
  uint32_t bits = sl_float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float sl_f16_to_float(uint16_t value) {
  uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
  uint32_t exponent = (value >> 10) & 0x1fu;
  uint32_t mantissa = value & 0x3ffu;
  if (exponent == 31) return sl_float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return sl_float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  float magnitude = (float)mantissa * 0x1p-24f; /* zero and subnormals */
  return sign ? -magnitude : magnitude;
}

static inline uint16_t sl_float_to_f16(float value) {
  uint32_t bits = sl_float_bits(value);
  uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and more, and infinity */
  if (magnitude < 0x38800000u) { /* below 2^-14: the sum rounds to a multiple of 2^-24, half to even */
    float shifted = sl_float_from_bits(magnitude) + 0.5f;
    return (uint16_t)(sign | (sl_float_bits(shifted) - 0x3f000000u));
  }
  /* Rounding may carry into the exponent, and from 65504 upwards into infinity: both are what IEEE asks for. */
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

/* Whether no value is NaN or infinite. */
static inline bool sl_all_finite(const float *values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t magnitude = sl_float_bits(values[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  return largest < 0x7f800000u;
}

#endif
