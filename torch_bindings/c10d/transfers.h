// Sends and receives of one group. Each begins at once, on the thread that asks for it, and goes on whenever a thread
// is in a function of the C core for transfers. A thread that waits for one is. For those that nobody waits for there
// is a driver thread, started when there is the first. Transfers that are waited for at once don't wake it up, which
// would take longer than they do: it comes by every few milliseconds, as long as there are any.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "c10d/communicator.h"
#include "c10d/work.h"

namespace sluice::c10d_backend {

class Transfer final : public ::c10d::Work {
 public:
  enum class Kind { send, receive, receive_any };
  enum class State { pending, attended, done };  // attended: another thread is moving it

  Transfer(CommunicatorPtr communicator, Kind kind, const at::Tensor &tensor, Milliseconds timeout);
  ~Transfer() override;

  void begin(int rank, uint64_t tag);
  State advance();  // without waiting

  // Fails it if the ranks that could complete it can't any more. For who doesn't wait(), in these intervals.
  void look_after();
  static constexpr Milliseconds kLookInterval{100};

  bool isCompleted() override;
  bool wait(Milliseconds timeout = kNoTimeout) override;
  int sourceRank() const override { return peer_; }
  std::vector<at::Tensor> result() override { return {tensor_}; }
  c10::intrusive_ptr<Future> getFuture() override { return future_.get({{tensor_}}); }

 private:
  void conclude(sl_status status, Milliseconds timeout);  // driving_ is held
  void settle();                                          // it isn't

  const CommunicatorPtr communicator_;
  const Kind kind_;
  const Milliseconds timeout_;  // of a wait() without one
  at::Tensor tensor_, dense_;   // what the caller gave; the memory that is transferred
  ProfilerRange profile_;
  std::mutex driving_;  // held by the thread that moves this transfer
  sl_transfer *transfer_ = nullptr;
  std::atomic<int> peer_;
  std::exception_ptr failure_;
  LazyFuture future_;
};

class Transfers : public std::enable_shared_from_this<Transfers> {
 public:
  explicit Transfers(CommunicatorPtr communicator) : communicator_(std::move(communicator)) {}

  c10::intrusive_ptr<Transfer> begin(Transfer::Kind kind, const at::Tensor &tensor, int rank, uint64_t tag,
                                     Milliseconds timeout);
  void close();  // what nobody has a hold of by now is called off

 private:
  using TransferPtr = c10::intrusive_ptr<Transfer>;

  static void drive(const std::shared_ptr<Transfers> &transfers);
  void drive_until_closed();
  bool advance_all(const std::vector<TransferPtr> &transfers);  // whether some are left that nobody attends to

  const CommunicatorPtr communicator_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<TransferPtr> pending_;
  bool asleep_ = false, closed_ = false;
  std::thread driver_;
};

}  // namespace sluice::c10d_backend
