// From a status of the C core to the exceptions of c10d, and checks that name the call and the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <chrono>
#include <cstdint>
#include <vector>

#include <sluice/comm.h>

namespace sluice::c10d_backend {

using Milliseconds = std::chrono::milliseconds;

// Throws when status is not SL_OK, with sl_last_error() as the text: DistBackendError for what the group suffered
// together, RuntimeError for a mistake of this rank alone.
void check_status(sl_status status, Milliseconds timeout);

// What a tensor that takes part in a collective has to be. call and name go into the error.
void check_dense(const char *call, const char *name, const at::Tensor &tensor);
void check_dtype(const char *call, const char *name, const at::Tensor &tensor, const at::Tensor &like);
void check_numel(const char *call, const char *name, const at::Tensor &tensor, int64_t expected);
void check_root(const char *call, int64_t root, int size);

// The only tensor of a list, checked.
at::Tensor single_tensor(const char *call, const char *name, const std::vector<at::Tensor> &tensors);

// A list of one list, as c10d passes what gather and its kin give to or take from each rank; checked for its length.
const std::vector<at::Tensor> &single_list(const char *call, const char *name,
                                           const std::vector<std::vector<at::Tensor>> &lists, size_t length);

}  // namespace sluice::c10d_backend
