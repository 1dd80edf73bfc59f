// The accumulate operators, registered for each kind of device by a file of its own.
#pragma once

#include "shim.h"

namespace sluice {

Tensor accumulate_(Tensor accumulator, std::optional<Tensor> exponents, Tensor grad, double grad_scale, bool overwrite,
                   std::optional<int64_t> seed);

Tensor measure_gradient(Tensor grad);

Tensor read_accumulator(Tensor accumulator, std::optional<Tensor> exponents, double scale, Tensor out);

}  // namespace sluice
