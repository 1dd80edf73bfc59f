/* Public entry of gated attention: validate, choose the kernel of this machine, run it. */
#include <sluice/gated_attention.h>

#include "attention/validate.h"
#include "runtime/status.h"

sl_status sl_gated_attention_workspace_size(const sl_gated_attention_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_gated_attention_validate(args, SL_NO_TENSORS));
  *bytes = 0;
  return SL_OK;
}

sl_status sl_gated_attention_backward_workspace_size(const sl_gated_attention_args *args, size_t *bytes) {
  return sl_gated_attention_workspace_size(args, bytes);
}

sl_status sl_gated_attention(const sl_gated_attention_args *args) { return sl_gated_attention_reference(args); }

sl_status sl_gated_attention_backward(const sl_gated_attention_args *args) {
  return sl_gated_attention_backward_reference(args);
}

const char *sl_gated_attention_kernel_name(sl_dtype dtype) {
  (void)dtype;
  return "reference";
}
