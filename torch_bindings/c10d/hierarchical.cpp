// Shared memory inside hosts, another backend between them.
#include "c10d/hierarchical.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>

namespace sluice::c10d_backend {
namespace {

using TensorLists = std::vector<Tensors>;

at::Tensor bytes_of(const at::Tensor &dense) { return dense.view(-1).view(at::kByte); }

template <class Options>
Options with_timeout(Milliseconds timeout) {
  Options options;
  options.timeout = timeout;
  return options;
}

// A copy in a type in which partial results lose nothing and that Gloo knows.
at::Tensor widened(const at::Tensor &tensor) {
  at::ScalarType type = tensor.scalar_type();
  if (type == at::kHalf || type == at::kBFloat16) type = at::kFloat;
  if (type == at::kShort) type = at::kInt;
  return tensor.to(type, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
}

// How each host reduces: averages are divided at the end.
Reduction partial(const Reduction &reduction, const at::Tensor &wide) {
  Reduction part = reduction;
  part.dtype = dtype_of(wide.scalar_type()).value_or(reduction.dtype);
  if (part.op == SL_REDUCE_AVG) part.op = SL_REDUCE_SUM;
  return part;
}

void average(const at::Tensor &wide, const Reduction &reduction, int size) {
  if (reduction.op != SL_REDUCE_AVG) return;
  if (at::isIntegralType(wide.scalar_type(), false)) {
    wide.div_(size, "trunc");
  } else {
    wide.div_(size);
  }
}

// The operator by which hosts' partial results become one. Booleans are numbers here, 0 or 1.
::c10d::ReduceOp::RedOpType operator_of_gloo(sl_reduce_op op, bool boolean) {
  using Op = ::c10d::ReduceOp;
  switch (op) {
    case SL_REDUCE_SUM:
    case SL_REDUCE_AVG:
    case SL_REDUCE_PREMUL_SUM: return boolean ? Op::MAX : Op::SUM;
    case SL_REDUCE_PRODUCT: return boolean ? Op::MIN : Op::PRODUCT;
    case SL_REDUCE_MIN: return Op::MIN;
    case SL_REDUCE_MAX: return Op::MAX;
    case SL_REDUCE_BAND: return Op::BAND;
    case SL_REDUCE_BOR: return Op::BOR;
    default: return Op::BXOR;
  }
}

}  // namespace

SeveralHosts::SeveralHosts(const Hosts &hosts, int rank, int size, std::function<BackendPtr()> connect_leaders)
    : hosts_(hosts),
      rank_(rank),
      size_(size),
      places_(places_in(hosts, size)),
      local_(hosts.communicator, places_[rank].in_host),
      connect_leaders_(std::move(connect_leaders)) {}

std::vector<SeveralHosts::Place> SeveralHosts::places_in(const Hosts &hosts, int size) {
  std::vector<Place> places(size);
  for (int host = 0; host < static_cast<int>(hosts.ranks.size()); ++host) {
    int in_host = 0;
    for (int rank : hosts.ranks[host]) places[rank] = {host, in_host++};
  }
  return places;
}

::c10d::Backend &SeveralHosts::leaders() {
  if (!leaders_) leaders_ = connect_leaders_();
  return *leaders_;
}

void SeveralHosts::run(const std::function<void()> &collective) {
  check_status(sl_comm_state(local_.comm()), Milliseconds(0));
  try {
    collective();
  } catch (const std::exception &error) {
    sl_comm_abort(local_.comm(), error.what());  // for this host
    leaders_.reset();                            // for the others: the connections end
    throw;
  }
}

void SeveralHosts::barrier(Milliseconds timeout) {
  run([&] {
    local_.barrier(timeout);
    if (is_leader()) leaders().barrier(with_timeout<::c10d::BarrierOptions>(timeout))->wait();
    local_.barrier(timeout);
  });
}

void SeveralHosts::broadcast(const at::Tensor &tensor, int root, Milliseconds timeout) {
  run([&] {
    auto [root_host, place] = places_[root];
    bool here = root_host == hosts_.host;
    at::Tensor dense =
        rank_ == root ? tensor.resolve_conj().resolve_neg().contiguous() : at::empty(tensor.sizes(), tensor.options());
    if (here) local_.broadcast(dense, place, timeout);
    if (is_leader() && dense.numel() > 0) {
      Tensors bytes = {bytes_of(dense)};
      auto options = with_timeout<::c10d::BroadcastOptions>(timeout);
      options.rootRank = root_host;
      leaders().broadcast(bytes, options)->wait();
    }
    if (!here) local_.broadcast(dense, 0, timeout);
    if (rank_ != root) tensor.copy_(dense);
  });
}

// Gloo's minimum and maximum don't say NaN where an input is.
void SeveralHosts::reduce_between_leaders(const at::Tensor &dense, sl_reduce_op op, Milliseconds timeout) {
  if (dense.numel() == 0) return;
  bool minimum = op == SL_REDUCE_MIN, boolean = dense.scalar_type() == at::kBool;
  if (dense.is_floating_point() && (minimum || op == SL_REDUCE_MAX)) {
    TensorLists all(1);
    for (size_t i = 0; i < hosts_.ranks.size(); ++i) all[0].push_back(at::empty_like(dense));
    Tensors own = {dense};
    leaders().allgather(all, own, with_timeout<::c10d::AllgatherOptions>(timeout))->wait();
    dense.copy_(all[0][0]);
    for (size_t i = 1; i < all[0].size(); ++i) {
      dense.copy_(minimum ? at::minimum(dense, all[0][i]) : at::maximum(dense, all[0][i]));
    }
    return;
  }
  Tensors tensors = {boolean ? bytes_of(dense) : dense};
  auto options = with_timeout<::c10d::AllreduceOptions>(timeout);
  options.reduceOp = operator_of_gloo(op, boolean);
  leaders().allreduce(tensors, options)->wait();
}

// What comes back is the result at leaders, and anything elsewhere.
at::Tensor SeveralHosts::reduce_to_leader(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) {
  at::Tensor wide = widened(tensor);
  local_.reduce(wide, partial(reduction, wide), 0, timeout);
  if (is_leader()) {
    reduce_between_leaders(wide, reduction.op, timeout);
    average(wide, reduction, size_);
  }
  return wide;
}

void SeveralHosts::all_reduce(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) {
  run([&] {
    at::Tensor result = reduce_to_leader(tensor, reduction, timeout).to(tensor.scalar_type());
    local_.broadcast(result, 0, timeout);
    tensor.copy_(result);
  });
}

void SeveralHosts::reduce(const at::Tensor &tensor, const Reduction &reduction, int root, Milliseconds timeout) {
  run([&] {
    at::Tensor result = reduce_to_leader(tensor, reduction, timeout).to(tensor.scalar_type());
    if (places_[root].host == hosts_.host) local_.broadcast(result, 0, timeout);
    if (rank_ == root) tensor.copy_(result);
  });
}

void SeveralHosts::all_gather(const Tensors &outputs, const at::Tensor &input, Milliseconds timeout) {
  run([&] {
    Tensors gathered;  // one host after the other
    for (int host = 0; host < static_cast<int>(hosts_.ranks.size()); ++host) {
      int64_t bytes = 0;
      for (int rank : hosts_.ranks[host]) bytes += static_cast<int64_t>(outputs[rank].nbytes());
      gathered.push_back(at::empty({bytes}, at::kByte));
    }
    auto parts_of = [&](int host) {
      Tensors parts;
      int64_t begin = 0;
      for (int rank : hosts_.ranks[host]) {
        parts.push_back(gathered[host].narrow(0, begin, static_cast<int64_t>(outputs[rank].nbytes())));
        begin += parts.back().numel();
      }
      return parts;
    };
    local_.gather(is_leader() ? parts_of(hosts_.host) : Tensors(), input, 0, timeout);
    for (int host = 0; host < static_cast<int>(gathered.size()); ++host) {
      Tensors block = {gathered[host]};
      if (is_leader() && block[0].numel() > 0) {
        auto options = with_timeout<::c10d::BroadcastOptions>(timeout);
        options.rootRank = host;
        leaders().broadcast(block, options)->wait();
      }
      local_.broadcast(block[0], 0, timeout);
      Tensors parts = parts_of(host);
      for (size_t i = 0; i < parts.size(); ++i) {
        const at::Tensor &output = outputs[hosts_.ranks[host][i]];
        if (output.numel() == 0) continue;
        // A part begins at any byte; a clone is aligned.
        output.copy_(parts[i].clone().view(output.scalar_type()).view(output.sizes()));
      }
    }
  });
}

void SeveralHosts::reduce_scatter(const at::Tensor &output, const Tensors &inputs, const Reduction &reduction,
                                  Milliseconds timeout) {
  run([&] {
    Tensors flat;
    for (const at::Tensor &input : inputs) flat.push_back(input.reshape({-1}));
    at::Tensor result = reduce_to_leader(at::cat(flat), reduction, timeout).to(output.scalar_type());
    Tensors parts;
    for (int rank : hosts_.ranks[hosts_.host]) {
      int64_t begin = 0;
      for (int before = 0; before < rank; ++before) begin += inputs[before].numel();
      parts.push_back(result.narrow(0, begin, inputs[rank].numel()));
    }
    local_.scatter(output, is_leader() ? parts : Tensors(), 0, timeout);
  });
}

}  // namespace sluice::c10d_backend
