// What collectives run on. A fabric is given tensors that were checked, and blocks until this rank's part is done.
#pragma once

#include <vector>

#include "c10d/communicator.h"
#include "c10d/reduction.h"

namespace sluice::c10d_backend {

using Tensors = std::vector<at::Tensor>;

// The collectives that every fabric has. Ranks and roots are those of the group.
class Fabric {
 public:
  virtual ~Fabric() = default;

  virtual void barrier(Milliseconds timeout) = 0;
  virtual void broadcast(const at::Tensor &tensor, int root, Milliseconds timeout) = 0;
  virtual void all_reduce(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) = 0;
  virtual void reduce(const at::Tensor &tensor, const Reduction &reduction, int root, Milliseconds timeout) = 0;
  virtual void all_gather(const Tensors &outputs, const at::Tensor &input, Milliseconds timeout) = 0;
  virtual void reduce_scatter(const at::Tensor &output, const Tensors &inputs, const Reduction &reduction,
                              Milliseconds timeout) = 0;
};

// Shared memory, between ranks that are all on one host.
class OneHost final : public Fabric {
 public:
  OneHost(CommunicatorPtr communicator, int rank) : communicator_(std::move(communicator)), rank_(rank) {}

  void barrier(Milliseconds timeout) override;
  void broadcast(const at::Tensor &tensor, int root, Milliseconds timeout) override;
  void all_reduce(const at::Tensor &tensor, const Reduction &reduction, Milliseconds timeout) override;
  void reduce(const at::Tensor &tensor, const Reduction &reduction, int root, Milliseconds timeout) override;
  void all_gather(const Tensors &outputs, const at::Tensor &input, Milliseconds timeout) override;
  void reduce_scatter(const at::Tensor &output, const Tensors &inputs, const Reduction &reduction,
                      Milliseconds timeout) override;

  // outputs and inputs at the root alone.
  void gather(const Tensors &outputs, const at::Tensor &input, int root, Milliseconds timeout);
  void scatter(const at::Tensor &output, const Tensors &inputs, int root, Milliseconds timeout);
  void all_to_all(const Tensors &outputs, const Tensors &inputs, Milliseconds timeout);

  sl_comm *comm() const { return communicator_->get(); }

 private:
  const CommunicatorPtr communicator_;
  const int rank_;
};

}  // namespace sluice::c10d_backend
