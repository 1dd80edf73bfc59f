// The runtime: tiers and their cap, the executor, the arena, status and error text.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <sluice/sluice.h>

#include "support.h"

extern "C" {
#include "runtime/arena.h"
#include "runtime/executor.h"
#include "runtime/status.h"
}

using sluice_test::ThreadExecutor;

TEST(Cpu, EveryTierNameParsesBackToItself) {
  for (int i = SL_ISA_SCALAR; i <= SL_ISA_AVX512BF16; ++i) {
    sl_isa parsed;
    ASSERT_EQ(sl_isa_parse(sl_isa_name(static_cast<sl_isa>(i)), &parsed), SL_OK);
    EXPECT_EQ(parsed, i);
  }
  EXPECT_STREQ(sl_isa_name(static_cast<sl_isa>(99)), "unknown isa");
}

TEST(Cpu, ErrorsListEveryTier) {
  std::string list = sl_isa_name(SL_ISA_SCALAR);
  for (int i = 1; sl_isa_name(static_cast<sl_isa>(i)) != std::string("unknown isa"); ++i) {
    list += std::string(", ") + sl_isa_name(static_cast<sl_isa>(i));
  }
  sl_isa parsed;
  EXPECT_EQ(sl_isa_parse("none", &parsed), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_last_error(), "isa is 'none', expected one of " + list);
}

TEST(Cpu, AnUnknownTierIsNamedInTheError) {
  sl_isa parsed;
  for (const char *name : {"", "AVX2", "avx2 ", "sse"}) {
    EXPECT_EQ(sl_isa_parse(name, &parsed), SL_INVALID_ARGUMENT);
    EXPECT_NE(std::string(sl_last_error()).find("isa is '" + std::string(name) + "', expected one of scalar, avx2"),
              std::string::npos)
        << sl_last_error();
  }
  EXPECT_EQ(sl_isa_parse(nullptr, &parsed), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_isa_parse("avx2", nullptr), SL_INVALID_ARGUMENT);
}

TEST(Cpu, TheCapLowersButNeverRaises) {
  for (int i = SL_ISA_SCALAR; i <= SL_ISA_AVX512BF16; ++i) {
    ASSERT_EQ(sl_cpu_cap(static_cast<sl_isa>(i)), SL_OK);
    EXPECT_EQ(sl_cpu_isa(), std::min<int>(i, sl_cpu_detect()));
  }
  EXPECT_EQ(sl_cpu_cap(static_cast<sl_isa>(5)), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "isa is 5, expected 0 to 4");
  sl_cpu_cap(sl_cpu_detect());
}

TEST(Cpu, AMisspeltEnvironmentVariableIsReported) {
  const char *before = getenv("SLUICE_ISA");
  std::string saved = before ? before : "";
  setenv("SLUICE_ISA", "avx1024", 1);
  ASSERT_NE(sl_cpu_cap_problem(), nullptr);
  EXPECT_NE(std::string(sl_cpu_cap_problem()).find("SLUICE_ISA is 'avx1024', expected one of scalar"),
            std::string::npos);
  setenv("SLUICE_ISA", "scalar", 1);
  EXPECT_EQ(sl_cpu_cap_problem(), nullptr);
  if (before) {
    setenv("SLUICE_ISA", saved.c_str(), 1);
  } else {
    unsetenv("SLUICE_ISA");
  }
}

namespace {

struct Visits {
  std::vector<std::atomic<int>> tasks, busy;
  std::atomic<bool> worker_shared{false}, worker_wrong{false};
  Visits(int64_t count, int64_t workers) : tasks(static_cast<size_t>(count)), busy(static_cast<size_t>(workers)) {}
};

void visit(void *context, int64_t worker, int64_t task) {
  Visits *visits = static_cast<Visits *>(context);
  if (worker < 0 || worker >= static_cast<int64_t>(visits->busy.size())) {
    visits->worker_wrong = true;
    return;
  }
  std::atomic<int> &busy = visits->busy[static_cast<size_t>(worker)];
  if (busy.fetch_add(1) != 0) visits->worker_shared = true;
  visits->tasks[static_cast<size_t>(task)].fetch_add(1);
  busy.fetch_sub(1);
}

void expect_every_task_once(const sl_executor *executor, int64_t count) {
  Visits visits(count, sl_executor_workers(executor));
  sl_run_tasks(executor, count, visit, &visits);
  for (auto &times : visits.tasks) ASSERT_EQ(times.load(), 1);
  EXPECT_FALSE(visits.worker_shared);
  EXPECT_FALSE(visits.worker_wrong);
}

}  // namespace

