/* The CUDA entry points in a build without CUDA kernels: a program links the same either way, and is told why not. */
#include <sluice/cuda.h>

#include "runtime/status.h"

static sl_status fail_without_cuda(void) {
  return sl_fail(SL_UNSUPPORTED, "this build of Sluice has no CUDA kernels, expected one with SLUICE_BUILD_CUDA=ON");
}

bool sl_cuda_built(void) { return false; }

sl_status sl_gated_attention_cuda(const sl_gated_attention_args *args, void *stream) {
  (void)args, (void)stream;
  return fail_without_cuda();
}

sl_status sl_gated_attention_backward_cuda_workspace_size(const sl_gated_attention_args *args, size_t *bytes) {
  (void)args, (void)bytes;
  return fail_without_cuda();
}

sl_status sl_gated_attention_backward_cuda(const sl_gated_attention_args *args, void *stream) {
  (void)args, (void)stream;
  return fail_without_cuda();
}

sl_status sl_accumulate_cuda_workspace_size(int64_t count, size_t *bytes) {
  (void)count, (void)bytes;
  return fail_without_cuda();
}

sl_status sl_accumulate_cuda(const sl_accumulate_args *args, void *stream) {
  (void)args, (void)stream;
  return fail_without_cuda();
}

sl_status sl_measure_gradient_cuda(const sl_accumulate_args *args, void *stream) {
  (void)args, (void)stream;
  return fail_without_cuda();
}

sl_status sl_read_accumulator_cuda(const sl_accumulate_args *args, void *stream) {
  (void)args, (void)stream;
  return fail_without_cuda();
}
