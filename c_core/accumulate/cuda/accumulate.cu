/* Public CUDA entry points of accumulate: validate, choose the kernel of the types, queue it and the sum of what its
 * warps have measured. */
#include <sluice/cuda.h>

#include <cstddef>

#include "accumulate/cuda/block.cuh"

extern "C" {
#include "accumulate/validate.h"
}

namespace sluice_cuda {
namespace {

using BlockFunction = void (*)(const sl_accumulate_args &, int64_t, LaneStats &, int);

template <BlockFunction function>
__global__ void __launch_bounds__(ACCUMULATE_WARPS *WARP)
    run_blocks(const sl_accumulate_args args, sl_accumulate_stats *parts, int64_t part_count) {
  const int lane = threadIdx.x % WARP;
  const int64_t part = int64_t{blockIdx.x} * ACCUMULATE_WARPS + threadIdx.x / WARP;
  if (part >= part_count) return;
  LaneStats stats;
  for (int64_t block = part; block < sl_count_blocks(args.count); block += part_count) {
    function(args, block, stats, lane);
  }
  write_part(parts + part, stats, lane);
}

/* One warp per statistic, each a column of the records. */
__global__ void add_parts(const double *parts, int64_t part_count, double *stats) {
  const int lane = threadIdx.x % WARP, column = threadIdx.x / WARP;
  const bool is_maximum = column == offsetof(sl_accumulate_stats, grad_amax) / sizeof(double);
  double sum = 0;
  for (int64_t part = lane; part < part_count; part += WARP) {
    double value = parts[part * SL_ACCUMULATE_STATS + column];
    sum = is_maximum ? fmax(sum, value) : sum + value;
  }
  sum = is_maximum ? max_over_warp(sum) : sum_over_warp(sum);
  if (lane == 0) stats[column] = sum;
}

int64_t count_parts(int64_t count) {
  int64_t blocks = sl_count_blocks(count);
  return blocks < MOST_PARTS ? blocks : MOST_PARTS;
}

template <BlockFunction function>
sl_status run(const char *name, const sl_accumulate_args &args, void *stream) {
  static_assert(sizeof(sl_accumulate_stats) == SL_ACCUMULATE_STATS * sizeof(double), "a record is six columns");
  const int64_t part_count = count_parts(args.count);
  const size_t bytes = static_cast<size_t>(part_count) * sizeof(sl_accumulate_stats);
  SL_REQUIRE(args.workspace_size >= bytes && (args.workspace || bytes == 0), SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args.workspace ? args.workspace_size : 0, bytes);
  sl_accumulate_stats *parts = static_cast<sl_accumulate_stats *>(args.workspace);
  SL_CHECK(launch(name, run_blocks<function>, count_blocks(part_count, ACCUMULATE_WARPS), ACCUMULATE_WARPS * WARP,
                  stream, args, parts, part_count));
  if (!args.stats) return SL_OK;
  return launch(name, add_parts, 1, SL_ACCUMULATE_STATS * WARP, stream, reinterpret_cast<const double *>(parts),
                part_count, reinterpret_cast<double *>(args.stats));
}

template <typename Grad>
sl_status accumulate_from(const sl_accumulate_args &args, void *stream) {
  const char *name = "accumulate on CUDA";
  return args.dtype == SL_F32 ? run<accumulate_block<Grad, float>>(name, args, stream)
                              : run<accumulate_block<Grad, __half>>(name, args, stream);
}

template <typename Out>
sl_status read_into(const sl_accumulate_args &args, void *stream) {
  const char *name = "read_accumulator on CUDA";
  return args.dtype == SL_F32 ? run<read_block<Out, float>>(name, args, stream)
                              : run<read_block<Out, __half>>(name, args, stream);
}

}  // namespace
}  // namespace sluice_cuda

using namespace sluice_cuda;

extern "C" sl_status sl_accumulate_cuda_workspace_size(int64_t count, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_accumulate_validate_count(count));
  *bytes = static_cast<size_t>(count_parts(count)) * sizeof(sl_accumulate_stats);
  return SL_OK;
}

extern "C" sl_status sl_accumulate_cuda(const sl_accumulate_args *args, void *stream) {
  SL_CHECK(sl_accumulate_validate(args, SL_ACCUMULATE));
  if (args->grad_dtype == SL_F32) return accumulate_from<float>(*args, stream);
  if (args->grad_dtype == SL_BF16) return accumulate_from<__nv_bfloat16>(*args, stream);
  return accumulate_from<__half>(*args, stream);
}

extern "C" sl_status sl_measure_gradient_cuda(const sl_accumulate_args *args, void *stream) {
  const char *name = "measure_gradient on CUDA";
  SL_CHECK(sl_accumulate_validate(args, SL_MEASURE));
  if (args->grad_dtype == SL_F32) return run<measure_block<float>>(name, *args, stream);
  if (args->grad_dtype == SL_BF16) return run<measure_block<__nv_bfloat16>>(name, *args, stream);
  return run<measure_block<__half>>(name, *args, stream);
}

extern "C" sl_status sl_read_accumulator_cuda(const sl_accumulate_args *args, void *stream) {
  SL_CHECK(sl_accumulate_validate(args, SL_READ));
  if (args->out_dtype == SL_F32) return read_into<float>(*args, stream);
  if (args->out_dtype == SL_BF16) return read_into<__nv_bfloat16>(*args, stream);
  return read_into<__half>(*args, stream);
}
