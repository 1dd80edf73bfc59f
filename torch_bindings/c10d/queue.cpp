// The queue of a group's collectives, and the threads that run it.
#include "c10d/queue.h"

#include <pthread.h>

#include "c10d/statistics.h"

namespace sluice::c10d_backend {
namespace {

// The queue whose callbacks this thread is running.
thread_local const OperationQueue *settling_here = nullptr;

}  // namespace

void OperationQueue::submit(OperationPtr operation, bool asynchronous) {
  std::unique_lock<std::mutex> lock(mutex_);
  TORCH_CHECK(!closed_, "sluice: this process group was shut down, and was asked for another collective");
  if (!asynchronous && !busy_ && waiting_.empty()) {
    busy_ = true, ++unsettled_;
    run(lock, std::move(operation), Runner::caller);
    return;
  }
  operation->queued_ = true;
  if (asynchronous) operation->launched_ = Statistics::of_process().launch();
  waiting_.push_back(operation);
  if (!asynchronous) {
    lock.unlock();
    wait(*operation, kNoTimeout);
  } else if (free_threads_ == 0) {
    start_thread();
  } else {
    work_available_.notify_one();
  }
}

void OperationQueue::wait(Operation &operation, Milliseconds timeout) {
  if (operation.isCompleted()) return;
  Statistics::Waiting waiting;
  auto deadline = std::chrono::steady_clock::now() + timeout;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!operation.isCompleted()) {
    if (timeout != kNoTimeout) {
      bool late = changed_.wait_until(lock, deadline) == std::cv_status::timeout;
      if (late && !operation.isCompleted()) {
        C10_THROW_ERROR(DistBackendError, c10::str("sluice: Timed out waiting ", timeout.count(),
                                                   "ms for an operation that is still in progress"));
      }
    } else if (operation.queued_ && !busy_) {
      run(lock, take_first(), Runner::waiter);
    } else {
      changed_.wait(lock);
    }
  }
}

OperationQueue::OperationPtr OperationQueue::take_first() {
  OperationPtr first = std::move(waiting_.front());
  waiting_.pop_front();
  first->queued_ = false;
  busy_ = true, ++unsettled_;
  return first;
}

// The lock is held before and after, and busy_ is set.
void OperationQueue::run(std::unique_lock<std::mutex> &lock, OperationPtr operation, Runner runner) {
  lock.unlock();
  Statistics &statistics = Statistics::of_process();
  statistics.begin_collective(runner == Runner::caller);
  bool runs_callbacks = operation->execute();
  statistics.end_collective(runner == Runner::caller, operation->bytes_);
  if (operation->launched_) statistics.land();
  bool leaves = runs_callbacks && runner == Runner::progress_thread;
  if (!runs_callbacks) {  // in order: whoever sees that a later one is complete will see that of this one
    operation->settle();
    operation.reset();
  }
  lock.lock();
  busy_ = false;
  free_threads_ -= leaves;
  if (!waiting_.empty()) {
    if (free_threads_ == 0 && leaves) start_thread();
    work_available_.notify_one();
    changed_.notify_all();
  }
  if (runs_callbacks) {  // which may call further collectives
    lock.unlock();
    const OperationQueue *outer = settling_here;
    settling_here = this;
    operation->settle();
    operation.reset();
    settling_here = outer;
    lock.lock();
  }
  free_threads_ += leaves;
  --unsettled_;
  changed_.notify_all();
}

void OperationQueue::close() {
  std::unique_lock<std::mutex> lock(mutex_);
  int own = settling_here == this;  // called by a callback
  while (!waiting_.empty() || unsettled_ > own) {
    if (!waiting_.empty() && !busy_) {
      run(lock, take_first(), Runner::waiter);
    } else {
      changed_.wait(lock);
    }
  }
  closed_ = true;
  std::vector<std::thread> threads = std::move(threads_);
  threads_.clear();
  lock.unlock();
  work_available_.notify_all();
  for (std::thread &thread : threads) {
    if (thread.get_id() == std::this_thread::get_id()) {
      thread.detach();  // in a callback, as above
    } else {
      thread.join();
    }
  }
}

void OperationQueue::start_thread() {
  threads_.emplace_back(progress, shared_from_this());
  ++free_threads_;
}

void OperationQueue::progress(const std::shared_ptr<OperationQueue> &queue) {
  pthread_setname_np(pthread_self(), "sluice_progress");
  std::unique_lock<std::mutex> lock(queue->mutex_);
  while (!queue->closed_) {
    if (!queue->busy_ && !queue->waiting_.empty()) {
      queue->run(lock, queue->take_first(), Runner::progress_thread);
    } else {
      queue->work_available_.wait(lock);
    }
  }
}

}  // namespace sluice::c10d_backend
