// The forward of gated attention, every tier this machine has, against the formula in double: random problems, the
// corners of the control flow, NaN and infinity in every operand, any number of threads to the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "support.h"

extern "C" {
#include "attention/chunk.h"
#include "attention/kernel.h"
}

using namespace sluice_test;

namespace {

const double kInfinity = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<sl_isa> tiers() {
  std::vector<sl_isa> all;
  for (int isa = SL_ISA_SCALAR; isa <= sl_cpu_detect(); ++isa) all.push_back(static_cast<sl_isa>(isa));
  return all;
}

// Root mean square error that a dtype may have, relative to the results: rounding of out, and of the weights where a
// tier multiplies them in bfloat16.
double rms_limit(sl_dtype dtype) { return dtype == SL_F32 ? 4e-6 : dtype == SL_F16 ? 4e-4 : 4e-3; }

struct Wanted {
  std::vector<double> out, lse, kept;
};

Wanted compute_wanted(AttentionProblem &problem) {
  problem.clear_results();
  sl_gated_attention_args args = problem.args();
  EXPECT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  return {problem.out.values(), problem.lse.values(), problem.kept.values()};
}

void expect_close(AttentionProblem &problem, const Wanted &wanted, const sl_executor *executor = nullptr) {
  problem.clear_results();
  ASSERT_EQ(problem.run_forward(executor), SL_OK) << sl_last_error();
  EXPECT_EQ(problem.damage(), "");
  Distance out = measure_distance(problem.out.values(), wanted.out);
  Distance lse = measure_distance(problem.lse.values(), wanted.lse);
  EXPECT_TRUE(out.same_specials) << "out";
  EXPECT_TRUE(lse.same_specials) << "lse";
  EXPECT_LE(out.relative_rms, rms_limit(problem.shape().dtype));
  EXPECT_LE(out.relative_maximum, 8 * rms_limit(problem.shape().dtype));
  EXPECT_LE(lse.relative_maximum, 4e-6);
  EXPECT_EQ(problem.kept.values(), wanted.kept);
}

void expect_close_on_all_tiers(AttentionProblem &problem) {
  Wanted wanted = compute_wanted(problem);
  for (sl_isa tier : tiers()) {
    IsaCap cap(tier);
    SCOPED_TRACE(problem.shape().text() + " on " + sl_gated_attention_kernel_name(problem.shape().dtype));
    expect_close(problem, wanted);
  }
}

AttentionShape shape_of(int64_t n_q, int64_t n_k, int64_t head_dim, bool causal, std::optional<double> logit_tau) {
  AttentionShape shape;
  shape.n_q = n_q, shape.n_k = n_k, shape.head_dim = shape.head_dim_v = head_dim;
  shape.causal = causal, shape.logit_tau = logit_tau;
  shape.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  return shape;
}

AttentionShape random_shape(Random &random) {
  AttentionShape shape;
  shape.dtype = random.pick<sl_dtype>({SL_F32, SL_F32, SL_BF16, SL_F16});
  shape.batch = random.integer(1, 2);
  shape.heads_kv = random.integer(1, 2);
  shape.heads_q = shape.heads_kv * random.integer(1, 3);
  int64_t most = random.pick<int64_t>({20, 130, 500});
  shape.n_k = random.integer(0, most);
  shape.n_q = random.chance(0.5) ? shape.n_k : random.integer(0, most);
  shape.head_dim = random.chance(0.9) ? random.integer(1, 40) : random.pick<int64_t>({64, 128, 256});
  shape.head_dim_v = random.chance(0.5) ? shape.head_dim : random.integer(1, 40);
  shape.scale = random.pick<double>({1, 1, -1, 0}) / std::sqrt(static_cast<double>(shape.head_dim));
  shape.causal = random.chance(0.6);
  shape.window = random.chance(0.5) ? 0 : random.integer(1, random.pick<int64_t>({8, 100, 600}));
  shape.sinks = random.chance(0.6) ? 0 : random.integer(1, random.pick<int64_t>({4, 300}));
  if (random.chance(0.7)) shape.logit_tau = random.pick<double>({-2, 0, 1, 3, 6, 100, -kInfinity});
  if (random.chance(0.3)) {
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
      int64_t begin = random.integer(0, shape.n_k);
      shape.key_range.insert(shape.key_range.end(), {begin, random.integer(begin, shape.n_k)});
    }
  }
  shape.place_at_random(random);
  shape.bend_at_random(random);
  shape.layout = random.pick<Layout>({Layout::kDense, Layout::kTokenMajor, Layout::kPadded});
  return shape;
}

}  // namespace

