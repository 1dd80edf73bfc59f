/* CPU feature detection and the SLUICE_ISA cap. */
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sluice/cpu.h>

#include "runtime/status.h"

/* In the order of sl_isa; both lines. */
static const char *const isa_names[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"};
#define ISA_LIST "scalar, avx2, avx512, avx512vnni, avx512bf16"
enum { ISA_COUNT = sizeof isa_names / sizeof isa_names[0] };

const char *sl_isa_name(sl_isa isa) { return (unsigned)isa < ISA_COUNT ? isa_names[isa] : "unknown isa"; }

static bool find_isa(const char *name, sl_isa *isa) {
  for (int i = 0; i < ISA_COUNT; ++i) {
    if (strcmp(name, isa_names[i]) == 0) {
      *isa = (sl_isa)i;
      return true;
    }
  }
  return false;
}

sl_status sl_isa_parse(const char *name, sl_isa *isa) {
  SL_REQUIRE(name && isa, SL_INVALID_ARGUMENT, "name and isa must not be NULL");
  SL_REQUIRE(find_isa(name, isa), SL_INVALID_ARGUMENT, "isa is '%.64s', expected one of " ISA_LIST, name);
  return SL_OK;
}

/* Under SL_EMULATED every overlay is plain C (SIMDe), so that every tier runs on every machine. */
sl_isa sl_cpu_detect(void) {
#if defined(SL_EMULATED)
  return SL_ISA_AVX512BF16;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
    return SL_ISA_SCALAR;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))) {
    return SL_ISA_AVX2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return SL_ISA_AVX512;
  return __builtin_cpu_supports("avx512bf16") ? SL_ISA_AVX512BF16 : SL_ISA_AVX512VNNI;
#else
  return SL_ISA_SCALAR;
#endif
}

static atomic_int isa_cap = -1; /* -1: not decided yet */

sl_isa sl_cpu_isa(void) {
  int cap = atomic_load_explicit(&isa_cap, memory_order_relaxed);
  if (cap >= 0) return (sl_isa)cap;
  sl_isa isa = sl_cpu_detect();
  sl_isa wanted;
  const char *name = getenv("SLUICE_ISA");
  if (name && find_isa(name, &wanted) && wanted < isa) isa = wanted;
  atomic_store_explicit(&isa_cap, (int)isa, memory_order_relaxed);
  return isa;
}

sl_status sl_cpu_cap(sl_isa isa) {
  SL_REQUIRE((unsigned)isa < ISA_COUNT, SL_INVALID_ARGUMENT, "isa is %d, expected 0 to %d", (int)isa, ISA_COUNT - 1);
  sl_isa detected = sl_cpu_detect();
  atomic_store_explicit(&isa_cap, (int)(isa < detected ? isa : detected), memory_order_relaxed);
  return SL_OK;
}

const char *sl_cpu_cap_problem(void) {
  static _Thread_local char problem[160];
  sl_isa ignored;
  const char *name = getenv("SLUICE_ISA");
  if (!name || !*name || find_isa(name, &ignored)) return NULL;
  snprintf(problem, sizeof problem, "SLUICE_ISA is '%.40s', expected one of " ISA_LIST "; it is ignored", name);
  return problem;
}
