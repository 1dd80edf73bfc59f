// Memory of tensors.
#include "c10d/buffers.h"

#include <ATen/ops/empty.h>

namespace sluice::c10d_backend {

Buffer::Buffer(const at::Tensor &tensor, bool reads, bool writes) : tensor_(tensor), dense_(tensor), writes_(writes) {
  copied_ = !tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg();
  if (!copied_) return;
  dense_ = reads ? tensor.resolve_conj().resolve_neg().contiguous() : at::empty(tensor.sizes(), tensor.options());
}

void Buffer::finish() {
  if (copied_ && writes_) tensor_.copy_(dense_);
}

void Buffers::add(Buffer buffer, void *data) {
  bytes_.push_back(buffer.bytes());
  pointers_.push_back(data);
  buffers_.push_back(std::move(buffer));
}

Buffers Buffers::inputs(const std::vector<at::Tensor> &tensors) {
  Buffers all;
  for (const at::Tensor &tensor : tensors) {
    Buffer buffer = Buffer::input(tensor);
    all.add(buffer, const_cast<void *>(buffer.data()));  // seen as const again through data()
  }
  return all;
}

Buffers Buffers::outputs(const std::vector<at::Tensor> &tensors) {
  Buffers all;
  for (const at::Tensor &tensor : tensors) {
    Buffer buffer = Buffer::output(tensor);
    all.add(buffer, buffer.mutable_data());
  }
  return all;
}

void Buffers::finish() {
  for (Buffer &buffer : buffers_) buffer.finish();
}

void run_all_gather(sl_comm *comm, const std::vector<at::Tensor> &outputs, const at::Tensor &input,
                    Milliseconds timeout) {
  Buffer in = Buffer::input(input);
  Buffers out = Buffers::outputs(outputs);
  check_status(sl_comm_all_gather(comm, in.data(), in.bytes(), out.mutable_data(), out.bytes(), timeout.count()),
               timeout);
  out.finish();
}

}  // namespace sluice::c10d_backend
