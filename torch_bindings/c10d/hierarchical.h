// Collectives of a group that is spread over several hosts: shared memory inside each, and between the hosts a backend
// over the network, Gloo, in which one rank of each host takes part, its leader. So each host sends and receives once
// what its ranks have in common.
//
// All ranks get the same bits. bfloat16 and float16 travel as float32 and are rounded once, at the end.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <functional>

#include "c10d/fabric.h"
#include "c10d/rendezvous.h"

namespace sluice::c10d_backend {

class SeveralHosts final : public Fabric {
 public:
  using BackendPtr = c10::intrusive_ptr<::c10d::Backend>;

  // connect_leaders: made when it is first needed, by the leaders alone; their ranks in it are the hosts' numbers.
  SeveralHosts(const Hosts &hosts, int rank, int size, std::function<BackendPtr()> connect_leaders);

  void barrier(Milliseconds timeout) override;
  void broadcast(const at::Tensor &tensor, int root, Milliseconds timeout) override;
  void all_reduce(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) override;
  void reduce(const at::Tensor &tensor, const Reduction &reduction, int root, Milliseconds timeout) override;
  void all_gather(const Tensors &outputs, const at::Tensor &input, Milliseconds timeout) override;
  void reduce_scatter(const at::Tensor &output, const Tensors &inputs, const Reduction &reduction,
                      Milliseconds timeout) override;

 private:
  struct Place {
    int host, in_host;
  };

  static std::vector<Place> places_in(const Hosts &hosts, int size);  // of each rank
  bool is_leader() const { return places_[rank_].in_host == 0; }
  ::c10d::Backend &leaders();
  void run(const std::function<void()> &collective);  // what ends the collective here ends it on every host

  at::Tensor reduce_to_leader(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout);
  void reduce_between_leaders(const at::Tensor &dense, sl_reduce_op op, Milliseconds timeout);

  const Hosts hosts_;
  const int rank_, size_;
  const std::vector<Place> places_;
  OneHost local_;
  const std::function<BackendPtr()> connect_leaders_;
  BackendPtr leaders_;
};

}  // namespace sluice::c10d_backend
