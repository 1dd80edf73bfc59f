// What c10d calls a reduction, in the terms of the C core.
#pragma once

#include <torch/csrc/distributed/c10d/Types.hpp>

#include <optional>

#include "c10d/errors.h"

namespace sluice::c10d_backend {

struct Reduction {
  sl_dtype dtype;
  sl_reduce_op op;
  double factor;  // of PREMUL_SUM
};

// The dtype that the C core reduces, if there is one.
std::optional<sl_dtype> dtype_of(at::ScalarType type);

// Throws where the dtype, or the operator for that dtype, is none that can be reduced.
Reduction make_reduction(const char *call, const at::Tensor &tensor, const ::c10d::ReduceOp &op);

// Complex numbers are reduced as pairs of real ones.
at::Tensor real_view(const at::Tensor &tensor);

}  // namespace sluice::c10d_backend
