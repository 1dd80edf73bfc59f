// send, recv, and the barrier that is made of them: it can say which ranks did not come, without breaking the group.
#include "c10d/backend.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>

namespace sluice::c10d_backend {
namespace {

using Clock = std::chrono::steady_clock;

// Tags of c10d are nonnegative ints; those from here on are ours.
constexpr uint64_t kOwnTags = uint64_t{1} << 32;

uint64_t check_tag(const char *call, int tag) {
  TORCH_CHECK(tag >= 0, "sluice: ", call, ": tag is ", tag, ", expected a nonnegative number");
  return static_cast<uint64_t>(tag);
}

std::string join(const std::vector<int> &ranks) {
  std::string text;
  for (int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

}  // namespace

WorkPtr ProcessGroupSluice::send(Tensors &tensors, int destination, int tag) {
  if (::c10d::Backend *other = other_backend(tensors)) return delegate(*other, other->send(tensors, destination, tag));
  at::Tensor tensor = single_tensor("send", "tensors", tensors);
  TORCH_CHECK(destination >= 0 && destination < size_ && destination != rank_, "sluice: send to rank ", destination,
              " of the group, expected another rank than this one, ", rank_, ", of 0 to ", size_ - 1);
  return remember(
      transfers_->begin(Transfer::Kind::send, tensor, destination, check_tag("send", tag), Milliseconds(timeout_ms_)));
}

WorkPtr ProcessGroupSluice::recv(Tensors &tensors, int source, int tag) {
  if (::c10d::Backend *other = other_backend(tensors)) return delegate(*other, other->recv(tensors, source, tag));
  at::Tensor tensor = single_tensor("recv", "tensors", tensors);
  TORCH_CHECK(source >= 0 && source < size_ && source != rank_, "sluice: recv from rank ", source,
              " of the group, expected another rank than this one, ", rank_, ", of 0 to ", size_ - 1);
  return remember(
      transfers_->begin(Transfer::Kind::receive, tensor, source, check_tag("recv", tag), Milliseconds(timeout_ms_)));
}

WorkPtr ProcessGroupSluice::recvAnysource(Tensors &tensors, int tag) {
  if (::c10d::Backend *other = other_backend(tensors)) return delegate(*other, other->recvAnysource(tensors, tag));
  at::Tensor tensor = single_tensor("recv", "tensors", tensors);
  return remember(transfers_->begin(Transfer::Kind::receive_any, tensor, SL_COMM_ANY_RANK, check_tag("recv", tag),
                                    Milliseconds(timeout_ms_)));
}

// Every other rank reports to rank 0 and waits for its answer, which is whether all have come. Only rank 0 looks at the
// clock, so that it is the one that fails first and can say why.
void ProcessGroupSluice::monitoredBarrier(const ::c10d::BarrierOptions &options, bool wait_all_ranks) {
  if (::c10d::Backend *other = other_backend(at::Tensor())) return other->monitoredBarrier(options, wait_all_ranks);
  Milliseconds timeout = timeout_or_default(options.timeout), group_timeout(timeout_ms_);
  uint64_t report_tag = kOwnTags + 2 * uint64_t{monitored_barriers_++}, answer_tag = report_tag + 1;
  if (rank_ != 0) {
    at::Tensor answer = at::empty({1}, at::kByte);
    try {
      transfers_->begin(Transfer::Kind::send, answer, 0, report_tag, group_timeout)->wait();
      transfers_->begin(Transfer::Kind::receive, answer, 0, answer_tag, group_timeout)->wait();
      TORCH_CHECK(answer.item<uint8_t>() == 1, "rank 0 did not hear of all ranks within its timeout");
    } catch (const std::exception &error) {
      TORCH_CHECK(false, "Rank ", rank_, " successfully reached monitoredBarrier, but received errors while waiting",
                  " for send/recv from rank 0. Please check rank 0 logs for faulty rank.\n Original exception: \n",
                  error.what());
    }
    return;
  }

  auto deadline = Clock::now() + timeout;
  std::vector<c10::intrusive_ptr<Transfer>> reports(size_);
  Tensors buffers;
  for (int rank = 1; rank < size_; ++rank) {
    buffers.push_back(at::empty({1}, at::kByte));
    reports[rank] =
        c10::make_intrusive<Transfer>(hosts_.communicator, Transfer::Kind::receive, buffers.back(), timeout);
    reports[rank]->begin(rank, report_tag);
  }
  std::vector<int> absent;
  for (int rank = 1; rank < size_; ++rank) {
    while (true) {
      uint32_t seen = sl_comm_events(comm());
      if (reports[rank]->isCompleted()) break;
      auto left = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
      if (left.count() <= 0) break;
      check_status(sl_comm_wait_for_event(comm(), seen, std::min(left, Transfer::kLookInterval).count()), left);
      for (int other = rank; other < size_; ++other) reports[other]->look_after();
    }
    if (!reports[rank]->isCompleted()) absent.push_back(rank);
    if (reports[rank]->isCompleted() && !reports[rank]->isSuccess()) reports[rank]->wait();  // throws why
    if (!absent.empty() && !wait_all_ranks) break;
  }
  at::Tensor answer = at::full({1}, absent.empty() ? 1 : 0, at::kByte);
  for (int rank = 1; rank < size_; ++rank) {
    transfers_->begin(Transfer::Kind::send, answer, rank, answer_tag, group_timeout)->wait();
  }
  TORCH_CHECK(absent.empty() || timeout.count() > 0, "Rank 0 timed out in monitoredBarrier after ", timeout.count(),
              " ms.\nNo ranks successfully processed in monitoredBarrier.");
  TORCH_CHECK(absent.empty(), "[Rank 0]: ", wait_all_ranks ? "Ranks " : "Rank ", join(absent),
              " failed to pass monitoredBarrier in ", timeout.count(), " ms");
}

}  // namespace sluice::c10d_backend
