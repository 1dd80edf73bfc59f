// The process group "sluice" as c10d sees it. Where all its ranks share a host, collectives and transfers go through
// shared memory; over several hosts, the commonest collectives go through shared memory inside each. The rest, and all
// calls with CUDA tensors, go to another backend, Gloo or NCCL, made when it is first needed.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "c10d/fabric.h"
#include "c10d/queue.h"
#include "c10d/rendezvous.h"
#include "c10d/transfers.h"

namespace sluice::c10d_backend {

using Work = ::c10d::Work;
using WorkPtr = c10::intrusive_ptr<Work>;
using BackendPtr = c10::intrusive_ptr<::c10d::Backend>;
using StorePtr = c10::intrusive_ptr<::c10d::Store>;

// Makes a backend of another kind, "gloo" or "nccl", over the same ranks.
using BackendFactory =
    std::function<BackendPtr(const std::string &kind, const StorePtr &, int rank, int size, Milliseconds timeout)>;

class ProcessGroupSluice final : public ::c10d::Backend {
 public:
  struct Arguments {
    StorePtr store;
    int rank, size;
    Milliseconds timeout;
    std::string group_name;
    std::vector<int64_t> global_ranks;  // empty: those of the group
    BackendFactory make_backend;
  };

  explicit ProcessGroupSluice(Arguments arguments);
  ~ProcessGroupSluice() override;

  const std::string getBackendName() const override { return "sluice"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(Milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}  // it begins with 0 on every rank
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  ::c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override;
  BackendPtr split(const StorePtr &, const std::vector<int> &ranks, const c10::intrusive_ptr<Options> &) override;

  WorkPtr broadcast(Tensors &, const ::c10d::BroadcastOptions &) override;
  WorkPtr allreduce(Tensors &, const ::c10d::AllreduceOptions &) override;
  WorkPtr allreduce_sparse(Tensors &, const ::c10d::AllreduceOptions &) override;
  WorkPtr allreduce_coalesced(Tensors &, const ::c10d::AllreduceCoalescedOptions &) override;
  WorkPtr reduce(Tensors &, const ::c10d::ReduceOptions &) override;
  WorkPtr allgather(TensorLists &outputs, Tensors &inputs, const ::c10d::AllgatherOptions &) override;
  WorkPtr _allgather_base(at::Tensor &output, at::Tensor &input, const ::c10d::AllgatherOptions &) override;
  WorkPtr allgather_coalesced(TensorLists &outputs, Tensors &inputs, const ::c10d::AllgatherOptions &) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors &outputs, Tensors &inputs, const ::c10d::AllgatherOptions &) override;
  WorkPtr gather(TensorLists &outputs, Tensors &inputs, const ::c10d::GatherOptions &) override;
  WorkPtr scatter(Tensors &outputs, TensorLists &inputs, const ::c10d::ScatterOptions &) override;
  WorkPtr reduce_scatter(Tensors &outputs, TensorLists &inputs, const ::c10d::ReduceScatterOptions &) override;
  WorkPtr _reduce_scatter_base(at::Tensor &output, at::Tensor &input, const ::c10d::ReduceScatterOptions &) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors &outputs, Tensors &inputs,
                                          const ::c10d::ReduceScatterOptions &) override;
  WorkPtr alltoall_base(at::Tensor &output, at::Tensor &input, std::vector<int64_t> &output_splits,
                        std::vector<int64_t> &input_splits, const ::c10d::AllToAllOptions &) override;
  WorkPtr alltoall(Tensors &outputs, Tensors &inputs, const ::c10d::AllToAllOptions &) override;
  WorkPtr barrier(const ::c10d::BarrierOptions &) override;
  void monitoredBarrier(const ::c10d::BarrierOptions &, bool wait_all_ranks) override;
  WorkPtr send(Tensors &, int destination, int tag) override;
  WorkPtr recv(Tensors &, int source, int tag) override;
  WorkPtr recvAnysource(Tensors &, int tag) override;

 private:
  std::shared_ptr<Fabric> make_several_hosts();
  sl_comm *comm() const { return hosts_.communicator->get(); }
  Milliseconds timeout_or_default(Milliseconds timeout) const;

  // The backend that takes this call instead, if one does; otherwise null. kHierarchical: a call that fabrics have.
  static constexpr bool kHierarchical = true;
  ::c10d::Backend *other_backend(const at::Tensor &like, bool hierarchical = false);
  ::c10d::Backend *other_backend(const Tensors &tensors, bool hierarchical = false);
  ::c10d::Backend *backend_of_kind(const std::string &kind);

  WorkPtr launch(Operation::Arguments arguments, bool asynchronous);
  WorkPtr remember(WorkPtr work);                                // for endCoalescing()
  WorkPtr delegate(const ::c10d::Backend &other, WorkPtr work);  // what the other backend made of a call

  const StorePtr store_;
  const c10::intrusive_ptr<Options> options_;
  std::atomic<int64_t> timeout_ms_;
  const BackendFactory make_backend_;
  const Hosts hosts_;
  const std::shared_ptr<OneHost> one_host_;  // null where there are several
  const std::shared_ptr<Fabric> fabric_;
  const std::shared_ptr<OperationQueue> queue_;
  const std::shared_ptr<Transfers> transfers_;
  std::atomic<uint64_t> sequence_{0};
  uint32_t monitored_barriers_ = 0;

  std::mutex mutex_;  // of what follows
  std::map<std::string, BackendPtr> others_;
  std::optional<std::vector<WorkPtr>> coalesced_;
  bool shut_down_ = false;
};

}  // namespace sluice::c10d_backend
