// Point-to-point transfers, and the thread that drives those that nobody waits for.
#include "c10d/transfers.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <pthread.h>

#include <algorithm>

#include "c10d/statistics.h"

namespace sluice::c10d_backend {
namespace {

using Kind = Transfer::Kind;

::c10d::OpType type_of(Kind kind) {
  if (kind == Kind::send) return ::c10d::OpType::SEND;
  return kind == Kind::receive ? ::c10d::OpType::RECV : ::c10d::OpType::RECVANYSOURCE;
}

const char *title_of(Kind kind) {
  if (kind == Kind::send) return "sluice:send";
  return kind == Kind::receive ? "sluice:recv" : "sluice:recvAnySource";
}

}  // namespace

Transfer::Transfer(CommunicatorPtr communicator, Kind kind, const at::Tensor &tensor, Milliseconds timeout)
    : Work(-1, type_of(kind)),
      communicator_(std::move(communicator)),
      kind_(kind),
      timeout_(timeout),
      tensor_(tensor),
      dense_(tensor),
      profile_(title_of(kind), {tensor}),
      peer_(SL_COMM_ANY_RANK) {
  if (tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg()) return;
  at::AutoDispatchBelowADInplaceOrView guard;
  dense_ = kind == Kind::send ? tensor.resolve_conj().resolve_neg().contiguous()
                              : at::empty(tensor.sizes(), tensor.options());
}

Transfer::~Transfer() {
  if (communicator_->belongs_to_this_process()) sl_transfer_free(transfer_);
}

void Transfer::begin(int rank, uint64_t tag) {
  profile_.begin();
  sl_comm *comm = communicator_->get();
  sl_status status = kind_ == Kind::send
                         ? sl_comm_send(comm, dense_.const_data_ptr(), dense_.nbytes(), rank, tag, &transfer_)
                         : sl_comm_receive(comm, dense_.mutable_data_ptr(), dense_.nbytes(), rank, tag, &transfer_);
  if (status != SL_OK) profile_.end();
  check_status(status, timeout_);
}

Transfer::State Transfer::advance() {
  {
    std::unique_lock<std::mutex> lock(driving_, std::try_to_lock);
    if (!lock) return State::attended;
    if (!transfer_) return State::done;
    bool done = false;
    sl_status status = sl_transfer_test(transfer_, &done);
    if (status == SL_OK && !done) return State::pending;
    conclude(status, timeout_);
  }
  settle();
  return State::done;
}

void Transfer::look_after() {
  {
    std::unique_lock<std::mutex> lock(driving_, std::try_to_lock);
    if (!lock || !transfer_) return;  // whoever waits for it does that
    sl_status status = sl_transfer_look_after(transfer_);
    if (status == SL_OK) return;
    conclude(status, timeout_);
  }
  settle();
}

bool Transfer::isCompleted() {
  advance();
  return Work::isCompleted();
}

bool Transfer::wait(Milliseconds timeout) {
  Milliseconds limit = timeout == kNoTimeout ? timeout_ : timeout;
  bool concludes = false;
  {
    std::lock_guard<std::mutex> lock(driving_);
    concludes = transfer_ != nullptr;
    if (concludes) conclude(sl_transfer_wait(transfer_, limit.count()), limit);
  }
  if (concludes) settle();
  return Work::wait(kNoTimeout);  // for another thread that concluded it and hasn't settled it yet; throws its failure
}

void Transfer::conclude(sl_status status, Milliseconds timeout) {
  try {
    check_status(status, timeout);
    peer_ = sl_transfer_peer(transfer_);
    if (kind_ == Kind::send) Statistics::of_process().count_send(dense_.nbytes());
    at::AutoDispatchBelowADInplaceOrView guard;
    if (kind_ != Kind::send && !dense_.is_same(tensor_)) tensor_.copy_(dense_);
  } catch (...) {
    failure_ = std::current_exception();
  }
  sl_transfer_free(transfer_);
  transfer_ = nullptr;
}

void Transfer::settle() {
  profile_.end();
  future_.seal(failure_);
  future_.complete({{tensor_}});
  finish(failure_);
}

c10::intrusive_ptr<Transfer> Transfers::begin(Kind kind, const at::Tensor &tensor, int rank, uint64_t tag,
                                              Milliseconds timeout) {
  auto transfer = c10::make_intrusive<Transfer>(communicator_, kind, tensor, timeout);
  transfer->begin(rank, tag);
  if (transfer->advance() == Transfer::State::done) return transfer;
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!closed_, "sluice: this process group was shut down, and was asked for another transfer");
  pending_.push_back(transfer);
  if (!driver_.joinable()) driver_ = std::thread(drive, shared_from_this());
  if (asleep_) changed_.notify_one();
  return transfer;
}

bool Transfers::advance_all(const std::vector<TransferPtr> &transfers) {
  bool left = false;
  for (const TransferPtr &transfer : transfers) left |= transfer->advance() == Transfer::State::pending;
  return left;
}

void Transfers::drive(const std::shared_ptr<Transfers> &transfers) {
  pthread_setname_np(pthread_self(), "sluice_driver");
  transfers->drive_until_closed();
}

void Transfers::drive_until_closed() {
  constexpr Milliseconds kTick(1), kLongestTick(16), kSleepAfter(200);
  auto looked = std::chrono::steady_clock::now();
  Milliseconds tick = kTick, idle{0};
  std::unique_lock<std::mutex> lock(mutex_);
  while (!closed_) {
    std::vector<TransferPtr> transfers = pending_;
    lock.unlock();
    uint32_t seen = sl_comm_events(communicator_->get());
    if (advance_all(transfers)) {
      sl_comm_wait_for_event(communicator_->get(), seen, Transfer::kLookInterval.count());
      tick = kTick;
      auto now = std::chrono::steady_clock::now();
      if (now - looked >= Transfer::kLookInterval) {
        looked = now;
        for (const TransferPtr &transfer : transfers) transfer->look_after();
      }
    }
    idle = transfers.empty() ? idle + tick : Milliseconds(0);
    transfers.clear();
    lock.lock();
    std::erase_if(pending_, [](const TransferPtr &transfer) { return transfer->Work::isCompleted(); });
    if (closed_) break;
    asleep_ = idle >= kSleepAfter;
    if (asleep_) {
      changed_.wait(lock, [this] { return closed_ || !pending_.empty(); });
      asleep_ = false, idle = Milliseconds(0), tick = kTick;
    } else {
      changed_.wait_for(lock, tick);
      tick = std::min(2 * tick, kLongestTick);
    }
  }
}

void Transfers::close() {
  std::vector<TransferPtr> called_off;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    called_off = std::move(pending_);
    pending_.clear();
  }
  if (!driver_.joinable()) return;
  changed_.notify_one();
  sl_comm_wake(communicator_->get());
  if (driver_.get_id() == std::this_thread::get_id()) {
    driver_.detach();  // in a callback of a Future
  } else {
    driver_.join();
  }
}

}  // namespace sluice::c10d_backend
