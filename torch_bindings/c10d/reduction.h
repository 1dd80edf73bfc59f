// What c10d calls a reduction, in the terms of the C core.
#pragma once

#include <torch/csrc/distributed/c10d/Types.hpp>

#include "c10d/errors.h"

namespace sluice::c10d_backend {

struct Reduction {
  sl_dtype dtype;
  sl_reduce_op op;
  double factor;   // of PREMUL_SUM
  size_t numbers;  // in an element: a complex one is reduced as two real ones

  size_t count(const at::Tensor &tensor) const { return static_cast<size_t>(tensor.numel()) * numbers; }
};

// Throws where the dtype, or the operator for that dtype, is none that can be reduced.
Reduction make_reduction(const char *call, const at::Tensor &tensor, const ::c10d::ReduceOp &op);

}  // namespace sluice::c10d_backend
