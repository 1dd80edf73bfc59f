// Tensors as the memory that the C core works on: dense ones as they are, others by way of a copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "c10d/errors.h"

namespace sluice::c10d_backend {

// What is read, written, or both. Made when the operation runs: until then the caller may still be writing.
class Buffer {
 public:
  static Buffer input(const at::Tensor &tensor) { return Buffer(tensor, true, false); }
  static Buffer output(const at::Tensor &tensor) { return Buffer(tensor, false, true); }
  static Buffer both(const at::Tensor &tensor) { return Buffer(tensor, true, true); }

  size_t bytes() const { return dense_.nbytes(); }
  const void *data() const { return dense_.const_data_ptr(); }
  void *mutable_data() { return dense_.mutable_data_ptr(); }

  // After the operation: writes the result into the tensor, where it isn't there already.
  void finish();

 private:
  Buffer(const at::Tensor &tensor, bool reads, bool writes);

  at::Tensor tensor_, dense_;
  bool copied_, writes_;
};

// One buffer for each rank, as the C core takes them.
class Buffers {
 public:
  static Buffers inputs(const std::vector<at::Tensor> &tensors);
  static Buffers outputs(const std::vector<at::Tensor> &tensors);

  const void *const *data() const { return pointers_.data(); }
  void *const *mutable_data() const { return pointers_.data(); }
  const size_t *bytes() const { return bytes_.data(); }
  void finish();

 private:
  void add(Buffer buffer, void *data);

  std::vector<Buffer> buffers_;
  std::vector<void *> pointers_;
  std::vector<size_t> bytes_;
};

// sl_comm_all_gather() of tensors.
void run_all_gather(sl_comm *comm, const std::vector<at::Tensor> &outputs, const at::Tensor &input,
                    Milliseconds timeout);

}  // namespace sluice::c10d_backend
