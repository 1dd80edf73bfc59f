// A collective as c10d sees it: what it does, whether it is done, how it failed, and its Future.
#pragma once

#include <ATen/record_function.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <functional>
#include <memory>
#include <vector>

#include "c10d/errors.h"

namespace sluice::c10d_backend {

class OperationQueue;
using Future = c10::ivalue::Future;
using TensorLists = std::vector<std::vector<at::Tensor>>;

// The Future of a Work: made when asked for, which is rarely, and completed with the outputs: a list of tensors, or of
// lists where there are several.
class LazyFuture {
 public:
  c10::intrusive_ptr<Future> get(const TensorLists &outputs);

  // The result is known. Says whether complete() may run callbacks: a Future that is made from now on is born
  // completed.
  bool seal(std::exception_ptr failure);
  void complete(const TensorLists &outputs);

 private:
  void set(Future &future, const TensorLists &outputs) const;

  std::mutex mutex_;
  bool sealed_ = false;
  std::exception_ptr failure_;
  c10::intrusive_ptr<Future> future_, born_completed_;
};

// Tells a profiler, if one was listening when this was made, of the time from begin() to end().
class ProfilerRange {
 public:
  ProfilerRange(const char *title, const std::vector<at::Tensor> &inputs);
  void begin();
  void end();

 private:
  std::function<void()> begin_, end_;
};

class Operation final : public ::c10d::Work {
 public:
  struct Arguments {
    ::c10d::OpType type;
    const char *title;  // for profilers
    std::vector<at::Tensor> inputs;
    TensorLists outputs;
    std::function<void()> body;
  };

  Operation(std::shared_ptr<OperationQueue> queue, uint64_t sequence, Arguments arguments);

  bool wait(Milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<Future> getFuture() override;
  uint64_t getSequencenumber() const override { return sequence_; }

 private:
  friend class OperationQueue;

  // To be called one after the other, without the queue's mutex.
  bool execute();  // does what is to be done; whether settle() may run callbacks
  void settle();   // makes it known that this is done: by the Future, then by wait() and isCompleted()

  std::shared_ptr<OperationQueue> queue_;
  const uint64_t sequence_;
  TensorLists outputs_;
  std::function<void()> body_;
  ProfilerRange profile_;
  std::exception_ptr failure_;
  LazyFuture future_;
  const uint64_t bytes_;   // of the inputs
  bool queued_ = false;    // not begun; guarded by the queue's mutex
  bool launched_ = false;  // by a backward pass, which goes on meanwhile
};

// Several operations that are waited for together.
class OperationGroup final : public ::c10d::Work {
 public:
  explicit OperationGroup(std::vector<c10::intrusive_ptr<::c10d::Work>> works);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  bool wait(Milliseconds timeout = kNoTimeout) override;
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<Future> getFuture() override;

 private:
  std::vector<c10::intrusive_ptr<::c10d::Work>> works_;
};

}  // namespace sluice::c10d_backend
