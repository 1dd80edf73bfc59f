// Collectives in which no rank is apart: each checks its tensors and hands the C core their memory.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include "c10d/backend.h"

namespace sluice::c10d_backend {
namespace {

using ::c10d::OpType;

// Each rank's part of a tensor of one dimension more, or of parts laid end to end.
Tensors parts_of(const at::Tensor &whole, int size) {
  Tensors parts;
  at::Tensor flat = whole.view(-1);
  int64_t count = whole.numel() / size;
  for (int rank = 0; rank < size; ++rank) parts.push_back(flat.narrow(0, rank * count, count));
  return parts;
}

}  // namespace

WorkPtr ProcessGroupSluice::allreduce(Tensors &tensors, const ::c10d::AllreduceOptions &options) {
  if (::c10d::Backend *other = other_backend(tensors, kHierarchical))
    return delegate(*other, other->allreduce(tensors, options));
  if (tensors.size() == 1 && tensors[0].layout() != at::kStrided) return allreduce_sparse(tensors, options);
  at::Tensor tensor = single_tensor("all_reduce", "tensors", tensors);
  Reduction reduction = make_reduction("all_reduce", tensor, options.reduceOp);
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, tensor = real_view(tensor), reduction, timeout] {
    fabric->all_reduce(tensor, reduction, timeout);
  };
  return launch({OpType::ALLREDUCE, "sluice:all_reduce", tensors, {tensors}, body}, options.asyncOp);
}

// Small tensors are put into one, so that they are waited for once; large ones would only be copied about.
WorkPtr ProcessGroupSluice::allreduce_coalesced(Tensors &tensors, const ::c10d::AllreduceCoalescedOptions &options) {
  if (::c10d::Backend *other = other_backend(tensors, kHierarchical))
    return delegate(*other, other->allreduce_coalesced(tensors, options));
  TORCH_CHECK(!tensors.empty(), "sluice: all_reduce_coalesced: tensors is empty, expected at least one");
  constexpr size_t kSmall = size_t{1} << 20;
  size_t bytes = 0;
  for (const at::Tensor &tensor : tensors) {
    check_dense("all_reduce_coalesced", "tensors", tensor);
    check_dtype("all_reduce_coalesced", "tensors", tensor, tensors[0]);
    bytes += tensor.nbytes();
  }
  Reduction reduction = make_reduction("all_reduce_coalesced", tensors[0], options.reduceOp);
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, tensors, reduction, timeout, bytes] {
    if (bytes > kSmall || tensors.size() == 1) {
      for (const at::Tensor &tensor : tensors) fabric->all_reduce(real_view(tensor), reduction, timeout);
      return;
    }
    Tensors flat;
    for (const at::Tensor &tensor : tensors) flat.push_back(tensor.reshape({-1}));
    at::Tensor together = at::cat(flat);
    fabric->all_reduce(real_view(together), reduction, timeout);
    int64_t begin = 0;
    for (const at::Tensor &tensor : tensors) {
      tensor.copy_(together.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
      begin += tensor.numel();
    }
  };
  return launch({OpType::ALLREDUCE_COALESCED, "sluice:all_reduce", tensors, {tensors}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::allgather(TensorLists &outputs, Tensors &inputs, const ::c10d::AllgatherOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs, kHierarchical))
    return delegate(*other, other->allgather(outputs, inputs, options));
  at::Tensor input = single_tensor("all_gather", "the input", inputs);
  const Tensors &list = single_list("all_gather", "the output", outputs, size_);
  for (const at::Tensor &output : list) check_dtype("all_gather", "an output", output, input);
  check_numel("all_gather", "this rank's output", list[rank_], input.numel());
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, list, input, timeout] { fabric->all_gather(list, input, timeout); };
  return launch({OpType::ALLGATHER, "sluice:all_gather", inputs, outputs, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::_allgather_base(at::Tensor &output, at::Tensor &input,
                                            const ::c10d::AllgatherOptions &options) {
  if (::c10d::Backend *other = other_backend(input, kHierarchical))
    return delegate(*other, other->_allgather_base(output, input, options));
  Tensors outputs = {output}, inputs = {input};
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

WorkPtr ProcessGroupSluice::allgather_into_tensor_coalesced(Tensors &outputs, Tensors &inputs,
                                                            const ::c10d::AllgatherOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs, kHierarchical)) {
    return delegate(*other, other->allgather_into_tensor_coalesced(outputs, inputs, options));
  }
  const char *call = "all_gather_into_tensor";
  TORCH_CHECK(outputs.size() == inputs.size(), "sluice: ", call, ": ", outputs.size(), " outputs for ", inputs.size(),
              " inputs, expected one for each");
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_dense(call, "the input", inputs[i]);
    check_dense(call, "the output", outputs[i]);
    check_dtype(call, "the output", outputs[i], inputs[i]);
    check_numel(call, "the output", outputs[i], inputs[i].numel() * size_);
  }
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, outputs, inputs, timeout, size = size_] {
    for (size_t i = 0; i < inputs.size(); ++i) {
      at::Tensor whole = outputs[i].is_contiguous() ? outputs[i] : at::empty(outputs[i].sizes(), outputs[i].options());
      fabric->all_gather(parts_of(whole, size), inputs[i], timeout);
      if (!whole.is_same(outputs[i])) outputs[i].copy_(whole);
    }
  };
  return launch({OpType::_ALLGATHER_BASE, "sluice:_all_gather_base", inputs, {outputs}, body}, options.asyncOp);
}

