// The checks and the counting that every operator shares.
#include "operator.h"

#include <stdexcept>

#include <sluice/cuda.h>

namespace sluice {
namespace {

std::string devices_text(bool on_cuda) { return on_cuda && sl_cuda_built() ? "cpu or cuda" : "cpu"; }

std::string layout_text(int32_t layout) {
  if (layout == aoti_torch_layout_sparse_coo()) return "sparse_coo";
  if (layout == aoti_torch_layout_sparse_csr()) return "sparse_csr";
  if (layout == aoti_torch_layout_sparse_csc()) return "sparse_csc";
  if (layout == aoti_torch_layout_sparse_bsr()) return "sparse_bsr";
  if (layout == aoti_torch_layout_sparse_bsc()) return "sparse_bsc";
  if (layout == aoti_torch_layout__mkldnn()) return "mkldnn";
  if (layout == aoti_torch_layout_jagged()) return "jagged";
  return "number " + std::to_string(layout);
}

bool has_known_dtype(const Tensor &tensor) {
  try {
    tensor.scalar_type();
    return true;
  } catch (const std::exception &) {
    return false;
  }
}

// Torch's nested tensors have no sizes, and refuse to be asked.
bool has_sizes(const Tensor &tensor) {
  int64_t *sizes = nullptr;
  return aoti_torch_get_sizes(tensor.get(), &sizes) == AOTI_TORCH_SUCCESS;
}

class NoGradient {
 public:
  NoGradient() : was_enabled_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGradient() { aoti_torch_grad_mode_set_enabled(was_enabled_); }
  NoGradient(const NoGradient &) = delete;
  NoGradient &operator=(const NoGradient &) = delete;

 private:
  bool was_enabled_;
};

}  // namespace

void check_tensor(std::string_view name, const Tensor &tensor) {
  if (!tensor.defined()) fail(std::string(name) + " is None, expected a tensor");
  int32_t layout = 0;
  if (aoti_torch_get_layout(tensor.get(), &layout) != AOTI_TORCH_SUCCESS) layout = -1;
  if (layout != aoti_torch_layout_strided()) {
    fail(std::string(name) + " has the layout " + layout_text(layout) + ", expected a dense tensor, torch.strided");
  }
  if (!has_known_dtype(tensor)) {
    int32_t dtype = -1;
    aoti_torch_get_dtype(tensor.get(), &dtype);
    fail(std::string(name) + " has the dtype number " + std::to_string(dtype) +
         " of torch's, expected an ordinary dtype, such as float32");
  }
}

void refuse_device(std::string_view name, const Tensor &tensor, bool on_cuda) {
  if (!has_sizes(tensor)) fail(std::string(name) + " is a nested tensor, expected a dense tensor");
  if (tensor.is_cpu() || (tensor.is_cuda() && on_cuda && sl_cuda_built())) return;
  fail(std::string(name) + " is " + describe(tensor) + ", expected it on " + devices_text(on_cuda) +
       (tensor.is_cuda() && on_cuda ? ": this build of Sluice has no CUDA kernels" : ""));
}

void refuse_arguments(std::string_view schema, bool on_cuda) {
  fail("sluice::" + std::string(schema.substr(0, schema.find('('))) +
       " was given tensors of a kind that it has no kernel for, expected dense tensors on " + devices_text(on_cuda));
}

void count_write(const Tensor &tensor) {
  // A copy of a tensor to itself copies nothing, and counts as a write. Gradient mode is off because the write is not
  // one to differentiate, and because torch refuses one to a parameter.
  NoGradient guard;
  if (aoti_torch_copy_(tensor.get(), tensor.get(), 0) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(
        "Inplace update to inference tensor outside InferenceMode is not allowed. Clone it to get a normal tensor.");
  }
}

}  // namespace sluice
