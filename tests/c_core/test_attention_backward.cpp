// The backward of every table against the reference: random shapes, borders, empty rows, extremes, NaN, executors.
#include <gtest/gtest.h>

#include <limits>

#include "support.h"

extern "C" {
#include "attention/kernel.h"
}

using namespace sluice_test;

namespace {

class Backward : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    kernel = sl_attention_list_kernels(GetParam());
    if (kernel->isa > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(kernel->isa);
    cap.emplace(kernel->isa);
    ASSERT_STREQ(sl_gated_attention_kernel_name(kernel->dtype), kernel->name);
    shape.dtype = kernel->dtype;
  }

  const sl_attention_kernel *kernel = nullptr;
  std::optional<IsaCap> cap;
  AttentionShape shape;
};

struct Gradient {
  const char *name;
  Tensor AttentionProblem::*tensor;
};
const Gradient kGradients[] = {{"dq", &AttentionProblem::dq},
                               {"dk", &AttentionProblem::dk},
                               {"dv", &AttentionProblem::dv},
                               {"da", &AttentionProblem::da},
                               {"db", &AttentionProblem::db},
                               {"dmask", &AttentionProblem::dmask},
                               {"doutput_gate", &AttentionProblem::doutput_gate}};

std::vector<std::vector<double>> gradients_of(const AttentionProblem &problem) {
  std::vector<std::vector<double>> all;
  for (const Gradient &gradient : kGradients) all.push_back((problem.*gradient.tensor).values());
  return all;
}

std::vector<std::vector<double>> reference_gradients(AttentionProblem &problem) {
  sl_gated_attention_args args = problem.args();
  EXPECT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  EXPECT_EQ(sl_gated_attention_backward_reference(&args), SL_OK) << sl_last_error();
  return gradients_of(problem);
}

// The kernel's gradients from the reference's out and lse agree with the reference's, and nothing else was written.
void expect_reference(AttentionProblem &problem, const sl_executor *executor = nullptr) {
  SCOPED_TRACE(problem.shape().text());
  auto want = reference_gradients(problem);
  problem.clear_gradients();
  ASSERT_EQ(problem.run_backward(executor), SL_OK) << sl_last_error();
  EXPECT_EQ(problem.damage(), "");
  auto got = gradients_of(problem);
  bool single = problem.shape().dtype == SL_F32;
  for (size_t i = 0; i < want.size(); ++i) {
    // Differences are compared with the terms that cancelled: sums over queries and keys, and dout times the output's
    // gate, which is rounded to the dtype as torch rounds it; dropout makes all of them larger.
    double summed = want[i].empty() ? 1 : problem.pairs() / static_cast<double>(want[i].size());
    double least = single || !problem.shape().output_gate ? 0.1 : 2;
    if (problem.shape().dropout > 0) least /= 1 - problem.shape().dropout;
    if (kGradients[i].tensor == &AttentionProblem::dmask) least *= std::sqrt(std::fmax(summed, 1));
    Distance distance = measure_distance(got[i], want[i], least);
    EXPECT_TRUE(distance.same_specials) << kGradients[i].name;
    EXPECT_LT(distance.relative_maximum, single ? 4e-5 : 0.02) << kGradients[i].name;
    EXPECT_LT(distance.relative_rms, single ? 1e-5 : 0.005) << kGradients[i].name;
  }
}

AttentionShape random_shape(Random &random, sl_dtype dtype) {
  AttentionShape shape;
  shape.dtype = dtype;
  shape.batch = random.integer(1, 2);
  shape.heads_kv = random.integer(1, 2);
  shape.heads_q = shape.heads_kv * random.pick<int64_t>({1, 1, 2, 3});
  shape.n_k = random.pick<int64_t>({1, 2, 15, 16, 17, 63, 64, 65, 100, 130, 200});
  shape.n_q = random.chance(0.5) ? shape.n_k : random.integer(1, 150);
  shape.head_dim = random.pick<int64_t>({1, 5, 8, 16, 17, 32, 40});
  shape.head_dim_v = random.chance(0.5) ? shape.head_dim : random.pick<int64_t>({1, 8, 20, 33});
  shape.causal = random.chance(0.6);
  shape.window = random.pick<int64_t>({0, 0, 1, 4, 20, 1000});
  shape.sinks = random.pick<int64_t>({0, 0, 1, 4, 70, 1000});
  shape.scale = random.pick<double>({0.125, 0.5, -0.3, 0});
  if (random.chance(0.75)) shape.logit_tau = random.pick<double>({-3, 0, 0, 2, 6});
  if (random.chance(0.3)) {
    for (int64_t i = 0; i < shape.batch; ++i) {
      int64_t begin = random.integer(0, shape.n_k);
      shape.key_range.push_back(begin);
      shape.key_range.push_back(random.integer(begin, shape.n_k));
    }
  }
  shape.place_at_random(random);
  shape.bend_at_random(random);
  shape.layout = random.pick<Layout>({Layout::kDense, Layout::kTokenMajor, Layout::kPadded});
  return shape;
}

}  // namespace