// outputs[rank][i] is what that rank gave as inputs[i].
WorkPtr ProcessGroupSluice::allgather_coalesced(TensorLists &outputs, Tensors &inputs,
                                                const ::c10d::AllgatherOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs, kHierarchical))
    return delegate(*other, other->allgather_coalesced(outputs, inputs, options));
  const char *call = "all_gather_coalesced";
  TORCH_CHECK(outputs.size() == static_cast<size_t>(size_), "sluice: ", call, ": ", outputs.size(),
              " lists of outputs, expected one for each of the ", size_, " ranks");
  std::vector<Tensors> by_input(inputs.size());
  for (const Tensors &list : outputs) {
    TORCH_CHECK(list.size() == inputs.size(), "sluice: ", call, ": a list of ", list.size(), " outputs for ",
                inputs.size(), " inputs, expected one for each");
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_dense(call, "an input", inputs[i]);
      check_dense(call, "an output", list[i]);
      check_dtype(call, "an output", list[i], inputs[i]);
      by_input[i].push_back(list[i]);
    }
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_numel(call, "this rank's output", outputs[rank_][i], inputs[i].numel());
  }
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, by_input, inputs, timeout] {
    for (size_t i = 0; i < inputs.size(); ++i) fabric->all_gather(by_input[i], inputs[i], timeout);
  };
  return launch({OpType::ALLGATHER_COALESCED, "sluice:all_gather", inputs, outputs, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::reduce_scatter(Tensors &outputs, TensorLists &inputs,
                                           const ::c10d::ReduceScatterOptions &options) {
  if (::c10d::Backend *other = other_backend(outputs, kHierarchical))
    return delegate(*other, other->reduce_scatter(outputs, inputs, options));
  at::Tensor output = single_tensor("reduce_scatter", "the output", outputs);
  const Tensors &list = single_list("reduce_scatter", "the input", inputs, size_);
  for (const at::Tensor &input : list) check_dtype("reduce_scatter", "an input", input, output);
  check_numel("reduce_scatter", "the output", output, list[rank_].numel());
  Reduction reduction = make_reduction("reduce_scatter", output, options.reduceOp);
  Milliseconds timeout = timeout_or_default(options.timeout);
  Tensors parts;
  for (const at::Tensor &input : list) parts.push_back(real_view(input));
  auto body = [fabric = fabric_, output = real_view(output), parts, reduction, timeout] {
    fabric->reduce_scatter(output, parts, reduction, timeout);
  };
  return launch({OpType::REDUCE_SCATTER, "sluice:reduce_scatter", list, {outputs}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::_reduce_scatter_base(at::Tensor &output, at::Tensor &input,
                                                 const ::c10d::ReduceScatterOptions &options) {
  if (::c10d::Backend *other = other_backend(input, kHierarchical))
    return delegate(*other, other->_reduce_scatter_base(output, input, options));
  Tensors outputs = {output}, inputs = {input};
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

WorkPtr ProcessGroupSluice::reduce_scatter_tensor_coalesced(Tensors &outputs, Tensors &inputs,
                                                            const ::c10d::ReduceScatterOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs, kHierarchical)) {
    return delegate(*other, other->reduce_scatter_tensor_coalesced(outputs, inputs, options));
  }
  const char *call = "reduce_scatter_tensor";
  TORCH_CHECK(outputs.size() == inputs.size(), "sluice: ", call, ": ", outputs.size(), " outputs for ", inputs.size(),
              " inputs, expected one for each");
  std::vector<Reduction> reductions;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_dense(call, "the input", inputs[i]);
    check_dense(call, "the output", outputs[i]);
    check_dtype(call, "the output", outputs[i], inputs[i]);
    check_numel(call, "the input", inputs[i], outputs[i].numel() * size_);
    reductions.push_back(make_reduction(call, inputs[i], options.reduceOp));
  }
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, outputs, inputs, reductions, timeout, size = size_] {
    for (size_t i = 0; i < inputs.size(); ++i) {
      Tensors parts = parts_of(real_view(inputs[i]).contiguous(), size);
      fabric->reduce_scatter(real_view(outputs[i]), parts, reductions[i], timeout);
    }
  };
  return launch({OpType::_REDUCE_SCATTER_BASE, "sluice:_reduce_scatter_base", inputs, {outputs}, body},
                options.asyncOp);
}

WorkPtr ProcessGroupSluice::barrier(const ::c10d::BarrierOptions &options) {
  if (options.device && options.device->is_cuda()) {
    ::c10d::Backend *nccl = backend_of_kind("nccl");
    return delegate(*nccl, nccl->barrier(options));
  }
  if (::c10d::Backend *other = other_backend(at::Tensor(), kHierarchical))
    return delegate(*other, other->barrier(options));
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, timeout] { fabric->barrier(timeout); };
  return launch({OpType::BARRIER, "sluice:barrier", {}, {}, body}, options.asyncOp);
}

}  // namespace sluice::c10d_backend
