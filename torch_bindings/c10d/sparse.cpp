// The sum of sparse tensors: every rank gathers the indices and values of all, and adds them up in the order of ranks.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>

#include "c10d/backend.h"

namespace sluice::c10d_backend {
namespace {

// What ranks have to know of each other's tensors, as a tensor: dimensions, non-zeros, sizes.
constexpr int64_t kMaxDimensions = 32;

at::Tensor describe(const at::Tensor &tensor) {
  TORCH_CHECK(tensor.dim() <= kMaxDimensions, "sluice: all_reduce: a sparse tensor of ", tensor.dim(),
              " dimensions, expected at most ", kMaxDimensions);
  std::vector<int64_t> numbers = {tensor._nnz(), tensor.sparse_dim(), tensor.dim()};
  for (int64_t size : tensor.sizes()) numbers.push_back(size);
  numbers.resize(3 + kMaxDimensions);
  at::Tensor description = at::empty({3 + kMaxDimensions}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), description.mutable_data_ptr<int64_t>());
  return description;
}

at::Tensor sum(OneHost &host, const at::Tensor &tensor, int size, Milliseconds timeout) {
  at::Tensor input = tensor.coalesce();
  at::Tensor own = describe(input);
  Tensors descriptions, indices, values;
  for (int rank = 0; rank < size; ++rank) descriptions.push_back(at::empty_like(own));
  host.all_gather(descriptions, own, timeout);
  for (int rank = 0; rank < size; ++rank) {
    TORCH_CHECK(descriptions[rank].slice(0, 1).equal(own.slice(0, 1)), "sluice: all_reduce: rank ", rank,
                " of the group has a sparse tensor of other dimensions than this rank, whose sizes are ", input.sizes(),
                " with ", input.sparse_dim(), " sparse dimensions");
    int64_t count = descriptions[rank].const_data_ptr<int64_t>()[0];
    std::vector<int64_t> shape = input.values().sizes().vec();
    shape[0] = count;
    values.push_back(at::empty(shape, input.values().options()));
    // Transposed, so that ranks' indices can be put end to end.
    indices.push_back(at::empty({count, input.sparse_dim()}, at::kLong));
  }
  host.all_gather(indices, input.indices().t().contiguous(), timeout);
  host.all_gather(values, input.values(), timeout);
  return at::sparse_coo_tensor(at::cat(indices).t(), at::cat(values), input.sizes()).coalesce();
}

}  // namespace

WorkPtr ProcessGroupSluice::allreduce_sparse(Tensors &tensors, const ::c10d::AllreduceOptions &options) {
  if (::c10d::Backend *other = other_backend(tensors)) {
    // Gloo knows its sparse tensors by their layout.
    return delegate(
        *other, tensors[0].is_cpu() ? other->allreduce(tensors, options) : other->allreduce_sparse(tensors, options));
  }
  TORCH_CHECK(tensors.size() == 1, "sluice: all_reduce: ", tensors.size(), " sparse tensors, expected one");
  at::Tensor tensor = tensors[0];
  TORCH_CHECK(tensor.layout() == at::kSparse, "sluice: all_reduce: a tensor of layout ", tensor.layout(),
              ", expected dense or sparse COO");
  TORCH_CHECK(options.reduceOp == ::c10d::ReduceOp::SUM,
              "sluice: all_reduce of sparse tensors, expected the operator SUM");
  Milliseconds timeout = timeout_or_default(options.timeout);
  auto body = [host = one_host_, tensor, size = size_, timeout] { tensor.copy_(sum(*host, tensor, size, timeout)); };
  return launch({::c10d::OpType::_ALLREDUCE_SPARSE, "sluice:sparse_all_reduce", tensors, {tensors}, body},
                options.asyncOp);
}

}  // namespace sluice::c10d_backend
