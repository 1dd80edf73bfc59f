// Torch's current CUDA device and stream, in a library that must also load where torch has no CUDA.
#include "cuda.h"

#include <stdexcept>

// Weak: a CPU build of torch lacks it, and no CUDA tensor can come from such a torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void **ret_stream);

namespace sluice {

CudaScope::CudaScope(const Tensor &tensor) : guard_(tensor.get_device_index()) {
  if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("this torch has no CUDA, expected a CUDA build");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}

}  // namespace sluice
