// Statuses and bad arguments become exceptions here.
#include "c10d/errors.h"

namespace sluice::c10d_backend {

void check_status(sl_status status, Milliseconds timeout) {
  switch (status) {
    case SL_OK: return;
    case SL_TIMEOUT:
      C10_THROW_ERROR(DistBackendError,
                      c10::str("sluice: Timed out waiting ", timeout.count(), "ms: ", sl_last_error()));
    case SL_PEER_LOST:
    case SL_MISMATCH:
    case SL_INTERNAL:
    case SL_UNSUPPORTED: C10_THROW_ERROR(DistBackendError, c10::str("sluice: ", sl_last_error()));
    case SL_OUT_OF_MEMORY: C10_THROW_ERROR(OutOfMemoryError, c10::str("sluice: ", sl_last_error()));
    default: TORCH_CHECK(false, "sluice: ", sl_last_error());
  }
}

void check_dense(const char *call, const char *name, const at::Tensor &tensor) {
  TORCH_CHECK(tensor.defined(), "sluice: ", call, ": ", name, " is undefined, expected a tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided, "sluice: ", call, ": ", name, " has layout ", tensor.layout(),
              ", expected a dense tensor");
  TORCH_CHECK(tensor.is_cpu(), "sluice: ", call, ": ", name, " is on ", tensor.device(),
              ", expected the device of the other tensors, cpu");
}

void check_dtype(const char *call, const char *name, const at::Tensor &tensor, const at::Tensor &like) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "sluice: ", call, ": ", name, " has dtype ",
              tensor.scalar_type(), ", expected that of the other tensors, ", like.scalar_type());
}

void check_numel(const char *call, const char *name, const at::Tensor &tensor, int64_t expected) {
  TORCH_CHECK(tensor.numel() == expected, "sluice: ", call, ": ", name, " has ", tensor.numel(), " elements (sizes ",
              tensor.sizes(), "), expected ", expected);
}

void check_root(const char *call, int64_t root, int size) {
  TORCH_CHECK(root >= 0 && root < size, "sluice: ", call, ": root is rank ", root, ", expected 0 to ", size - 1);
}

at::Tensor single_tensor(const char *call, const char *name, const std::vector<at::Tensor> &tensors) {
  TORCH_CHECK(tensors.size() == 1, "sluice: ", call, ": ", name, " holds ", tensors.size(),
              " tensors, expected one: there is one device");
  check_dense(call, name, tensors[0]);
  return tensors[0];
}

const std::vector<at::Tensor> &single_list(const char *call, const char *name,
                                           const std::vector<std::vector<at::Tensor>> &lists, size_t length) {
  TORCH_CHECK(lists.size() == 1, "sluice: ", call, ": ", name, " holds ", lists.size(), " lists, expected one");
  TORCH_CHECK(lists[0].size() == length, "sluice: ", call, ": ", name, " holds ", lists[0].size(),
              " tensors, expected one for each of the ", length, " ranks");
  for (const at::Tensor &tensor : lists[0]) check_dense(call, name, tensor);
  return lists[0];
}

}  // namespace sluice::c10d_backend
