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

#else
#include <immintrin.h>
#endif

#endif