TEST_P(Backward, RandomShapes) {
  Random random(static_cast<uint64_t>(GetParam()) + 1);
  ThreadExecutor threads(3);
  for (int round = 0; round < 40; ++round) {
    AttentionProblem problem(random_shape(random, kernel->dtype), static_cast<uint64_t>(round));
    expect_reference(problem, round % 2 ? threads.get() : nullptr);
    if (HasFailure()) break;
  }
}

TEST_P(Backward, SeveralChunks) {
  shape.n_q = shape.n_k = 450, shape.head_dim = 12, shape.head_dim_v = 9;
  ThreadExecutor threads(2);
  for (bool causal : {true, false}) {
    for (auto [window, sinks] : {std::pair{0, 0}, std::pair{32, 4}}) {
      for (double logit_tau : {-1e9, 0.5, 4.}) {
        shape.causal = causal, shape.window = window, shape.sinks = sinks, shape.logit_tau = logit_tau;
        AttentionProblem problem(shape, 5);
        expect_reference(problem, threads.get());
      }
    }
  }
}

TEST_P(Backward, HeadSizesOfRealModels) {
  shape.n_q = 90, shape.n_k = 130, shape.window = 5, shape.logit_tau = 0.5;
  for (auto [head_dim, head_dim_v] : {std::pair{64, 64}, std::pair{96, 96}, std::pair{128, 128}, std::pair{96, 128}}) {
    shape.head_dim = head_dim, shape.head_dim_v = head_dim_v, shape.scale = 1 / std::sqrt(head_dim);
    for (bool causal : {true, false}) {
      shape.causal = causal;
      AttentionProblem problem(shape, 14);
      expect_reference(problem);
    }
  }
}

TEST_P(Backward, FewQueriesAndManyKeysAndTheOtherWayRound) {
  shape.causal = true, shape.logit_tau = 0, shape.window = 5, shape.head_dim = 16;
  for (auto [n_q, n_k] : {std::pair{1, 600}, std::pair{3, 530}, std::pair{600, 3}, std::pair{300, 290}}) {
    shape.n_q = n_q, shape.n_k = n_k;
    for (bool causal : {true, false}) {
      shape.causal = causal;
      AttentionProblem problem(shape, 6);
      expect_reference(problem);
    }
  }
}

TEST_P(Backward, RowsWithoutKeysHaveNoGradientAndHarmNoOther) {
  shape.n_q = 40, shape.n_k = 33, shape.causal = true, shape.batch = 2, shape.key_range = {10, 20, 5, 5};
  for (std::optional<double> logit_tau : {std::optional<double>{}, std::optional<double>{39}}) {
    shape.logit_tau = logit_tau;
    AttentionProblem problem(shape, 7);
    expect_reference(problem);
    for (int64_t query = 0; query < 17; ++query) {  // positions before key 10
      ASSERT_EQ(problem.lse.get(0, 0, query), -std::numeric_limits<double>::infinity());
      ASSERT_EQ(problem.da.get(0, 0, query), 0);
      for (int64_t c = 0; c < shape.head_dim; ++c) ASSERT_EQ(problem.dq.get(0, 0, query, c), 0);
    }
    for (double value : problem.dq.values()) ASSERT_TRUE(std::isfinite(value));
    problem.dk.for_each([&](int64_t batch, int64_t head, int64_t key, int64_t c) {
      if (batch == 1) {
        ASSERT_EQ(problem.dk.get(batch, head, key, c), 0);
      }
    });
  }
}

TEST_P(Backward, NoKeysNoQueriesNoBatch) {
  for (auto [batch, n_q, n_k] : {std::array<int64_t, 3>{1, 5, 0}, {1, 0, 5}, {0, 5, 5}, {1, 0, 0}}) {
    shape.batch = batch, shape.n_q = n_q, shape.n_k = n_k;
    AttentionProblem problem(shape, 8);
    expect_reference(problem);
  }
}

