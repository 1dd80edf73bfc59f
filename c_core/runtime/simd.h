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
#define _mm512_cvtps_ph(values, rounding)                                                                  \
  simde_mm256_set_m128i(                                                                                   \
      simde_mm256_cvtps_ph(simde_mm512_extractf32x8_ps(values, 1), (rounding) & 7),                        \
      simde_mm256_cvtps_ph(simde_mm512_castps512_ps256(values), (rounding) & 7))
#endif

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

#else
#include <immintrin.h>
#endif

#endif
