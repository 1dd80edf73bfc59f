// Registers accumulate for CUDA tensors; only in a build with CUDA kernels.
#include "accumulate.h"

STABLE_TORCH_LIBRARY_IMPL(sluice, CUDA, library) {
  library.impl("accumulate_", TORCH_BOX(&sluice::accumulate_));
  library.impl("measure_gradient", TORCH_BOX(&sluice::measure_gradient));
  library.impl("read_accumulator", TORCH_BOX(&sluice::read_accumulator));
}