TEST(Executor, EveryTaskRunsOnceOnAWorkerOfItsOwn) {
  for (int64_t count : {0, 1, 2, 7, 1000}) {
    expect_every_task_once(nullptr, count);
    expect_every_task_once(sl_serial_executor(), count);
    for (int threads : {1, 2, 3, 8}) {
      ThreadExecutor executor(threads);
      expect_every_task_once(executor.get(), count);
    }
  }
}

// Stages: each adds to what it finds of the ones before, so a task that begins early is seen.
struct StageLog {
  std::vector<std::atomic<int>> ended = std::vector<std::atomic<int>>(SL_MOST_STAGES);
  std::vector<int> afters;  // written by whoever ends a stage, while all others wait
  std::atomic<int> early{0};
};

struct StageContext {
  StageLog *log;
  int stage;
  int64_t count, before;  // tasks of this stage, and of the stages before it
};

void run_stage_task(void *context, int64_t, int64_t) {
  auto *stage = static_cast<StageContext *>(context);
  int64_t before = 0;
  for (int i = 0; i < stage->stage; ++i) before += stage->log->ended[static_cast<size_t>(i)];
  if (before != stage->before) ++stage->log->early;
  ++stage->log->ended[static_cast<size_t>(stage->stage)];
}

void end_stage(void *context) {
  auto *stage = static_cast<StageContext *>(context);
  if (stage->log->ended[static_cast<size_t>(stage->stage)] != stage->count) ++stage->log->early;
  stage->log->afters.push_back(stage->stage);
}

void expect_stages_in_order(const sl_executor *executor, const std::vector<int64_t> &counts) {
  StageLog log;
  std::vector<StageContext> contexts;
  std::vector<int> expected;
  int64_t before = 0;
  for (int64_t count : counts) {
    if (count > 0) expected.push_back(static_cast<int>(contexts.size()));
    contexts.push_back({&log, static_cast<int>(contexts.size()), count, before});
    before += count;
  }
  std::vector<sl_stage> stages;
  for (auto &context : contexts) stages.push_back({context.count, run_stage_task, end_stage, &context});
  sl_run_stages(executor, stages.data(), static_cast<int>(stages.size()));
  EXPECT_EQ(log.early, 0);
  EXPECT_EQ(log.afters, expected);
  for (const auto &context : contexts) EXPECT_EQ(log.ended[static_cast<size_t>(context.stage)], context.count);
}

// Runs the workers one after the other, last first: none may wait for one that has not begun.
void run_backwards(void *, int64_t count, sl_range_function function, void *context) {
  for (int64_t i = count; i-- > 0;) function(context, i, i + 1);
}

TEST(Executor, AStageBeginsWhenTheOneBeforeHasEnded) {
  const sl_executor backwards = {run_backwards, nullptr, 3};
  for (const auto &counts : std::vector<std::vector<int64_t>>{{1}, {5, 3}, {1, 100, 2, 7}, {0, 4, 0, 2}, {3, 0}}) {
    expect_stages_in_order(nullptr, counts);
    expect_stages_in_order(&backwards, counts);
    for (int threads : {1, 2, 5}) {
      for (int turn = 0; turn < 20; ++turn) {
        ThreadExecutor executor(threads);
        expect_stages_in_order(executor.get(), counts);
      }
    }
  }
}

// Rounds: every task knows how many must have ended before it, and how many may at most have.
struct RoundStage {
  std::atomic<int64_t> *ended;
  std::atomic<int> *wrong;
  std::vector<std::atomic<int>> *runs;
  int64_t count, before, round_tasks;
};

void run_round_task(void *context, int64_t, int64_t task) {
  auto *stage = static_cast<RoundStage *>(context);
  int64_t first = task / stage->count * stage->round_tasks + stage->before, ended = *stage->ended;
  if (ended < first || ended >= first + stage->count) ++*stage->wrong;
  for (int turn = 0; turn < 20; ++turn) std::this_thread::yield();  // others go on meanwhile, if they may
  ++(*stage->runs)[static_cast<size_t>(first + task % stage->count)];
  ++*stage->ended;
}

