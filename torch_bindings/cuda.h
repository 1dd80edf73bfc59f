// Where CUDA work of an operator goes.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "shim.h"

namespace sluice {

// Makes the device of a CUDA tensor the current one for the life of the object.
class CudaScope {
 public:
  explicit CudaScope(const Tensor &tensor);
  void *stream() const { return stream_; }  // torch's current stream there, a cudaStream_t

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void *stream_ = nullptr;
};

}  // namespace sluice