TEST(AttentionForward, RandomProblems) {
  Random random(11);
  for (int round = 0; round < (kUnderThreadSanitizer ? 30 : 120); ++round) {
    AttentionShape shape = random_shape(random);
    AttentionProblem problem(shape, static_cast<uint64_t>(round));
    // A threshold per head, so that one head of a group may keep all while another keeps little.
    if (shape.logit_tau)
      problem.logit_tau.fill([&] { return random.chance(0.8) ? *shape.logit_tau : random.normal(3); });
    SCOPED_TRACE(round);
    expect_close_on_all_tiers(problem);
    if (HasFailure()) return;
  }
}

TEST(AttentionForward, LongerThanSeveralChunks) {
  struct Case {
    int64_t n_q, n_k, window, sinks;
    bool causal;
    double tau;
  } cases[] = {{1500, 1500, 0, 0, true, 1.5},    {1500, 1500, 0, 0, true, -kInfinity},  {700, 1400, 130, 5, true, 2},
               {1300, 600, 0, 0, true, 1},       {900, 1200, 70, 3, false, 2},          {1000, 1000, 0, 0, false, 2},
               {900, 1100, 90, 0, false, -100.}, {1100, 1100, 250, 9, true, -kInfinity}};
  for (const Case &row : cases) {
    AttentionShape shape = shape_of(row.n_q, row.n_k, 8, row.causal, row.tau);
    shape.window = row.window, shape.sinks = row.sinks;
    AttentionProblem problem(shape, 5);
    expect_close_on_all_tiers(problem);
  }
}

TEST(AttentionForward, HeadSizes) {
  for (int64_t head_dim : {1, 7, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 200, 255, 256}) {
    for (sl_dtype dtype : {SL_F32, SL_BF16, SL_F16}) {
      AttentionShape shape = shape_of(60, 70, head_dim, true, 0);
      shape.dtype = dtype, shape.head_dim_v = 257 - head_dim;
      AttentionProblem problem(shape, 3);
      expect_close_on_all_tiers(problem);
    }
  }
}

// Equal gates (as a fresh gate has) and gates of few values: sorting has ties, and thresholds lie on them.
TEST(AttentionForward, TiedGates) {
  Random random(2);
  for (double tau : {-1.0, 0.0, 1.0, 2.0}) {
    for (bool causal : {true, false}) {
      AttentionProblem problem(shape_of(300, 300, 8, causal, tau), 1);
      problem.a.fill([&] { return static_cast<double>(random.integer(-1, 1)); });
      problem.b.fill([&] { return static_cast<double>(random.integer(-1, 1)); });
      expect_close_on_all_tiers(problem);
      problem.a.fill([] { return 3; });
      problem.b.fill([] { return -0.0; });
      expect_close_on_all_tiers(problem);
    }
  }
}

TEST(AttentionForward, HugeGateLogits) {
  Random random(4);
  for (double tau : {-90.0, -80.0, 0.0, 80.0}) {
    AttentionProblem problem(shape_of(200, 200, 8, true, tau), 1);
    auto next = [&] { return random.pick<double>({-1e30, -40, -39, 0, 39, 40, 41, 1e30, kInfinity, -kInfinity}); };
    problem.a.fill(next);
    problem.b.fill(next);
    expect_close_on_all_tiers(problem);
  }
}

