// Work objects of collectives.
#include "c10d/work.h"

#include <ATen/ThreadLocalState.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include "c10d/queue.h"

namespace sluice::c10d_backend {

c10::intrusive_ptr<Future> LazyFuture::get(const TensorLists &outputs) {
  std::lock_guard<std::mutex> lock(mutex_);
  c10::intrusive_ptr<Future> &future = sealed_ && !future_ ? born_completed_ : future_;
  if (future) return future;
  c10::TypePtr list = c10::ListType::create(c10::TensorType::get());
  future = c10::make_intrusive<Future>(outputs.size() > 1 ? c10::ListType::create(list) : list);
  if (sealed_) set(*future, outputs);
  return future;
}

bool LazyFuture::seal(std::exception_ptr failure) {
  std::lock_guard<std::mutex> lock(mutex_);
  sealed_ = true;
  failure_ = std::move(failure);
  return future_.defined();
}

void LazyFuture::complete(const TensorLists &outputs) {
  if (future_) set(*future_, outputs);
}

void LazyFuture::set(Future &future, const TensorLists &outputs) const {
  if (failure_) {
    future.setError(failure_);
  } else if (outputs.size() > 1) {
    future.markCompleted(c10::IValue(outputs));
  } else {
    future.markCompleted(c10::IValue(outputs.empty() ? std::vector<at::Tensor>() : outputs[0]));
  }
}

ProfilerRange::ProfilerRange(const char *title, const std::vector<at::Tensor> &inputs) {
  if (!at::hasCallbacks()) return;
  auto range = std::make_shared<at::RecordFunction>(at::RecordScope::USER_SCOPE);
  if (!range->isActive()) return;
  // It may begin and end on other threads than this one, which the profiler has to know.
  begin_ = at::wrapPropagateTLSState([range, title, inputs] {
    range->_setAsync();
    std::vector<c10::IValue> values(inputs.begin(), inputs.end());
    range->before(title, c10::ArrayRef<const c10::IValue>(values.data(), values.size()));
  });
  end_ = at::wrapPropagateTLSState([range] { range->end(); });
}

void ProfilerRange::begin() {
  if (begin_) begin_();
}

void ProfilerRange::end() {
  if (end_) end_();
}

namespace {

uint64_t count_bytes(const std::vector<at::Tensor> &tensors) {
  uint64_t bytes = 0;
  for (const at::Tensor &tensor : tensors) bytes += tensor.layout() == at::kStrided ? tensor.nbytes() : 0;
  return bytes;
}

}  // namespace

Operation::Operation(std::shared_ptr<OperationQueue> queue, uint64_t sequence, Arguments arguments)
    : Work(-1, arguments.type),
      queue_(std::move(queue)),
      sequence_(sequence),
      outputs_(std::move(arguments.outputs)),
      body_(std::move(arguments.body)),
      profile_(arguments.title, arguments.inputs),
      bytes_(count_bytes(arguments.inputs)) {}

bool Operation::execute() {
  profile_.begin();
  try {
    // Results are written whatever autograd or inference mode the tensors come from, as if by the hardware.
    at::AutoDispatchBelowADInplaceOrView guard;
    body_();
  } catch (...) {
    failure_ = std::current_exception();
  }
  body_ = nullptr;
  profile_.end();
  return future_.seal(failure_);
}

void Operation::settle() {
  future_.complete(outputs_);
  finish(failure_);
}

bool Operation::wait(Milliseconds timeout) {
  queue_->wait(*this, timeout);
  if (std::exception_ptr failure = exception()) std::rethrow_exception(failure);
  return true;
}

std::vector<at::Tensor> Operation::result() {
  TORCH_CHECK(isCompleted(), "sluice: result() of an operation in progress, expected wait() before it");
  TORCH_CHECK(outputs_.size() <= 1, "sluice: result() of an operation with ", outputs_.size(),
              " lists of outputs, expected one; get_future().value() has them all");
  return outputs_.empty() ? std::vector<at::Tensor>() : outputs_[0];
}

c10::intrusive_ptr<Future> Operation::getFuture() { return future_.get(outputs_); }

OperationGroup::OperationGroup(std::vector<c10::intrusive_ptr<Work>> works)
    : Work(-1, ::c10d::OpType::COALESCED), works_(std::move(works)) {}

bool OperationGroup::isCompleted() {
  for (auto &work : works_) {
    if (!work->isCompleted()) return false;
  }
  return true;
}

bool OperationGroup::isSuccess() const {
  for (auto &work : works_) {
    if (!work->isSuccess()) return false;
  }
  return true;
}

std::exception_ptr OperationGroup::exception() const {
  for (auto &work : works_) {
    if (std::exception_ptr failure = work->exception()) return failure;
  }
  return nullptr;
}

bool OperationGroup::wait(Milliseconds timeout) {
  bool done = true;
  for (auto &work : works_) done = work->wait(timeout) && done;
  return done;
}

std::vector<at::Tensor> OperationGroup::result() {
  std::vector<at::Tensor> all;
  for (auto &work : works_) {
    for (at::Tensor &tensor : work->result()) all.push_back(std::move(tensor));
  }
  return all;
}

c10::intrusive_ptr<Future> OperationGroup::getFuture() {
  c10::List<c10::intrusive_ptr<Future>> futures(c10::FutureType::create(c10::AnyType::get()));
  for (auto &work : works_) futures.push_back(work->getFuture());
  return c10::collectAll(futures);
}

}  // namespace sluice::c10d_backend
