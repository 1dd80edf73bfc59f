/* Public entry of gated attention: validate, choose the kernel of this machine, run it. */
#include <sluice/gated_attention.h>

#include "attention/backward.h"
#include "attention/forward.h"
#include "attention/profile.h"
#include "attention/validate.h"
#include "runtime/status.h"

/* The micro-op table for these args, or NULL: the reference serves them (float64). */
static const sl_attention_kernel *choose_kernel(sl_dtype dtype) {
  return sl_attention_find_kernel(dtype, sl_cpu_isa());
}

/* The same for the backward: the best tier whose table has it. */
static const sl_attention_kernel *choose_backward_kernel(sl_dtype dtype) {
  const sl_attention_kernel *kernel = choose_kernel(dtype);
  while (kernel && !kernel->softmax_gradient_tile) kernel = sl_attention_find_kernel(dtype, (sl_isa)(kernel->isa - 1));
  return kernel;
}

sl_status sl_gated_attention_workspace_size(const sl_gated_attention_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_gated_attention_validate(args, SL_NO_TENSORS));
  *bytes = 0;
  const sl_attention_kernel *kernel = choose_kernel(args->dtype);
  if (!kernel) return SL_OK;
  sl_attention_plan plan = sl_attention_make_plan(args, kernel);
  if (sl_attention_is_few_rows(args)) return sl_attention_few_rows_workspace(&plan, bytes);
  return sl_attention_tiled_workspace(&plan, bytes);
}

sl_status sl_gated_attention(const sl_gated_attention_args *args) {
  SL_CHECK(sl_gated_attention_validate(args, SL_FORWARD_TENSORS));
  const sl_attention_kernel *kernel = choose_kernel(args->dtype);
  if (!kernel) return sl_gated_attention_reference(args);
  sl_attention_plan plan = sl_attention_make_plan(args, sl_profile_kernel(kernel));
  return sl_attention_is_few_rows(args) ? sl_attention_run_few_rows(&plan) : sl_attention_run_tiled(&plan);
}

sl_status sl_gated_attention_backward_workspace_size(const sl_gated_attention_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_gated_attention_validate(args, SL_NO_TENSORS));
  *bytes = 0;
  const sl_attention_kernel *kernel = choose_backward_kernel(args->dtype);
  if (!kernel) return SL_OK;
  sl_attention_plan plan = sl_attention_make_backward_plan(args, kernel);
  return sl_attention_backward_workspace(&plan, bytes);
}

sl_status sl_gated_attention_backward(const sl_gated_attention_args *args) {
  SL_CHECK(sl_gated_attention_validate(args, SL_BACKWARD_TENSORS));
  const sl_attention_kernel *kernel = choose_backward_kernel(args->dtype);
  if (!kernel) return sl_gated_attention_backward_reference(args);
  sl_attention_plan plan = sl_attention_make_backward_plan(args, kernel);
  return sl_attention_run_backward(&plan);
}

const char *sl_gated_attention_kernel_name(sl_dtype dtype) {
  const sl_attention_kernel *kernel = choose_kernel(dtype);
  return kernel ? kernel->name : "reference";
}