// Scores that make exp overflow or vanish, growing and shrinking along the keys, so that the running maximum jumps.
TEST(AttentionForward, HugeScores) {
  for (std::optional<double> tau : {std::optional<double>{}, std::optional<double>{0.5}}) {
    for (double size : {30.0, 1e4, 1e15}) {
      AttentionShape shape = shape_of(300, 300, 4, true, tau);
      AttentionProblem problem(shape, 8);
      Random random(9);
      problem.k.for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) {
        problem.k.set(i, j, t, c, c == 0 ? size * (t % 97) : c == 1 ? -1 : 0);
      });
      problem.q.for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) {
        problem.q.set(i, j, t, c, c == 0 ? (t % 2 ? 1 : -1) : random.integer(0, 2));
      });
      expect_close_on_all_tiers(problem);
    }
  }
}

TEST(AttentionForward, NanAndInfinityStayWhereTheyBelong) {
  Random random(6);
  for (int round = 0; round < 48; ++round) {
    AttentionShape shape = shape_of(random.pick<int64_t>({3, 150, 260}), random.pick<int64_t>({150, 260}),
                                    random.pick<int64_t>({5, 8}), random.chance(0.7), {});
    shape.dtype = random.pick<sl_dtype>({SL_F32, SL_BF16, SL_F16});
    if (random.chance(0.7)) shape.logit_tau = random.pick<double>({0, 2, 4});
    if (random.chance(0.4)) shape.window = 20, shape.sinks = 3;
    AttentionProblem problem(shape, static_cast<uint64_t>(round));
    Tensor *tensors[] = {&problem.q, &problem.k, &problem.v, &problem.a, &problem.b};
    Tensor &tensor = *tensors[round % 5];
    for (int hit = 0; hit < random.integer(1, 3); ++hit) {
      auto [batch, heads, tokens, channels] = tensor.shape();
      tensor.set(0, 0, random.integer(0, tokens - 1), random.integer(0, channels - 1),
                 random.pick<double>({kNan, kInfinity, -kInfinity}));
    }
    SCOPED_TRACE("tensor " + std::to_string(round % 5));
    expect_close_on_all_tiers(problem);
  }
}

// Keys outside key_range may hold anything.
TEST(AttentionForward, InvalidKeysAreNotTouched) {
  for (std::optional<double> tau : {std::optional<double>{}, std::optional<double>{0.5}}) {
    AttentionShape shape = shape_of(200, 200, 8, true, tau);
    shape.key_range = {40, 170}, shape.sinks = 42;
    AttentionProblem problem(shape, 7);
    problem.k.for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) {
      if (t >= 40 && t < 170) return;
      problem.k.set(i, j, t, c, kNan);
      problem.v.set(i, j, t, c, kInfinity);
      problem.b.set(i, j, t, 0, kNan);
    });
    expect_close_on_all_tiers(problem);
  }
}

TEST(AttentionForward, RowsThatKeepNothingAreZero) {
  for (int64_t n_q : {4, 64}) {
    AttentionProblem problem(shape_of(n_q, 64, 8, false, 79), 1);
    for (sl_isa tier : tiers()) {
      IsaCap cap(tier);
      problem.clear_results();
      ASSERT_EQ(problem.run_forward(), SL_OK);
      for (double value : problem.out.values()) EXPECT_EQ(value, 0);
      for (double value : problem.lse.values()) EXPECT_EQ(value, -kInfinity);
    }
  }
}

