// A process group's life: made by all its ranks together, set up, aborted, shut down; and who takes a call.
#include "c10d/backend.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>

#include "c10d/hierarchical.h"

namespace sluice::c10d_backend {
namespace {

c10::intrusive_ptr<::c10d::Backend::Options> make_options(const ProcessGroupSluice::Arguments &arguments) {
  auto options = c10::make_intrusive<::c10d::Backend::Options>("sluice", arguments.timeout);
  options->group_name = arguments.group_name;
  options->global_ranks_in_group.assign(arguments.global_ranks.begin(), arguments.global_ranks.end());
  return options;
}

Member member_of(const ProcessGroupSluice::Arguments &arguments) {
  return {arguments.rank, arguments.size, {arguments.global_ranks.begin(), arguments.global_ranks.end()}};
}

}  // namespace

ProcessGroupSluice::ProcessGroupSluice(Arguments arguments)
    : Backend(arguments.rank, arguments.size),
      store_(begin_generation(arguments.store, member_of(arguments))),
      options_(make_options(arguments)),
      timeout_ms_(arguments.timeout.count()),
      make_backend_(arguments.make_backend),
      hosts_(find_hosts(*store_, member_of(arguments), arguments.timeout)),
      one_host_(hosts_.ranks.size() == 1 ? std::make_shared<OneHost>(hosts_.communicator, rank_) : nullptr),
      fabric_(one_host_ ? one_host_ : make_several_hosts()),
      queue_(std::make_shared<OperationQueue>()),
      transfers_(std::make_shared<Transfers>(hosts_.communicator)) {
  init();
}

std::shared_ptr<Fabric> ProcessGroupSluice::make_several_hosts() {
  auto store = c10::make_intrusive<::c10d::PrefixStore>("leaders", store_);
  auto connect = [make = make_backend_, store, host = hosts_.host, count = static_cast<int>(hosts_.ranks.size()),
                  timeout = options_->timeout] { return make("gloo", store, host, count, timeout); };
  return std::make_shared<SeveralHosts>(hosts_, rank_, size_, connect);
}

ProcessGroupSluice::~ProcessGroupSluice() {
  try {
    shutdown();
  } catch (const std::exception &error) {
    TORCH_WARN("sluice: while a process group was destroyed: ", error.what());
  }
}

void ProcessGroupSluice::shutdown() {
  if (!hosts_.communicator->belongs_to_this_process()) return;  // a forked child has none of the threads
  std::map<std::string, BackendPtr> others;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(shut_down_, true)) return;
    others = std::move(others_);
  }
  queue_->close();
  transfers_->close();
  for (auto &[kind, backend] : others) backend->shutdown();
}

void ProcessGroupSluice::abort() {
  std::string reason = c10::str("the process group '", getGroupUid(), "' was aborted on this rank");
  sl_comm_abort(comm(), reason.c_str());
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &[kind, backend] : others_) backend->abort();
}

::c10d::ErrorType ProcessGroupSluice::getError() {
  switch (sl_comm_state(comm())) {
    case SL_OK: return ::c10d::ErrorType::SUCCESS;
    case SL_TIMEOUT: return ::c10d::ErrorType::TIMEOUT;
    case SL_PEER_LOST: return ::c10d::ErrorType::REMOTE_ERROR;
    default: return ::c10d::ErrorType::COMM_ERROR;
  }
}

// A new group like any other, since groups share nothing. supportsSplitting() stays false: c10d takes it for a promise
// to split faster than to create, which asks more of a backend than this function.
BackendPtr ProcessGroupSluice::split(const StorePtr &store, const std::vector<int> &ranks,
                                     const c10::intrusive_ptr<Options> &options) {
  auto place = std::find(ranks.begin(), ranks.end(), rank_);
  if (place == ranks.end()) return nullptr;
  const std::vector<uint64_t> &names = options_->global_ranks_in_group;
  std::vector<int64_t> global_ranks;
  for (int rank : ranks) global_ranks.push_back(names.empty() ? rank : static_cast<int64_t>(names[rank]));
  return c10::make_intrusive<ProcessGroupSluice>(Arguments{store, static_cast<int>(place - ranks.begin()),
                                                           static_cast<int>(ranks.size()), options->timeout,
                                                           options->group_name, global_ranks, make_backend_});
}

void ProcessGroupSluice::setTimeout(Milliseconds timeout) {
  timeout_ms_ = timeout.count();
  options_->timeout = timeout;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto &[kind, backend] : others_) backend->setTimeout(timeout);
}

Milliseconds ProcessGroupSluice::timeout_or_default(Milliseconds timeout) const {
  return timeout == ::c10d::kUnsetTimeout ? Milliseconds(timeout_ms_) : timeout;
}

::c10d::Backend *ProcessGroupSluice::other_backend(const at::Tensor &like, bool hierarchical) {
  if (!like.defined() || like.is_cpu()) {
    bool sparse = like.defined() && like.layout() != at::kStrided;
    return one_host_ || (hierarchical && !sparse) ? nullptr : backend_of_kind("gloo");
  }
  TORCH_CHECK(like.is_cuda(), "sluice: a collective was called with a tensor on ", like.device(),
              ", expected cpu or cuda");
  return backend_of_kind("nccl");
}

::c10d::Backend *ProcessGroupSluice::other_backend(const Tensors &tensors, bool hierarchical) {
  return other_backend(tensors.empty() ? at::Tensor() : tensors[0], hierarchical);
}

::c10d::Backend *ProcessGroupSluice::backend_of_kind(const std::string &kind) {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!shut_down_, "sluice: this process group was shut down, and was asked for another collective");
  BackendPtr &backend = others_[kind];
  if (!backend) {
    auto store = c10::make_intrusive<::c10d::PrefixStore>(kind, store_);
    backend = make_backend_(kind, store, rank_, size_, Milliseconds(timeout_ms_));
    if (coalesced_ && backend->supportsCoalescing()) backend->startCoalescing();
  }
  return backend.get();
}

WorkPtr ProcessGroupSluice::launch(Operation::Arguments arguments, bool asynchronous) {
  auto operation = c10::make_intrusive<Operation>(queue_, sequence_++, std::move(arguments));
  queue_->submit(operation, asynchronous);
  return remember(operation);
}

WorkPtr ProcessGroupSluice::remember(WorkPtr work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (coalesced_) coalesced_->push_back(work);
  return work;
}

// A backend that coalesces says at the end what there is to wait for; for one that doesn't, this one does.
WorkPtr ProcessGroupSluice::delegate(const ::c10d::Backend &other, WorkPtr work) {
  return other.supportsCoalescing() ? work : remember(work);
}

// Calls in between begin as they come; what is gained is one object to wait for.
void ProcessGroupSluice::startCoalescing() {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!coalesced_, "sluice: startCoalescing() twice, expected endCoalescing() in between");
  coalesced_.emplace();
  for (auto &[kind, backend] : others_) {
    if (backend->supportsCoalescing()) backend->startCoalescing();
  }
}

WorkPtr ProcessGroupSluice::endCoalescing() {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(coalesced_, "sluice: endCoalescing() without startCoalescing()");
  std::vector<WorkPtr> works = std::move(*coalesced_);
  coalesced_.reset();
  for (auto &[kind, backend] : others_) {
    if (!backend->supportsCoalescing()) continue;
    if (WorkPtr work = backend->endCoalescing()) works.push_back(std::move(work));
  }
  return c10::make_intrusive<OperationGroup>(std::move(works));
}

}  // namespace sluice::c10d_backend