TEST(Executor, RoundsOfStagesRunInOrder) {
  const sl_executor backwards = {run_backwards, nullptr, 3};
  ThreadExecutor two(2), eight(8);
  for (const sl_executor *executor : {sl_serial_executor(), two.get(), eight.get(), &backwards}) {
    for (const auto &counts : std::vector<std::vector<int64_t>>{{1}, {5, 3}, {1, 40, 2, 7, 1}, {0, 4, 0, 2}, {0}, {}}) {
      for (int64_t rounds : {0, 1, 30}) {
        std::atomic<int64_t> ended{0};
        std::atomic<int> wrong{0};
        std::vector<RoundStage> contexts;
        int64_t total = 0;
        for (int64_t count : counts) total += count;
        std::vector<std::atomic<int>> runs(static_cast<size_t>(total * rounds));
        int64_t before = 0;
        for (int64_t count : counts) {
          contexts.push_back({&ended, &wrong, &runs, count, before, total});
          before += count;
        }
        std::vector<sl_stage> stages;
        for (auto &context : contexts) stages.push_back({context.count, run_round_task, nullptr, &context});
        sl_run_rounds(executor, stages.data(), static_cast<int>(stages.size()), rounds);
        EXPECT_EQ(wrong, 0);
        EXPECT_EQ(ended, total * rounds);
        for (const auto &count : runs) ASSERT_EQ(count, 1);
      }
    }
  }
}

TEST(Executor, StagesWithoutTasksRunNothing) {
  for (const auto &counts : std::vector<std::vector<int64_t>>{{}, {0}, {0, 0}}) {
    ThreadExecutor executor(2);
    expect_stages_in_order(executor.get(), counts);
  }
}

TEST(Executor, NothingRunsForACountBelowOne) {
  Visits visits(1, 1);
  sl_run_tasks(nullptr, -3, visit, &visits);
  sl_serial_executor()->parallel_for(nullptr, -3, [](void *, int64_t, int64_t) { FAIL(); }, nullptr);
  EXPECT_EQ(visits.tasks[0].load(), 0);
}

TEST(Arena, PiecesAreAlignedDisjointAndInside) {
  alignas(64) char memory[1024];
  sl_arena arena = sl_arena_make(memory, sizeof memory);
  char *first = static_cast<char *>(sl_arena_take(&arena, 3, 7));
  char *second = static_cast<char *>(sl_arena_take(&arena, 100, 1));
  char *nothing = static_cast<char *>(sl_arena_take(&arena, 0, 8));
  char *third = static_cast<char *>(sl_arena_take(&arena, 1, 1));
  EXPECT_EQ(first, memory);
  EXPECT_EQ(second, memory + 64);
  EXPECT_EQ(nothing, memory + 192);
  EXPECT_EQ(third, memory + 192);
  EXPECT_EQ(arena.used, 256u);
}

TEST(Arena, MeasuringAsksForWhatTakingUses) {
  sl_arena measured = sl_arena_make(nullptr, 0);
  EXPECT_EQ(sl_arena_take(&measured, 33, 4), nullptr);
  EXPECT_EQ(sl_arena_take(&measured, 1, 1), nullptr);
  EXPECT_EQ(measured.used, 256u);
  EXPECT_FALSE(measured.overflow);
}

TEST(Arena, WhatDoesNotFitIsNullAndSaysHowMuchWasWanted) {
  alignas(64) char memory[128];
  sl_arena arena = sl_arena_make(memory, sizeof memory);
  EXPECT_NE(sl_arena_take(&arena, 128, 1), nullptr);
  EXPECT_EQ(sl_arena_take(&arena, 1, 1), nullptr);
  EXPECT_EQ(arena.used, 192u);
  EXPECT_FALSE(arena.overflow);
}

TEST(Arena, ATotalBeyondSizeIsFlagged) {
  sl_arena product = sl_arena_make(nullptr, 0);
  EXPECT_EQ(sl_arena_take(&product, INT64_MAX, 8), nullptr);
  EXPECT_TRUE(product.overflow);
  sl_arena padded = sl_arena_make(nullptr, 0);
  EXPECT_EQ(sl_arena_take(&padded, -1, 1), nullptr);
  EXPECT_TRUE(padded.overflow);
  sl_arena sum = sl_arena_make(nullptr, 0);
  for (int i = 0; i < 3; ++i) sl_arena_take(&sum, INT64_MAX, 1);
  EXPECT_TRUE(sum.overflow);
}