TEST(AttentionForward, SameBitsWithAnyNumberOfThreads) {
  for (sl_dtype dtype : {SL_F32, SL_BF16}) {
    AttentionShape shape = shape_of(700, 700, 16, true, 1);
    shape.dtype = dtype, shape.batch = 2, shape.heads_q = 4, shape.heads_kv = 2;
    AttentionProblem problem(shape, 1);
    ASSERT_EQ(problem.run_forward(), SL_OK);
    std::vector<double> want = problem.out.values(), want_lse = problem.lse.values(), want_kept = problem.kept.values();
    for (int threads : {1, 2, 7}) {
      ThreadExecutor executor(threads);
      problem.clear_results();
      ASSERT_EQ(problem.run_forward(executor.get()), SL_OK);
      EXPECT_EQ(problem.damage(), "");
      EXPECT_EQ(problem.out.values(), want) << threads;
      EXPECT_EQ(problem.lse.values(), want_lse) << threads;
      EXPECT_EQ(problem.kept.values(), want_kept) << threads;
    }
  }
}

TEST(AttentionForward, WorksWithoutLse) {
  AttentionProblem problem(shape_of(100, 100, 8, true, 0), 1);
  Wanted wanted = compute_wanted(problem);
  problem.clear_results();
  sl_gated_attention_args args = problem.args();
  args.lse.data = nullptr;
  size_t bytes = 0;
  ASSERT_EQ(sl_gated_attention_workspace_size(&args, &bytes), SL_OK);
  GuardedBuffer workspace(bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes;
  ASSERT_EQ(sl_gated_attention(&args), SL_OK) << sl_last_error();
  EXPECT_LE(measure_distance(problem.out.values(), wanted.out).relative_rms, rms_limit(SL_F32));
}

TEST(AttentionForward, RefusesAWorkspaceThatIsTooSmall) {
  AttentionProblem problem(shape_of(100, 100, 8, true, 0), 1);
  sl_gated_attention_args args = problem.args();
  size_t bytes = 0;
  ASSERT_EQ(sl_gated_attention_workspace_size(&args, &bytes), SL_OK);
  ASSERT_GT(bytes, 0u);
  GuardedBuffer workspace(bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes - 1;
  EXPECT_EQ(sl_gated_attention(&args), SL_OUT_OF_MEMORY);
  EXPECT_NE(std::string(sl_last_error()).find("workspace_size is " + std::to_string(bytes - 1)), std::string::npos)
      << sl_last_error();
  args.workspace = nullptr, args.workspace_size = bytes;
  EXPECT_EQ(sl_gated_attention(&args), SL_OUT_OF_MEMORY);
}

TEST(AttentionForward, NamesTheKernel) {
  for (sl_isa tier : tiers()) {
    IsaCap cap(tier);
    std::string name = sl_gated_attention_kernel_name(SL_BF16);
    sl_isa served = tier == SL_ISA_AVX512VNNI ? SL_ISA_AVX512 : tier;  // it adds products of bytes alone
    EXPECT_EQ(name.find(sl_isa_name(served)), 0u) << name;
    EXPECT_STREQ(sl_gated_attention_kernel_name(SL_F64), "reference");
  }
}

TEST(SortFalling, OrdersStablyWithNanFirst) {
  Random random(1);
  for (int64_t count : {0, 1, 2, 63, 64, 65, 500, 1024}) {
    for (int variant = 0; variant < 3; ++variant) {
      std::vector<float> keys(static_cast<size_t>(count));
      std::vector<int32_t> order(keys.size(), -1), want(keys.size());
      for (float &key : keys) {
        key = static_cast<float>(variant == 0 ? random.normal() : static_cast<double>(random.integer(-2, 2)));
        if (variant == 2 && random.chance(0.1))
          key = static_cast<float>(random.pick<double>({kNan, -kNan, kInfinity, 1e-40}));
      }
      for (size_t i = 0; i < want.size(); ++i) want[i] = static_cast<int32_t>(i);
      auto key_of = [&](int32_t i) { return keys[static_cast<size_t>(i)]; };
      std::stable_sort(want.begin(), want.end(), [&](int32_t i, int32_t j) {
        if (std::isnan(key_of(j))) return false;
        return std::isnan(key_of(i)) || key_of(i) > key_of(j);
      });
      sl_sort_falling(keys.data(), count, order.data());
      EXPECT_EQ(order, want) << count;
    }
  }
}
