// Registers gated_attention for CUDA tensors; only in a build with CUDA kernels.
#include "gated_attention.h"

STABLE_TORCH_LIBRARY_IMPL(sluice, CUDA, library) {
  library.impl("gated_attention", TORCH_BOX(&sluice::gated_attention));
  library.impl("gated_attention_backward", TORCH_BOX(&sluice::gated_attention_backward));
}
