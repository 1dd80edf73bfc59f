// Few queries, as in decoding: segments of keys, teams of rows, and heads that go together give the formula, and the
// same bits however the work is divided.
#include <gtest/gtest.h>

#include <algorithm>

#include "support.h"

using namespace sluice_test;

namespace {

class Decode : public testing::TestWithParam<sl_isa> {
 protected:
  void SetUp() override {
    if (GetParam() > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(GetParam());
    cap.emplace(GetParam());
  }
  std::optional<IsaCap> cap;
};

using Results = std::pair<std::vector<double>, std::vector<double>>;

Results run(AttentionProblem &problem, const sl_executor *executor = nullptr) {
  problem.clear_results();
  EXPECT_EQ(problem.run_forward(executor), SL_OK) << sl_last_error();
  EXPECT_EQ(problem.damage(), "");
  return {problem.out.values(), problem.lse.values()};
}

Results run_reference(AttentionProblem &problem) {
  problem.clear_results();
  sl_gated_attention_args args = problem.args();
  EXPECT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  return {problem.out.values(), problem.lse.values()};
}

void expect_close(const Results &found, const Results &wanted, sl_dtype dtype) {
  double limit = dtype == SL_F32 ? 4e-6 : dtype == SL_F16 ? 4e-4 : 4e-3;
  Distance out = measure_distance(found.first, wanted.first), lse = measure_distance(found.second, wanted.second);
  EXPECT_TRUE(out.same_specials && lse.same_specials);
  EXPECT_LE(out.relative_rms, limit);
  EXPECT_LE(out.relative_maximum, 8 * limit);
  EXPECT_LE(lse.relative_maximum, 4e-6);
}

// Several segments, teams that are full and not, heads of several vectors and a rest.
AttentionShape random_shape(Random &random) {
  AttentionShape shape;
  shape.dtype = random.pick<sl_dtype>({SL_F32, SL_F32, SL_BF16, SL_F16});
  shape.batch = random.integer(1, 2);
  shape.heads_kv = random.integer(1, 3);
  shape.heads_q = shape.heads_kv * random.pick<int64_t>({1, 1, 2, 3, 5});
  shape.n_k = random.integer(1, random.pick<int64_t>({100, 1100, 2500}));
  shape.n_q = random.integer(1, 4);
  shape.head_dim = random.pick<int64_t>({random.integer(1, 20), random.integer(1, 40), 70});
  shape.head_dim_v = random.pick<int64_t>({random.integer(1, 20), random.integer(1, 40), 70});
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
  shape.causal = random.chance(0.7);
  shape.window = random.chance(0.5) ? 0 : random.integer(1, random.pick<int64_t>({8, 100, 1500}));
  shape.sinks = random.chance(0.6) ? 0 : random.integer(1, random.pick<int64_t>({4, 1300}));
  if (random.chance(0.8)) shape.logit_tau = random.pick<double>({-2, 0, 1, 3, 100});
  if (random.chance(0.4)) {
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
      int64_t begin = random.integer(0, shape.n_k);
      shape.key_range.insert(shape.key_range.end(), {begin, random.integer(begin, shape.n_k)});
    }
  }
  shape.place_at_random(random);
  shape.bend_at_random(random);
  return shape;
}

}  // namespace

TEST_P(Decode, GivesTheFormula) {
  Random random(21);
  for (int round = 0; round < (kUnderThreadSanitizer ? 6 : 20); ++round) {
    AttentionShape shape = random_shape(random);
    shape.layout = random.pick<Layout>({Layout::kDense, Layout::kTokenMajor, Layout::kPadded});
    SCOPED_TRACE(shape.text());
    AttentionProblem problem(shape, static_cast<uint64_t>(round));
    expect_close(run(problem), run_reference(problem), shape.dtype);
    if (HasFailure()) return;
  }
}

// Heads that lie side by side go in turns, in groups whose size follows from the number of threads.
TEST_P(Decode, SameBitsInAnyLayoutAndWithAnyNumberOfThreads) {
  Random random(22);
  for (int round = 0; round < (kUnderThreadSanitizer ? 3 : 5); ++round) {
    AttentionShape shape = random_shape(random);
    SCOPED_TRACE(shape.text());
    AttentionProblem first(shape, static_cast<uint64_t>(round));
    Results wanted = run(first);
    for (Layout layout : {Layout::kDense, Layout::kTokenMajor, Layout::kPadded}) {
      shape.layout = layout;
      AttentionProblem problem(shape, static_cast<uint64_t>(round));
      for (int threads : {1, 2, 7}) {
        ThreadExecutor executor(threads);
        Results found = run(problem, executor.get());
        auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
        EXPECT_TRUE(std::equal(found.first.begin(), found.first.end(), wanted.first.begin(), same)) << threads;
        EXPECT_TRUE(std::equal(found.second.begin(), found.second.end(), wanted.second.begin(), same)) << threads;
      }
    }
    if (HasFailure()) return;
  }
}

// A key that one row of a team drops and another keeps: what is NaN in it reaches the one that keeps it alone.
TEST_P(Decode, RowsOfATeamKeepTheirOwnKeys) {
  AttentionShape shape;
  shape.heads_q = 4, shape.n_q = 1, shape.n_k = 1500, shape.causal = true, shape.logit_tau = 0;
  AttentionProblem problem(shape, 5);
  for (int64_t key = 0; key < shape.n_k; ++key) problem.b.set(0, 0, key, 0, key % 3 ? -1 : 1);
  for (int64_t head = 0; head < 4; ++head) problem.a.set(0, head, 0, 0, head == 2 ? 2 : 0);
  problem.k.set(0, 0, 1234, 0, std::nan("")), problem.v.set(0, 0, 700, 3, std::nan(""));
  Results found = run(problem);
  expect_close(found, run_reference(problem), SL_F32);
  for (int64_t head = 0; head < 4; ++head) {
    EXPECT_EQ(std::isnan(found.second[static_cast<size_t>(head)]), head == 2) << head;
  }
}

INSTANTIATE_TEST_SUITE_P(Attention, Decode,
                         testing::Values(SL_ISA_SCALAR, SL_ISA_AVX2, SL_ISA_AVX512, SL_ISA_AVX512BF16),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });
