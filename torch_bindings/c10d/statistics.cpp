// Counters of what a process communicates, and of the time that takes.
#include "c10d/statistics.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <chrono>

namespace sluice::c10d_backend {
namespace {

thread_local bool in_background = false;

uint64_t now_ns() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

}  // namespace

Statistics &Statistics::of_process() {
  static Statistics *const statistics = new Statistics;  // threads may outlive static objects
  return *statistics;
}

void Statistics::set_background_thread(bool is_one) { in_background = is_one; }

void Statistics::advance() {
  uint64_t now = now_ns();
  uint64_t passed = running_ * (now - last_ns_);
  counters_.busy_ns += passed;
  if (waiting_ > 0 || (backward_over_ && launched_ > 0)) counters_.waited_ns += passed;
  last_ns_ = now;
}

void Statistics::begin_collective(bool waited) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  ++running_;
  waiting_ += waited && !in_background;
}

void Statistics::end_collective(bool waited, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  --running_;
  waiting_ -= waited && !in_background;
  ++counters_.collectives;
  counters_.bytes += bytes;
}

void Statistics::count_send(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.sends;
  counters_.sent_bytes += bytes;
}

Counters Statistics::read() {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  return counters_;
}

bool Statistics::launch() {
  int task = torch::autograd::get_current_graph_task_id();
  if (task == -1) return false;
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    advance();
    ++launched_;
    first = task != backward_;
    backward_ = task;
    backward_over_ = false;
  }
  // Runs when the pass has computed everything, before the callback in which DDP waits, since that one is queued later.
  if (first) torch::autograd::Engine::get_default_engine().queue_callback([this, task] { end_backward(task); });
  return true;
}

void Statistics::land() {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  --launched_;
}

void Statistics::end_backward(int task) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  if (task == backward_) backward_over_ = true;
}

Statistics::Waiting::Waiting() : counts_(!in_background) {
  if (!counts_) return;
  Statistics &statistics = of_process();
  std::lock_guard<std::mutex> lock(statistics.mutex_);
  statistics.advance();
  ++statistics.waiting_;
}

Statistics::Waiting::~Waiting() {
  if (!counts_) return;
  Statistics &statistics = of_process();
  std::lock_guard<std::mutex> lock(statistics.mutex_);
  statistics.advance();
  --statistics.waiting_;
}

}  // namespace sluice::c10d_backend
