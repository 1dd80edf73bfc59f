/* Public CUDA entry points of gated attention: validate, choose the kernels of the dtype, queue them. */
#include <sluice/cuda.h>

#include "attention/cuda/backward.cuh"
#include "attention/cuda/forward.cuh"

extern "C" {
#include "attention/validate.h"
}

namespace sluice_cuda {
namespace {

constexpr unsigned BLOCK_THREADS = BLOCK_WARPS * WARP;

/* The values of key_range and of the offsets are on the device: everything else is checked here. */
sl_status validate(const sl_gated_attention_args *args, sl_attention_tensors tensors) {
  if (!args) return sl_gated_attention_validate(args, tensors);
  SL_REQUIRE(!args->output_gate.data, SL_UNSUPPORTED,
             "output_gate is given, expected none on CUDA: multiply the output by its sigmoid");
  SL_REQUIRE(args->dropout_p == 0, SL_UNSUPPORTED, "dropout_p is %g, expected 0 on CUDA", args->dropout_p);
  SL_REQUIRE(!args->block_table, SL_UNSUPPORTED,
             "block_table is given, expected NULL: a paged cache has no CUDA kernel");
  sl_gated_attention_args visible = *args;
  visible.key_range = visible.q_offset = visible.text_begin = nullptr;
  return sl_gated_attention_validate(&visible, tensors);
}

/* Sums over what a mask is broadcast over would need an order: the caller adds up a whole one. */
sl_status check_mask_gradient(const sl_gated_attention_args &args) {
  const sl_attention_mask &mask = args.dattn_mask;
  bool whole = (mask.batch_stride || args.batch <= 1) && (mask.head_stride || args.heads_q == 1) &&
               (mask.query_stride || args.n_q <= 1) && (mask.key_stride || args.n_k <= 1);
  SL_REQUIRE(!mask.data || whole, SL_UNSUPPORTED,
             "attn_mask is broadcast, expected one of [batch, heads_q, n_q, n_k] where it has a gradient on CUDA");
  return SL_OK;
}

template <typename T>
sl_status run_forward(const sl_gated_attention_args &args, void *stream) {
  int64_t rows = args.batch * args.heads_q * args.n_q;
  return launch("gated_attention on CUDA", attend_rows<T>, count_blocks(rows, BLOCK_WARPS), BLOCK_THREADS, stream, args,
                rows);
}

template <typename T>
sl_status run_backward(const sl_gated_attention_args &args, void *stream) {
  int64_t rows = args.batch * args.heads_q * args.n_q, keys = args.batch * args.heads_kv * args.n_k;
  Compute<T> *row_means = static_cast<Compute<T> *>(args.workspace);
  SL_CHECK(launch("gated_attention_backward on CUDA (dq, da)", differentiate_rows<T>, count_blocks(rows, BLOCK_WARPS),
                  BLOCK_THREADS, stream, args, row_means, rows));
  return launch("gated_attention_backward on CUDA (dk, dv, db)", differentiate_keys<T>, count_blocks(keys, BLOCK_WARPS),
                BLOCK_THREADS, stream, args, static_cast<const Compute<T> *>(row_means), keys);
}

}  // namespace
}  // namespace sluice_cuda

using namespace sluice_cuda;

extern "C" sl_status sl_gated_attention_cuda(const sl_gated_attention_args *args, void *stream) {
  SL_CHECK(validate(args, SL_FORWARD_TENSORS));
  switch (args->dtype) {
    case SL_F32: return run_forward<float>(*args, stream);
    case SL_BF16: return run_forward<__nv_bfloat16>(*args, stream);
    case SL_F16: return run_forward<__half>(*args, stream);
    case SL_F64: return run_forward<double>(*args, stream);
    default:
      return sl_fail(SL_INTERNAL, "dtype %s passed validation, but has no CUDA kernel", sl_dtype_name(args->dtype));
  }
}

extern "C" sl_status sl_gated_attention_backward_cuda_workspace_size(const sl_gated_attention_args *args,
                                                                     size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(validate(args, SL_NO_TENSORS));
  size_t rows = static_cast<size_t>(args->batch * args->heads_q * args->n_q);
  *bytes = rows * (args->dtype == SL_F64 ? sizeof(double) : sizeof(float));
  return SL_OK;
}

extern "C" sl_status sl_gated_attention_backward_cuda(const sl_gated_attention_args *args, void *stream) {
  size_t bytes = 0;
  SL_CHECK(sl_gated_attention_backward_cuda_workspace_size(args, &bytes));
  SL_CHECK(validate(args, SL_BACKWARD_TENSORS));
  SL_CHECK(check_mask_gradient(*args));
  SL_REQUIRE(args->workspace_size >= bytes && (args->workspace || bytes == 0), SL_OUT_OF_MEMORY,
             "workspace_size is %zu bytes, expected at least %zu", args->workspace ? args->workspace_size : 0, bytes);
  switch (args->dtype) {
    case SL_F32: return run_backward<float>(*args, stream);
    case SL_BF16: return run_backward<__nv_bfloat16>(*args, stream);
    case SL_F16: return run_backward<__half>(*args, stream);
    case SL_F64: return run_backward<double>(*args, stream);
    default:
      return sl_fail(SL_INTERNAL, "dtype %s passed validation, but has no CUDA kernel", sl_dtype_name(args->dtype));
  }
}
