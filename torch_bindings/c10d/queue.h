// The collectives of one group, run one after the other in the order in which they were submitted.
//
// Who runs them: the caller itself, where it waits anyway; a progress thread, started when the first operation is
// submitted that nobody waits for. A thread that waits for an operation which hasn't begun runs it, and those before
// it, instead of waiting for the progress thread to wake up.
//
// Callbacks of a Future run on the thread that ran the operation, and may block until later operations of the same
// group are done. So while a progress thread runs callbacks another one takes its place if there is something to do.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "c10d/work.h"

namespace sluice::c10d_backend {

class OperationQueue : public std::enable_shared_from_this<OperationQueue> {
 public:
  using OperationPtr = c10::intrusive_ptr<Operation>;

  // Runs it before returning, unless asynchronous.
  void submit(OperationPtr operation, bool asynchronous);

  // Returns when it is done, whether well or not; throws after timeout, unless that is kNoTimeout.
  void wait(Operation &operation, Milliseconds timeout);

  // Returns when all that was submitted is done; from then on nothing is accepted.
  void close();

 private:
  enum class Runner { caller, waiter, progress_thread };  // of a synchronous call, in wait(), nobody who waits

  void run(std::unique_lock<std::mutex> &lock, OperationPtr operation, Runner runner);
  OperationPtr take_first();
  void start_thread();
  static void progress(const std::shared_ptr<OperationQueue> &queue);

  std::mutex mutex_;
  std::condition_variable work_available_;  // for progress threads
  std::condition_variable changed_;         // for those who wait for operations
  std::deque<OperationPtr> waiting_;
  bool busy_ = false;     // an operation is being executed
  int unsettled_ = 0;     // operations that were taken from waiting_ and are not settled yet
  int free_threads_ = 0;  // progress threads that aren't running callbacks
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sluice::c10d_backend
