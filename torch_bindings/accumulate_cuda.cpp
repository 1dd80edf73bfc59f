// Registers accumulate for CUDA tensors; only in a build with CUDA kernels.
#include "accumulate.h"

#include <sluice/accumulate.h>

#include "operator.h"

STABLE_TORCH_LIBRARY_IMPL(sluice, CUDA, library) {
  SLUICE_IMPLEMENT(SL_ACCUMULATE_SCHEMA, sluice::accumulate_);
  SLUICE_IMPLEMENT(SL_MEASURE_GRADIENT_SCHEMA, sluice::measure_gradient);
  SLUICE_IMPLEMENT(SL_READ_ACCUMULATOR_SCHEMA, sluice::read_accumulator);
}
