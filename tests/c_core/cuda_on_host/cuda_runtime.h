// The part of CUDA that Sluice's kernels use, run on the host: each thread of a block is a coroutine, and warp
// intrinsics are meeting points of a warp's 32 coroutines. Blocks run one after the other. It lets the logic of a
// kernel, barriers included, be tested where there is no GPU; it says nothing about speed or about device code as such.
#ifndef SLUICE_TESTS_CUDA_RUNTIME_H
#define SLUICE_TESTS_CUDA_RUNTIME_H

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct FakeStream *;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // set before a coroutine goes on

namespace cuda_on_host {

inline cudaError_t next_error = cudaSuccess;  // what the next launch returns, once
inline bool reverse_order = false;            // run the threads last to first: a missing barrier changes the result
inline cudaStream_t last_stream = nullptr;

class Block {
 public:
  explicit Block(unsigned threads) : threads_(threads), warps_(threads / 32) {
    for (Thread &thread : threads_) prepare(thread);
  }

  // Runs body as one block; the coroutines are used again for the next.
  void run(unsigned index, const std::function<void()> &body) {
    current = this;
    body_ = &body;
    blockIdx.x = index;
    for (Thread &thread : threads_) thread.finished = false;
    for (size_t unfinished = threads_.size(); unfinished > 0;) {
      size_t before = progress_;
      for (size_t i = 0; i < threads_.size(); ++i) {
        running_ = reverse_order ? threads_.size() - 1 - i : i;
        Thread &thread = threads_[running_];
        if (thread.finished) continue;
        threadIdx.x = static_cast<unsigned>(running_);
        resume(thread);
        if (thread.finished) --unfinished;
      }
      if (progress_ == before) throw std::logic_error("the threads of a warp wait for each other forever");
    }
    current = nullptr;
  }

  // Returns when every thread of the caller's warp has come here, with what each of them brought. What it returns is
  // overwritten at the warp's next meeting but one, which starts only when all have read this one.
  template <typename T>
  const uint64_t *meet(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp &warp = warps_[running_ / 32];
    uint64_t *slots = warp.slots[warp.generation % 2];
    std::memcpy(&slots[running_ % 32], &value, sizeof value);
    wait(warp);
    return slots;
  }
  template <typename T>
  T exchange(T value, unsigned source) {
    std::memcpy(&value, &meet(value)[source], sizeof value);
    return value;
  }
  unsigned lane() const { return static_cast<unsigned>(running_ % 32); }

  static inline Block *current = nullptr;

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  struct Thread {
    ucontext_t context;
    jmp_buf jump;
    std::unique_ptr<char[]> stack;
    bool started = false, finished = false;
  };
  struct Warp {
    uint64_t slots[2][32];
    unsigned arrived = 0, generation = 0;
  };

  [[gnu::noinline]] static void prepare(Thread &thread) {
    thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, &Block::start, 0);
  }

  static void start() {
    Block *block = current;
    block->enter_stack(nullptr);
    for (;;) {
      (*block->body_)();
      block->threads_[block->running_].finished = true;
      ++block->progress_;
      block->suspend();
    }
  }

  // A context is for the first entry only: switching by it costs a system call, a long jump does not. Not inlined: no
  // local variable of a caller is to live across the jump.
  [[gnu::noinline]] void resume(Thread &thread) {
    void *mark = nullptr;
    leave_stack(&mark, thread.stack.get(), kStackBytes);
    if (_setjmp(scheduler_) == 0) {
      if (!std::exchange(thread.started, true)) setcontext(&thread.context);
      _longjmp(thread.jump, 1);
    }
    enter_stack(mark);
  }

  [[gnu::noinline]] void suspend() {
    Thread &thread = threads_[running_];
    void *mark = nullptr;
    leave_stack(&mark, scheduler_stack_, scheduler_stack_bytes_);
    if (_setjmp(thread.jump) == 0) _longjmp(scheduler_, 1);
    enter_stack(mark);
  }

  void wait(Warp &warp) {
    unsigned generation = warp.generation;
    ++progress_;
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.generation;
    }
    while (warp.generation == generation) suspend();
  }

  // AddressSanitizer wants to know which stack is in use. A coroutine comes from the scheduler's and learns its bounds.
#if defined(__SANITIZE_ADDRESS__)
  void leave_stack(void **mark, const void *next, size_t bytes) { __sanitizer_start_switch_fiber(mark, next, bytes); }
  void enter_stack(void *mark) {
    const void *from = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(mark, &from, &bytes);
    if (!scheduler_stack_) scheduler_stack_ = from, scheduler_stack_bytes_ = bytes;
  }
#else
  void leave_stack(void **, const void *, size_t) {}
  void enter_stack(void *) {}
#endif

  const std::function<void()> *body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  jmp_buf scheduler_;
  const void *scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0, running_ = 0, progress_ = 0;
};

}  // namespace cuda_on_host

inline void __syncwarp() { cuda_on_host::Block::current->exchange(0, 0); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_host::Block::current->exchange(value, static_cast<unsigned>(source) % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto *block = cuda_on_host::Block::current;
  return block->exchange(value, (block->lane() ^ static_cast<unsigned>(mask)) % 32);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t *all = cuda_on_host::Block::current->meet(uint64_t{vote});
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(all[lane]) << lane;
  return votes;
}

inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline float __fmul_rn(float left, float right) { return left * right; }
inline float __fadd_rn(float left, float right) { return left + right; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
  cuda_on_host::last_stream = config->stream;
  if (auto error = std::exchange(cuda_on_host::next_error, cudaSuccess); error != cudaSuccess) return error;
  gridDim = config->gridDim, blockDim = config->blockDim;
  std::function<void()> body = [&] { kernel(arguments...); };
  static std::map<unsigned, cuda_on_host::Block> blocks;  // by their number of threads
  cuda_on_host::Block &block = blocks.try_emplace(blockDim.x, blockDim.x).first->second;
  for (unsigned index = 0; index < gridDim.x; ++index) block.run(index, body);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char *cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

#endif