TEST(Cuda, ABuildSaysWhetherItHasCudaKernels) { EXPECT_EQ(sl_cuda_built(), SLUICE_BUILD_CUDA == 1); }

TEST(Cuda, ABuildWithoutItSaysWhatToDo) {
  if (sl_cuda_built()) GTEST_SKIP() << "this build has CUDA kernels";
  size_t bytes = 0;
  const std::function<sl_status()> calls[] = {
      [] { return sl_gated_attention_cuda(nullptr, nullptr); },
      [&] { return sl_gated_attention_backward_cuda_workspace_size(nullptr, &bytes); },
      [] { return sl_gated_attention_backward_cuda(nullptr, nullptr); },
      [&] { return sl_accumulate_cuda_workspace_size(1, &bytes); },
      [] { return sl_accumulate_cuda(nullptr, nullptr); },
      [] { return sl_measure_gradient_cuda(nullptr, nullptr); },
      [] { return sl_read_accumulator_cuda(nullptr, nullptr); },
  };
  for (const auto &call : calls) {
    sl_fail(SL_INTERNAL, "an older text");
    EXPECT_EQ(call(), SL_UNSUPPORTED);
    EXPECT_STREQ(sl_last_error(), "this build of Sluice has no CUDA kernels, expected one with SLUICE_BUILD_CUDA=ON");
  }
}

TEST(Status, EveryCodeHasAName) {
  EXPECT_STREQ(sl_status_name(SL_OK), "ok");
  EXPECT_STREQ(sl_status_name(SL_INVALID_ARGUMENT), "invalid argument");
  EXPECT_STREQ(sl_status_name(SL_OUT_OF_RANGE), "out of range");
  EXPECT_STREQ(sl_status_name(SL_OUT_OF_MEMORY), "out of memory");
  EXPECT_STREQ(sl_status_name(SL_UNSUPPORTED), "unsupported");
  EXPECT_STREQ(sl_status_name(SL_INTERNAL), "internal error");
  EXPECT_STREQ(sl_status_name(SL_PEER_LOST), "peer lost");
  EXPECT_STREQ(sl_status_name(SL_TIMEOUT), "timeout");
  EXPECT_STREQ(sl_status_name(SL_MISMATCH), "mismatch");
  EXPECT_STREQ(sl_status_name(static_cast<sl_status>(77)), "unknown status");
}

TEST(Status, ErrorTextBelongsToItsThread) {
  sl_fail(SL_INTERNAL, "the text of %s", "this thread");
  std::string at_start, after;
  std::thread other([&] {
    at_start = sl_last_error();
    sl_fail(SL_INTERNAL, "another text");
    after = sl_last_error();
  });
  other.join();
  EXPECT_EQ(at_start, "");
  EXPECT_EQ(after, "another text");
  EXPECT_STREQ(sl_last_error(), "the text of this thread");
}

TEST(Status, ALongTextIsCutNotOverrun) {
  std::string text(5000, 'x');
  EXPECT_EQ(sl_fail(SL_UNSUPPORTED, "%s", text.c_str()), SL_UNSUPPORTED);
  std::string kept = sl_last_error();
  EXPECT_GT(kept.size(), 100u);
  EXPECT_EQ(kept, text.substr(0, kept.size()));
}

TEST(Types, SizesAndNames) {
  const struct {
    sl_dtype dtype;
    int value;  // of the ABI
    size_t size;
    const char *name;
  } expected[] = {
      {SL_F32, 0, 4, "float32"}, {SL_BF16, 1, 2, "bfloat16"}, {SL_F16, 2, 2, "float16"}, {SL_F64, 3, 8, "float64"},
      {SL_I8, 4, 1, "int8"},     {SL_U8, 5, 1, "uint8"},      {SL_I16, 6, 2, "int16"},   {SL_I32, 7, 4, "int32"},
      {SL_I64, 8, 8, "int64"},   {SL_BOOL, 9, 1, "bool"},
  };
  for (const auto &type : expected) {
    EXPECT_EQ(static_cast<int>(type.dtype), type.value);
    EXPECT_EQ(sl_dtype_size(type.dtype), type.size) << type.name;
    EXPECT_STREQ(sl_dtype_name(type.dtype), type.name);
  }
  EXPECT_EQ(sl_dtype_size(static_cast<sl_dtype>(10)), 0u);
  EXPECT_STREQ(sl_dtype_name(static_cast<sl_dtype>(10)), "unknown dtype");
}