TEST_P(Backward, GateLogitsBeyondTheClampGetNoGradient) {
  shape.n_q = shape.n_k = 90, shape.causal = true;
  for (double logit_tau : {-30., 0.}) {
    shape.logit_tau = logit_tau;
    AttentionProblem problem(shape, 9, 40);
    expect_reference(problem);
    problem.a.for_each([&](int64_t i, int64_t h, int64_t t, int64_t) {
      if (std::fabs(problem.a.get(i, h, t)) > 40) {
        ASSERT_EQ(problem.da.get(i, h, t), 0);
      }
    });
  }
}

TEST_P(Backward, LargeScores) {
  shape.n_q = shape.n_k = 70, shape.causal = true, shape.logit_tau = 0, shape.scale = 20, shape.dtype = kernel->dtype;
  AttentionProblem problem(shape, 10);
  sl_gated_attention_args args = problem.args();
  ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK);
  // Scores of some hundreds lose digits in float; what matters is that nothing overflows and the size is right.
  ASSERT_EQ(sl_gated_attention_backward_reference(&args), SL_OK);
  auto want = gradients_of(problem);
  problem.clear_gradients();
  ASSERT_EQ(problem.run_backward(), SL_OK);
  auto got = gradients_of(problem);
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_LT(measure_distance(got[i], want[i]).relative_maximum, 0.05) << kGradients[i].name;
  }
}

TEST_P(Backward, TheSameBitsWhateverTheThreads) {
  shape.n_q = shape.n_k = 400, shape.batch = 1, shape.heads_q = 2, shape.heads_kv = 1, shape.head_dim = 24;
  shape.window = 8, shape.sinks = 2;
  for (bool causal : {true, false}) {
    for (double logit_tau : {-1e9, 0.}) {
      shape.causal = causal, shape.logit_tau = logit_tau;
      SCOPED_TRACE(shape.text());
      AttentionProblem problem(shape, 11);
      sl_gated_attention_args args = problem.args();
      ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK);
      ASSERT_EQ(problem.run_backward(), SL_OK);
      auto want = gradients_of(problem);
      for (int count : {2, 5}) {
        ThreadExecutor threads(count);
        for (int repeat = 0; repeat < 2; ++repeat) {
          problem.clear_gradients();
          ASSERT_EQ(problem.run_backward(threads.get()), SL_OK);
          EXPECT_EQ(gradients_of(problem), want) << count << " threads";
          EXPECT_EQ(problem.damage(), "");
        }
      }
    }
  }
}

TEST_P(Backward, NanAndInfinityStandWhereTheFormulaPutsThem) {
  shape.n_q = shape.n_k = 80, shape.causal = true, shape.logit_tau = 0, shape.window = 3, shape.head_dim = 9;
  shape.heads_q = 2;
  Tensor AttentionProblem::*const inputs[] = {&AttentionProblem::q, &AttentionProblem::k, &AttentionProblem::v,
                                              &AttentionProblem::a, &AttentionProblem::b, &AttentionProblem::dout};
  for (const auto &input : inputs) {
    for (double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      for (int64_t token : {0, 41}) {
        AttentionProblem problem(shape, 12);
        (problem.*input).set(0, 0, token, 0, bad);
        SCOPED_TRACE("input " + std::to_string(&input - inputs) + " " + std::to_string(bad) + " at " +
                     std::to_string(token));
        expect_reference(problem);
      }
    }
  }
}

TEST_P(Backward, AWorkspaceThatIsTooSmallIsRefusedByItsSize) {
  shape.n_q = shape.n_k = 20;
  AttentionProblem problem(shape, 13);
  sl_gated_attention_args args = problem.args();
  size_t bytes = 0;
  ASSERT_EQ(sl_gated_attention_backward_workspace_size(&args, &bytes), SL_OK);
  ASSERT_GT(bytes, 0u);
  GuardedBuffer workspace(bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes - 1;
  EXPECT_EQ(sl_gated_attention_backward(&args), SL_OUT_OF_MEMORY);
  std::string text = "workspace_size is " + std::to_string(bytes - 1) + ", expected at least " + std::to_string(bytes);
  EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos) << sl_last_error();
  EXPECT_EQ(problem.damage(), "");
}

INSTANTIATE_TEST_SUITE_P(Attention, Backward, testing::ValuesIn([] {
                           std::vector<int> numbers;
                           for (int i = 0; sl_attention_list_kernels(i); ++i) {
                             sl_dtype dtype = sl_attention_list_kernels(i)->dtype;
                             if (dtype == SL_F32 || !kUnderThreadSanitizer) numbers.push_back(i);
                           }
                           return numbers;
                         }()),
                         [](const auto &table) { return std::string(sl_attention_list_kernels(table.param)->name); });
