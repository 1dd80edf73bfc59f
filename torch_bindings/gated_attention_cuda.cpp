// Registers gated_attention for CUDA tensors; only in a build with CUDA kernels.
#include "gated_attention.h"

#include <sluice/gated_attention.h>

#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(sluice, CUDA, library) {
  SLUICE_IMPLEMENT(SL_GATED_ATTENTION_SCHEMA, sluice::gated_attention);
  SLUICE_IMPLEMENT(SL_GATED_ATTENTION_BACKWARD_SCHEMA, sluice::gated_attention_backward);
}
