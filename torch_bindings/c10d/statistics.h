// What this process has communicated so far, and for how much of that time its computation stood still: counters over
// all groups, always on. A collective costs four readings of the clock at most.
//
// At any moment some collectives are running, r of them, and the computation is being held up or not. Over time,
//   busy_ns   = integral of r dt                     waiting for other ranks is part of a collective
//   waited_ns = integral of r dt while held up
// so that 1 - waited_ns / busy_ns is the share of communication that computation went on beside. It is held up
//   - while a thread is in a call that ends when a collective does: a synchronous one, or wait();
//   - from the end of a backward pass's computation on, as long as collectives that were launched during it are left.
//     Who launches them there, as DDP does, waits for them next, in ways that can't be seen from here.
// A background thread, which exists to call collectives, holds up nobody by waiting.
#pragma once

#include <cstdint>
#include <mutex>

namespace sluice::c10d_backend {

struct Counters {
  uint64_t collectives = 0, bytes = 0;  // of the tensors that this rank gave
  uint64_t busy_ns = 0, waited_ns = 0;
  uint64_t sends = 0, sent_bytes = 0;  // point to point
};

class Statistics {
 public:
  static Statistics &of_process();
  static void set_background_thread(bool is_one);  // the calling thread

  void begin_collective(bool waited);
  void end_collective(bool waited, uint64_t bytes);
  void count_send(uint64_t bytes);
  Counters read();

  // A collective, or a row of them on a background thread, that nobody has waited for yet. Says whether it was launched
  // by a backward pass; only then its end is to be told.
  bool launch();
  void land();

  // While it exists, the calling thread waits.
  class Waiting {
   public:
    Waiting();
    ~Waiting();
    Waiting(const Waiting &) = delete;
    Waiting &operator=(const Waiting &) = delete;

   private:
    const bool counts_;
  };

 private:
  void advance();  // to the present moment; mutex_ is held
  void end_backward(int task);

  std::mutex mutex_;
  Counters counters_;
  uint64_t last_ns_ = 0;
  unsigned running_ = 0, waiting_ = 0;
  unsigned launched_ = 0;      // by backward passes, and not landed
  int backward_ = -1;          // autograd's number of the backward pass that launched last
  bool backward_over_ = true;  // its computation has ended
};

}  // namespace sluice::c10d_backend
