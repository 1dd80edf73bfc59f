/* The one way to reach vector intrinsics. Under SL_EMULATED they are SIMDe's portable ones, with the gaps that overlays
 * need filled here, so that a tier which the processor lacks is still tested on it. */
#ifndef SL_RUNTIME_SIMD_H
#define SL_RUNTIME_SIMD_H

#if defined(SL_EMULATED)
#ifndef SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_ENABLE_NATIVE_ALIASES
#endif
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <string.h>

/* The sum of all lanes. */
#ifndef _mm512_reduce_add_ps
static inline float sl_emulated_reduce_add_ps(simde__m512 values) {
  float lanes[16], sum = 0;
  simde_mm512_storeu_ps(lanes, values);
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum;
}
#define _mm512_reduce_add_ps(values) sl_emulated_reduce_add_ps(values)
#endif

/* Conversions. */
#ifndef _mm512_cvtps_pd
static inline simde__m512d sl_emulated_cvtps_pd(simde__m256 values) {
  float from[8];
  double to[8];
  simde_mm256_storeu_ps(from, values);
  for (int i = 0; i < 8; ++i) to[i] = from[i];
  return simde_mm512_loadu_pd(to);
}
#define _mm512_cvtps_pd(values) sl_emulated_cvtps_pd(values)
#endif

#ifndef _mm512_cvtepi32_epi16
static inline simde__m256i sl_emulated_cvtepi32_epi16(simde__m512i values) {
  uint32_t from[16];
  uint16_t to[16];
  simde_mm512_storeu_si512(from, values);
  for (int i = 0; i < 16; ++i) to[i] = (uint16_t)from[i];
  return simde_mm256_loadu_si256((const simde__m256i *)to);
}
#define _mm512_cvtepi32_epi16(values) sl_emulated_cvtepi32_epi16(values)
#endif

#ifndef _mm512_cvtps_ph
#define _mm512_cvtps_ph(values, rounding)                                                             \
  simde_mm256_set_m128i(simde_mm256_cvtps_ph(simde_mm512_extractf32x8_ps(values, 1), (rounding) & 7), \
                        simde_mm256_cvtps_ph(simde_mm512_castps512_ps256(values), (rounding) & 7))
#endif

/* To nearest even; subnormal numbers become 0. */
#ifndef _mm512_cvtneps_pbh
static inline simde__m256bh sl_emulated_cvtneps_pbh(simde__m512 values) {
  float from[16];
  uint16_t to[16];
  simde__m256bh result;
  simde_mm512_storeu_ps(from, values);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    memcpy(&bits, &from[i], sizeof bits);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    if (from[i] == from[i])
      to[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    else
      to[i] = (uint16_t)(bits >> 16 | 0x40u);
  }
  memcpy(&result, to, sizeof result);
  return result;
}
#define _mm512_cvtneps_pbh(values) sl_emulated_cvtneps_pbh(values)
#endif

/* Masked loads and stores: SIMDe's touch the lanes that are masked out, which may lie behind the end of the memory. */
static inline void sl_emulated_copy_lanes(void *to, const void *from, uint64_t lanes, size_t count, size_t size) {
  for (size_t i = 0; i < count; ++i) {
    if (lanes >> i & 1) memcpy((char *)to + i * size, (const char *)from + i * size, size);
  }
}
static inline simde__m512 sl_emulated_maskz_loadu_ps(uint64_t lanes, const void *from) {
  simde__m512 result = simde_mm512_setzero_ps();
  sl_emulated_copy_lanes(&result, from, lanes, 16, 4);
  return result;
}
static inline simde__m256i sl_emulated_maskz_loadu_16_epi16(uint64_t lanes, const void *from) {
  simde__m256i result = simde_mm256_setzero_si256();
  sl_emulated_copy_lanes(&result, from, lanes, 16, 2);
  return result;
}
static inline simde__m512i sl_emulated_maskz_loadu_32_epi16(uint64_t lanes, const void *from) {
  simde__m512i result = simde_mm512_setzero_si512();
  sl_emulated_copy_lanes(&result, from, lanes, 32, 2);
  return result;
}
static inline void sl_emulated_mask_storeu_ps(void *to, uint64_t lanes, simde__m512 values) {
  sl_emulated_copy_lanes(to, &values, lanes, 16, 4);
}
static inline void sl_emulated_mask_storeu_16_epi16(void *to, uint64_t lanes, simde__m256i values) {
  sl_emulated_copy_lanes(to, &values, lanes, 16, 2);
}
#undef _mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#define _mm512_maskz_loadu_ps(lanes, from) sl_emulated_maskz_loadu_ps(lanes, from)
#define _mm256_maskz_loadu_epi16(lanes, from) sl_emulated_maskz_loadu_16_epi16(lanes, from)
#define _mm512_maskz_loadu_epi16(lanes, from) sl_emulated_maskz_loadu_32_epi16(lanes, from)
#define _mm512_mask_storeu_ps(to, lanes, values) sl_emulated_mask_storeu_ps(to, lanes, values)
#define _mm256_mask_storeu_epi16(to, lanes, values) sl_emulated_mask_storeu_16_epi16(to, lanes, values)

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

#elif defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#endif
