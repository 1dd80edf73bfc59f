// What every shim needs: checks that name the argument, allocation, torch's thread pool as an executor, and the way
// from a C status to an exception.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include <sluice/executor.h>
#include <sluice/types.h>

namespace sluice {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

// Torch's intra-op thread pool.
sl_executor torch_executor();

// Throws when status is not SL_OK, with sl_last_error() as the text: std::invalid_argument (ValueError) for a bad
// argument, std::out_of_range (IndexError), std::bad_alloc (MemoryError), else std::runtime_error.
void check_status(sl_status status);

// The C name of a torch dtype; throws for those that Sluice does not take.
sl_dtype dtype_of(const Tensor &tensor, const char *name);

std::string describe(const Tensor &tensor);  // "float32 [2, 8, 128, 64] on cpu"

// Uninitialised memory on the device of like; contiguous, or with these strides.
Tensor empty_strided(const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides, ScalarType dtype,
                     const Tensor &like);
Tensor empty(const std::vector<int64_t> &sizes, ScalarType dtype, const Tensor &like);

[[noreturn]] void fail(const std::string &message);  // std::invalid_argument

}  // namespace sluice
