// Collectives with a root, and those in which every pair of ranks exchanges something of its own.
#include "c10d/backend.h"

namespace sluice::c10d_backend {
namespace {

using ::c10d::OpType;

// A tensor cut along its first dimension, evenly where no sizes are given.
Tensors split_rows(const char *name, const at::Tensor &whole, const std::vector<int64_t> &sizes, int ranks) {
  int64_t rows = whole.dim() == 0 ? 1 : whole.size(0);
  std::vector<int64_t> lengths = sizes;
  if (lengths.empty()) {
    TORCH_CHECK(rows % ranks == 0, "sluice: all_to_all: ", name, " has ", rows,
                " rows, expected a multiple of the group's size, ", ranks, ", or sizes to split it by");
    lengths.assign(ranks, rows / ranks);
  }
  TORCH_CHECK(lengths.size() == static_cast<size_t>(ranks), "sluice: all_to_all: ", name, " is split by ",
              lengths.size(), " sizes, expected one for each of the ", ranks, " ranks");
  Tensors parts;
  int64_t begin = 0;
  for (int64_t length : lengths) {
    TORCH_CHECK(length >= 0 && begin + length <= rows, "sluice: all_to_all: ", name, " has ", rows,
                " rows, and is split by ", at::IntArrayRef(lengths));
    parts.push_back(whole.dim() == 0 ? whole : whole.narrow(0, begin, length));
    begin += length;
  }
  TORCH_CHECK(begin == rows, "sluice: all_to_all: ", name, " has ", rows, " rows, and is split by ",
              at::IntArrayRef(lengths));
  return parts;
}

}  // namespace

WorkPtr ProcessGroupSluice::broadcast(Tensors &tensors, const ::c10d::BroadcastOptions &options) {
  if (::c10d::Backend *other = other_backend(tensors, kHierarchical))
    return delegate(*other, other->broadcast(tensors, options));
  at::Tensor tensor = single_tensor("broadcast", "tensors", tensors);
  check_root("broadcast", options.rootRank, size_);
  int root = static_cast<int>(options.rootRank);
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, tensor, root, timeout] { fabric->broadcast(tensor, root, timeout); };
  return launch({OpType::BROADCAST, "sluice:broadcast", tensors, {tensors}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::reduce(Tensors &tensors, const ::c10d::ReduceOptions &options) {
  if (::c10d::Backend *other = other_backend(tensors, kHierarchical))
    return delegate(*other, other->reduce(tensors, options));
  at::Tensor tensor = single_tensor("reduce", "tensors", tensors);
  check_root("reduce", options.rootRank, size_);
  Reduction reduction = make_reduction("reduce", tensor, options.reduceOp);
  int root = static_cast<int>(options.rootRank);
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [fabric = fabric_, tensor = real_view(tensor), reduction, root, timeout] {
    fabric->reduce(tensor, reduction, root, timeout);
  };
  return launch({OpType::REDUCE, "sluice:reduce", tensors, {tensors}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::gather(TensorLists &outputs, Tensors &inputs, const ::c10d::GatherOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs)) return delegate(*other, other->gather(outputs, inputs, options));
  at::Tensor input = single_tensor("gather", "the input", inputs);
  check_root("gather", options.rootRank, size_);
  int root = static_cast<int>(options.rootRank);
  Tensors list;
  if (root == rank_) {
    list = single_list("gather", "the output", outputs, size_);
    for (const at::Tensor &output : list) check_dtype("gather", "an output", output, input);
    check_numel("gather", "this rank's output", list[rank_], input.numel());
  } else {
    TORCH_CHECK(outputs.empty(), "sluice: gather: outputs at rank ", rank_, ", expected them at the root alone, ",
                root);
  }
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [host = one_host_, list, input, root, timeout] { host->gather(list, input, root, timeout); };
  return launch({OpType::GATHER, "sluice:gather", inputs, outputs, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::scatter(Tensors &outputs, TensorLists &inputs, const ::c10d::ScatterOptions &options) {
  if (::c10d::Backend *other = other_backend(outputs))
    return delegate(*other, other->scatter(outputs, inputs, options));
  at::Tensor output = single_tensor("scatter", "the output", outputs);
  check_root("scatter", options.rootRank, size_);
  int root = static_cast<int>(options.rootRank);
  Tensors list;
  if (root == rank_) {
    list = single_list("scatter", "the input", inputs, size_);
    for (const at::Tensor &input : list) check_dtype("scatter", "an input", input, output);
    check_numel("scatter", "this rank's input", list[rank_], output.numel());
  } else {
    TORCH_CHECK(inputs.empty(), "sluice: scatter: inputs at rank ", rank_, ", expected them at the root alone, ", root);
  }
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [host = one_host_, output, list, root, timeout] { host->scatter(output, list, root, timeout); };
  return launch({OpType::SCATTER, "sluice:scatter", list, {outputs}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::alltoall(Tensors &outputs, Tensors &inputs, const ::c10d::AllToAllOptions &options) {
  if (::c10d::Backend *other = other_backend(inputs))
    return delegate(*other, other->alltoall(outputs, inputs, options));
  size_t size = static_cast<size_t>(size_);
  TORCH_CHECK(outputs.size() == size && inputs.size() == size, "sluice: all_to_all: ", outputs.size(), " outputs and ",
              inputs.size(), " inputs, expected one for each of the ", size_, " ranks");
  for (size_t i = 0; i < size; ++i) {
    check_dense("all_to_all", "an input", inputs[i]);
    check_dense("all_to_all", "an output", outputs[i]);
    check_dtype("all_to_all", "an input", inputs[i], inputs[0]);
    check_dtype("all_to_all", "an output", outputs[i], inputs[0]);
  }
  check_numel("all_to_all", "this rank's output", outputs[rank_], inputs[rank_].numel());
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [host = one_host_, outputs, inputs, timeout] { host->all_to_all(outputs, inputs, timeout); };
  return launch({OpType::ALLTOALL, "sluice:all_to_all", inputs, {outputs}, body}, options.asyncOp);
}

WorkPtr ProcessGroupSluice::alltoall_base(at::Tensor &output, at::Tensor &input, std::vector<int64_t> &output_splits,
                                          std::vector<int64_t> &input_splits, const ::c10d::AllToAllOptions &options) {
  if (::c10d::Backend *other = other_backend(input)) {
    return delegate(*other, other->alltoall_base(output, input, output_splits, input_splits, options));
  }
  check_dense("all_to_all", "the input", input);
  check_dense("all_to_all", "the output", output);
  check_dtype("all_to_all", "the output", output, input);
  Tensors outputs = split_rows("the output", output, output_splits, size_);
  Tensors inputs = split_rows("the input", input, input_splits, size_);
  check_numel("all_to_all", "this rank's part of the output", outputs[rank_], inputs[rank_].numel());
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [host = one_host_, outputs, inputs, timeout] { host->all_to_all(outputs, inputs, timeout); };
  return launch({OpType::ALLTOALL_BASE, "sluice:all_to_all", {input}, {{output}}, body}, options.asyncOp);
}

}  // namespace sluice::c10d_backend
