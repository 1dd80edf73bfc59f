/* The AVX2 tier (with F16C): sixteen lanes of float64 are four registers. */
#include "prune/kernel.h"
#include "runtime/tiers/simd.h"

#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef struct magnitudes8 {
  __m256d low, high;
} magnitudes8;

/* Eight neighbours, widened, without their signs. */
LANE_FUNCTION magnitudes8 load8(sl_dtype dtype, const void *values) {
  __m256d sign = _mm256_set1_pd(-0.0);
  if (dtype == SL_F64) {
    const double *from = values;
    return (magnitudes8){_mm256_andnot_pd(sign, _mm256_loadu_pd(from)),
                         _mm256_andnot_pd(sign, _mm256_loadu_pd(from + 4))};
  }
  __m256 floats;
  if (dtype == SL_F32) {
    floats = _mm256_loadu_ps(values);
  } else if (dtype == SL_BF16) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(values));
    floats = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  } else {
    floats = _mm256_cvtph_ps(_mm_loadu_si128(values));
  }
  return (magnitudes8){_mm256_andnot_pd(sign, _mm256_cvtps_pd(_mm256_castps256_ps128(floats))),
                       _mm256_andnot_pd(sign, _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1)))};
}

LANE_FUNCTION double add_run_of(sl_dtype dtype, const void *values, int64_t count) {
  __m256d sum0 = _mm256_setzero_pd(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t i = 0;
  for (; i + SL_PRUNE_LANES <= count; i += SL_PRUNE_LANES) {
    magnitudes8 first = load8(dtype, sl_prune_offset(values, i, dtype));
    magnitudes8 second = load8(dtype, sl_prune_offset(values, i + 8, dtype));
    sum0 = _mm256_add_pd(sum0, first.low), sum1 = _mm256_add_pd(sum1, first.high);
    sum2 = _mm256_add_pd(sum2, second.low), sum3 = _mm256_add_pd(sum3, second.high);
  }
  double lanes[SL_PRUNE_LANES];
  _mm256_storeu_pd(lanes, sum0), _mm256_storeu_pd(lanes + 4, sum1);
  _mm256_storeu_pd(lanes + 8, sum2), _mm256_storeu_pd(lanes + 12, sum3);
  for (; i < count; ++i) lanes[i % SL_PRUNE_LANES] += sl_prune_magnitude(dtype, values, i);
  return sl_prune_add_lanes(lanes);
}

LANE_FUNCTION void add_to_each_of(sl_dtype dtype, const void *values, int64_t count, double *sums) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    magnitudes8 more = load8(dtype, sl_prune_offset(values, i, dtype));
    _mm256_storeu_pd(sums + i, _mm256_add_pd(_mm256_loadu_pd(sums + i), more.low));
    _mm256_storeu_pd(sums + i + 4, _mm256_add_pd(_mm256_loadu_pd(sums + i + 4), more.high));
  }
  for (; i < count; ++i) sums[i] += sl_prune_magnitude(dtype, values, i);
}

/* Each type gets its own loop: the switches are outside of them. */
static double add_run(sl_dtype dtype, const void *values, int64_t count) {
  switch (dtype) {
    case SL_F64: return add_run_of(SL_F64, values, count);
    case SL_F32: return add_run_of(SL_F32, values, count);
    case SL_BF16: return add_run_of(SL_BF16, values, count);
    default: return add_run_of(SL_F16, values, count);
  }
}

static void add_to_each(sl_dtype dtype, const void *values, int64_t count, double *sums) {
  switch (dtype) {
    case SL_F64: add_to_each_of(SL_F64, values, count, sums); break;
    case SL_F32: add_to_each_of(SL_F32, values, count, sums); break;
    case SL_BF16: add_to_each_of(SL_BF16, values, count, sums); break;
    default: add_to_each_of(SL_F16, values, count, sums); break;
  }
}

const sl_prune_kernel sl_prune_avx2 = {"avx2", SL_ISA_AVX2, add_run, add_to_each};
