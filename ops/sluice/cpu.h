/* What this processor can do, and the cap that SLUICE_ISA puts on it. */
#ifndef SLUICE_CPU_H
#define SLUICE_CPU_H

#include <stdbool.h>

#include <sluice/status.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Instruction-set tiers, lowest first. A kernel runs where its tier is at most sl_cpu_isa(). */
typedef enum sl_isa {
  SL_ISA_SCALAR = 0,
  SL_ISA_AVX2 = 1,       /* AVX2 + FMA + F16C */
  SL_ISA_AVX512 = 2,     /* AVX-512 F, BW, DQ, VL */
  SL_ISA_AVX512VNNI = 3, /* the above + AVX512_VNNI */
  SL_ISA_AVX512BF16 = 4, /* the above + AVX512_BF16 */
} sl_isa;

/* The highest tier that this processor and its operating system support. */
SL_API sl_isa sl_cpu_detect(void);

/* The tier that dispatch uses: sl_cpu_detect(), lowered to SLUICE_ISA=scalar|avx2|avx512|avx512vnni|avx512bf16
 * where that is set, or to the last sl_cpu_cap(). An unknown SLUICE_ISA is ignored; sl_cpu_cap_problem() says so. */
SL_API sl_isa sl_cpu_isa(void);

/* Caps dispatch for the whole process from now on (tests and benchmarks); never raises it above sl_cpu_detect().
 * Not to be called while an operator runs. */
SL_API sl_status sl_cpu_cap(sl_isa isa);

/* A sentence about a SLUICE_ISA that was not understood, or NULL. */
SL_API const char *sl_cpu_cap_problem(void);

/* "scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"; never NULL. */
SL_API const char *sl_isa_name(sl_isa isa);

/* Parses such a name; SL_INVALID_ARGUMENT names what was given and what is allowed. */
SL_API sl_status sl_isa_parse(const char *name, sl_isa *isa);

#ifdef __cplusplus
}
#endif
#endif
