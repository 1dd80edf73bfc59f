// Collectives of the C core, called with tensors.
#include "c10d/buffers.h"
#include "c10d/fabric.h"

namespace sluice::c10d_backend {

void OneHost::barrier(Milliseconds timeout) { check_status(sl_comm_barrier(comm(), timeout.count()), timeout); }

void OneHost::broadcast(const at::Tensor &tensor, int root, Milliseconds timeout) {
  Buffer buffer = root == rank_ ? Buffer::input(tensor) : Buffer::output(tensor);
  void *data = root == rank_ ? const_cast<void *>(buffer.data()) : buffer.mutable_data();
  check_status(sl_comm_broadcast(comm(), data, buffer.bytes(), root, timeout.count()), timeout);
  buffer.finish();
}

void OneHost::all_reduce(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) {
  Buffer buffer = Buffer::both(tensor);
  check_status(sl_comm_all_reduce(comm(), buffer.data(), buffer.mutable_data(), static_cast<size_t>(tensor.numel()),
                                  reduction.dtype, reduction.op, reduction.factor, timeout.count()),
               timeout);
  buffer.finish();
}

void OneHost::reduce(const at::Tensor &tensor, const Reduction &reduction, int root, Milliseconds timeout) {
  Buffer buffer = root == rank_ ? Buffer::both(tensor) : Buffer::input(tensor);
  void *out = root == rank_ ? buffer.mutable_data() : nullptr;
  check_status(sl_comm_reduce(comm(), buffer.data(), out, static_cast<size_t>(tensor.numel()), reduction.dtype,
                              reduction.op, reduction.factor, root, timeout.count()),
               timeout);
  buffer.finish();
}

void OneHost::all_gather(const Tensors &outputs, const at::Tensor &input, Milliseconds timeout) {
  Buffer in = Buffer::input(input);
  Buffers out = Buffers::outputs(outputs);
  check_status(sl_comm_all_gather(comm(), in.data(), in.bytes(), out.mutable_data(), out.bytes(), timeout.count()),
               timeout);
  out.finish();
}

void OneHost::reduce_scatter(const at::Tensor &output, const Tensors &inputs, const Reduction &reduction,
                             Milliseconds timeout) {
  Buffers in = Buffers::inputs(inputs);
  Buffer out = Buffer::output(output);
  std::vector<size_t> counts;
  for (const at::Tensor &input : inputs) counts.push_back(static_cast<size_t>(input.numel()));
  check_status(sl_comm_reduce_scatter(comm(), in.data(), counts.data(), out.mutable_data(), reduction.dtype,
                                      reduction.op, reduction.factor, timeout.count()),
               timeout);
  out.finish();
}

void OneHost::gather(const Tensors &outputs, const at::Tensor &input, int root, Milliseconds timeout) {
  Buffer in = Buffer::input(input);
  Buffers out = Buffers::outputs(outputs);
  check_status(sl_comm_gather(comm(), in.data(), in.bytes(), out.mutable_data(), out.bytes(), root, timeout.count()),
               timeout);
  out.finish();
}

void OneHost::scatter(const at::Tensor &output, const Tensors &inputs, int root, Milliseconds timeout) {
  Buffers in = Buffers::inputs(inputs);
  Buffer out = Buffer::output(output);
  check_status(sl_comm_scatter(comm(), in.data(), in.bytes(), out.mutable_data(), out.bytes(), root, timeout.count()),
               timeout);
  out.finish();
}

void OneHost::all_to_all(const Tensors &outputs, const Tensors &inputs, Milliseconds timeout) {
  Buffers in = Buffers::inputs(inputs), out = Buffers::outputs(outputs);
  check_status(sl_comm_all_to_all(comm(), in.data(), in.bytes(), out.mutable_data(), out.bytes(), timeout.count()),
               timeout);
  out.finish();
}

}  // namespace sluice::c10d_backend
