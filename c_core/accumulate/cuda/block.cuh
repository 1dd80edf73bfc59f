/* accumulate on CUDA: one warp per block of the contract, lane m holding its elements 32 j + m in registers, so that
 * every access is contiguous and nothing but the statistics crosses lanes. */
#ifndef SL_ACCUMULATE_CUDA_BLOCK_CUH
#define SL_ACCUMULATE_CUDA_BLOCK_CUH

#include "runtime/cuda/common.cuh"

extern "C" {
#include "accumulate/kernel.h"
}

namespace sluice_cuda {

constexpr int LANE_ELEMENTS = SL_ACCUMULATE_BLOCK / WARP;
constexpr int ACCUMULATE_WARPS = 4;

/* Each warp takes every PARTS-th block and writes one statistics record; their number depends on the count alone, so
 * the order in which they are added up does too. */
constexpr int64_t MOST_PARTS = 2048;

/* This lane's share of sl_accumulate_stats. */
struct LaneStats {
  double grad_sumsq = 0, grad_amax = 0, grad_nonfinite = 0, sum_sumsq = 0, error_sumsq = 0, underflow = 0;
};

__device__ inline bool is_finite(float value) { return (sl_float_bits(value) & 0x7f800000u) != 0x7f800000u; }

__device__ inline void measure_value(LaneStats &stats, float value) {
  if (!is_finite(value)) {
    stats.grad_nonfinite += 1;
    return;
  }
  stats.grad_sumsq += static_cast<double>(value) * static_cast<double>(value);
  if (fabsf(value) > stats.grad_amax) stats.grad_amax = fabsf(value);
}

__device__ inline void write_part(sl_accumulate_stats *part, const LaneStats &lane_stats, int lane) {
  sl_accumulate_stats sum;
  sum.grad_sumsq = sum_over_warp(lane_stats.grad_sumsq);
  sum.grad_amax = max_over_warp(lane_stats.grad_amax);
  sum.grad_nonfinite = sum_over_warp(lane_stats.grad_nonfinite);
  sum.sum_sumsq = sum_over_warp(lane_stats.sum_sumsq);
  sum.error_sumsq = sum_over_warp(lane_stats.error_sumsq);
  sum.underflow = sum_over_warp(lane_stats.underflow);
  if (lane == 0) *part = sum;
}

/* r of the contract, for element p of its block. */
__device__ inline uint32_t random_bits(uint64_t key, int p) {
  uint32_t m = p % 32, word = static_cast<uint32_t>(key) + (p / 32 * 16 + m % 16) * 0x9E3779B1u;
  word ^= word >> 16;
  word *= 0x7FEB352Du;
  word ^= word >> 15;
  return m < 16 ? word & 0x1FFFu : word >> 19;
}

__device__ inline float round_stochastically(float x, uint32_t random) {
  if (fabsf(x) >= 0x1p-14f) return sl_float_from_bits((sl_float_bits(x) + random) & ~0x1FFFu);
  float units = __fadd_rn(fabsf(x) * 0x1p24f, static_cast<float>(random) * 0x1p-13f);
  return copysignf(static_cast<float>(static_cast<int32_t>(units)) * 0x1p-24f, x);
}

/* Rounds this lane's sums of a float16 block and stores them, and the block's exponent. */
__device__ inline void round_block(const sl_accumulate_args &args, int64_t block, const float (&sums)[LANE_ELEMENTS],
                                   LaneStats &stats, int lane) {
  float lane_amax = 0;
  bool lane_is_finite = true;
  for (int j = 0; j < LANE_ELEMENTS; ++j) {
    lane_is_finite = lane_is_finite && is_finite(sums[j]);
    if (is_finite(sums[j])) lane_amax = fmaxf(lane_amax, fabsf(sums[j]));
  }
  const bool stochastic = args.stochastic && __all_sync(ALL_LANES, lane_is_finite);
  const int exponent = sl_choose_exponent(sl_float_bits(max_over_warp(lane_amax)));
  const float factor = sl_power_of_two(-exponent);
  const uint64_t key = sl_block_key(args.seed, block);
  const int64_t count = sl_block_count(&args, block);
  __half *stored = static_cast<__half *>(args.accumulator) + block * SL_ACCUMULATE_BLOCK;
  double squares = 0;
  for (int j = 0; j < LANE_ELEMENTS; ++j) {
    int p = j * WARP + lane;
    if (p >= count) break;
    float x = sums[j] * factor;
    __half rounded = __float2half_rn(stochastic ? round_stochastically(x, random_bits(key, p)) : x);
    stored[p] = rounded;
    if (!is_finite(sums[j])) continue;
    float error = __half2float(rounded) - x;
    squares += static_cast<double>(error) * static_cast<double>(error);
    if (x != 0 && fabsf(x) < 0x1p-14f) stats.underflow += 1;
  }
  stats.error_sumsq += ldexp(squares, 2 * exponent);
  if (lane == 0) args.exponents[block] = static_cast<int8_t>(exponent);
}

/* Stored is the type of the accumulator: float, or __half with exponents. */
template <typename Grad, typename Stored>
__device__ void accumulate_block(const sl_accumulate_args &args, int64_t block, LaneStats &stats, int lane) {
  const int64_t count = sl_block_count(&args, block), first = block * SL_ACCUMULATE_BLOCK;
  const Grad *grad = static_cast<const Grad *>(args.grad) + first;
  Stored *stored = static_cast<Stored *>(args.accumulator) + first;
  const bool scaled = sizeof(Stored) == 2;
  const float grad_scale = static_cast<float>(args.grad_scale);
  const float old_scale = scaled && !args.overwrite ? sl_power_of_two(args.exponents[block]) : 1;
  float sums[LANE_ELEMENTS] = {};
  for (int j = 0; j < LANE_ELEMENTS; ++j) {
    int p = j * WARP + lane;
    if (p >= count) break;
    float gradient = Number<Grad>::read(grad[p]);
    measure_value(stats, gradient);
    /* The contract rounds the product and the sum: __fmul_rn and __fadd_rn are never fused. */
    float sum = __fmul_rn(gradient, grad_scale);
    if (!args.overwrite) sum = __fadd_rn(__fmul_rn(Number<Stored>::read(stored[p]), old_scale), sum);
    sums[j] = sum;
    stats.sum_sumsq += is_finite(sum) ? static_cast<double>(sum) * static_cast<double>(sum) : double{INFINITY};
    if (!scaled) stored[p] = Number<Stored>::write(sum);
  }
  /* The exponent was read by all lanes before lane 0 writes the new one. */
  __syncwarp();
  if (scaled) round_block(args, block, sums, stats, lane);
}

template <typename Grad>
__device__ void measure_block(const sl_accumulate_args &args, int64_t block, LaneStats &stats, int lane) {
  const int64_t count = sl_block_count(&args, block);
  const Grad *grad = static_cast<const Grad *>(args.grad) + block * SL_ACCUMULATE_BLOCK;
  for (int64_t p = lane; p < count; p += WARP) measure_value(stats, Number<Grad>::read(grad[p]));
}

template <typename Out, typename Stored>
__device__ void read_block(const sl_accumulate_args &args, int64_t block, LaneStats &stats, int lane) {
  const int64_t count = sl_block_count(&args, block), first = block * SL_ACCUMULATE_BLOCK;
  const Stored *stored = static_cast<const Stored *>(args.accumulator) + first;
  Out *out = static_cast<Out *>(args.out) + first;
  const float scale = static_cast<float>(args.scale);
  const float block_scale = sizeof(Stored) == 2 ? sl_power_of_two(args.exponents[block]) : 1;
  for (int64_t p = lane; p < count; p += WARP) {
    Out value = Number<Out>::write(__fmul_rn(__fmul_rn(Number<Stored>::read(stored[p]), block_scale), scale));
    out[p] = value;
    measure_value(stats, Number<Out>::read(value));
  }
}

}  // namespace sluice_cuda

#endif
