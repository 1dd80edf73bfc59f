// The reference of gated attention against cases worked out by hand, and its gradients against finite differences.
#include <gtest/gtest.h>

#include <limits>

#include "support.h"

using namespace sluice_test;

namespace {

const double kLog3 = std::log(3.0);

void fill(Tensor &tensor, const std::vector<double> &values) {
  size_t next = 0;
  tensor.fill([&] { return values.at(next++); });
  ASSERT_EQ(next, values.size());
}

void run_forward(AttentionProblem &problem) {
  sl_gated_attention_args args = problem.args();
  ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  ASSERT_EQ(problem.damage(), "");
}

void run_both(AttentionProblem &problem) {
  run_forward(problem);
  sl_gated_attention_args args = problem.args();
  ASSERT_EQ(sl_gated_attention_backward_reference(&args), SL_OK) << sl_last_error();
  ASSERT_EQ(problem.damage(), "");
}

void expect_values(const char *name, const Tensor &tensor, const std::vector<double> &want, double tolerance = 1e-12) {
  std::vector<double> got = tensor.values();
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isfinite(want[i])) {
      EXPECT_NEAR(got[i], want[i], tolerance) << name << "[" << i << "]";
    } else {
      EXPECT_EQ(got[i], want[i]) << name << "[" << i << "]";
    }
  }
}

// One query with softmax {1/4, 3/4} and gates {1/2, 3/4} over two keys.
AttentionProblem two_keys(sl_dtype dtype = SL_F64, std::optional<double> logit_tau = {}) {
  AttentionShape shape;
  shape.dtype = dtype, shape.logit_tau = logit_tau;
  shape.n_q = 1, shape.n_k = 2, shape.head_dim = 1, shape.head_dim_v = 1, shape.scale = 1;
  AttentionProblem problem(shape, 1);
  fill(problem.q, {1}), fill(problem.k, {0, kLog3}), fill(problem.v, {8, 16});
  fill(problem.a, {0}), fill(problem.b, {0, kLog3}), fill(problem.dout, {1});
  return problem;
}

// Scores are all 0 and v is the identity, so that out shows gate / (number of kept keys) for each pair.
AttentionProblem pair_viewer(AttentionShape shape) {
  shape.dtype = SL_F64, shape.head_dim = 1, shape.head_dim_v = shape.n_k;
  AttentionProblem problem(shape, 1);
  problem.q.fill([] { return 0; });
  problem.a.fill([] { return 0; });
  problem.b.fill([] { return 0; });
  problem.v.for_each([&](int64_t i, int64_t h, int64_t t, int64_t c) { problem.v.set(i, h, t, c, t == c); });
  return problem;
}

}  // namespace

TEST(ReferenceByHand, TheSeedFormula) {
  AttentionProblem problem = two_keys();
  run_both(problem);
  expect_values("out", problem.out, {10});  // 1/4 * 1/2 * 8 + 3/4 * 3/4 * 16
  expect_values("lse", problem.lse, {std::log(4.0)});
  expect_values("dv", problem.dv, {1. / 8, 9. / 16});
  expect_values("dq", problem.dq, {1.5 * kLog3});  // ds = {1/4 (4 - 10), 3/4 (12 - 10)}
  expect_values("dk", problem.dk, {-1.5, 1.5});
  expect_values("da", problem.da, {2.75});
  expect_values("db", problem.db, {0.5, 2.25});
}

TEST(ReferenceByHand, EveryDtypeRoundsTheSameResult) {
  for (sl_dtype dtype : {SL_F32, SL_BF16, SL_F16}) {
    AttentionProblem problem = two_keys(dtype);
    run_both(problem);
    double ulp = dtype == SL_F32 ? 1e-6 : dtype == SL_BF16 ? 1. / 128 : 1. / 1024;
    expect_values("out", problem.out, {10}, 10 * ulp);
    expect_values("lse", problem.lse, {std::log(4.0)}, 2 * ulp);
    expect_values("dk", problem.dk, {-1.5, 1.5}, 20 * ulp);  // D comes from the rounded out
    expect_values("da", problem.da, {2.75}, 5 * ulp);
  }
}

TEST(ReferenceByHand, AThresholdDropsTheKeyFromTheSoftmaxToo) {
  AttentionProblem problem = two_keys(SL_F64, 0.5);
  run_both(problem);
  expect_values("out", problem.out, {12});  // 3/4 * 16
  expect_values("lse", problem.lse, {kLog3});
  expect_values("dv", problem.dv, {0, 3. / 4});
  expect_values("dk", problem.dk, {0, 0});
  expect_values("db", problem.db, {0, 3});
}

TEST(ReferenceByHand, KeptPairsWithoutCausality) {
  AttentionShape shape;
  shape.n_q = 3, shape.n_k = 5;  // p = 2, 3, 4
  AttentionProblem all = pair_viewer(shape);
  run_forward(all);
  expect_values("out", all.out, std::vector<double>(15, 0.1));

  shape.window = 2, shape.sinks = 1;
  AttentionProblem near = pair_viewer(shape);
  run_forward(near);
  const double n = 0.2, f = 0.1;  // near pairs are ungated
  expect_values("out", near.out,
                {n, n, n, n, f,  //
                 n, f, n, n, n,  //
                 n, f, f, n, n});

  shape.logit_tau = 1;  // the gate drops all it may
  AttentionProblem cut = pair_viewer(shape);
  run_forward(cut);
  const double t = 1. / 3, q = 1. / 4;
  expect_values("out", cut.out,
                {q, q, q, q, 0,  //
                 q, 0, q, q, q,  //
                 t, 0, 0, t, t});
}

TEST(ReferenceByHand, KeptPairsUnderCausality) {
  AttentionShape shape;
  shape.n_q = 3, shape.n_k = 4, shape.causal = true;  // p = 1, 2, 3
  AttentionProblem all = pair_viewer(shape);
  run_forward(all);
  expect_values("out", all.out, {.25, .25, 0, 0, 1. / 6, 1. / 6, 1. / 6, 0, .125, .125, .125, .125});

  shape.logit_tau = 1;  // the self pair stays, gated like the rest
  AttentionProblem self = pair_viewer(shape);
  run_forward(self);
  expect_values("out", self.out, {0, .5, 0, 0, 0, 0, .5, 0, 0, 0, 0, .5});
  expect_values("lse", self.lse, {0, 0, 0});

  shape.window = 2;
  AttentionProblem window = pair_viewer(shape);
  run_forward(window);
  expect_values("out", window.out, {.5, .5, 0, 0, 0, .5, .5, 0, 0, 0, .5, .5});
}

TEST(ReferenceByHand, TheThresholdItselfIsKept) {
  AttentionShape shape;
  shape.n_q = 1, shape.n_k = 3, shape.logit_tau = 0.75;
  AttentionProblem problem = pair_viewer(shape);
  problem.a.set(0, 0, 0, 0, 0.5);
  fill(problem.b, {0.25, 0.25 - 0x1p-50, 0.5});
  run_forward(problem);
  expect_values("lse", problem.lse, {std::log(2.0)});
  EXPECT_EQ(problem.out.get(0, 0, 0, 1), 0);
}

TEST(ReferenceByHand, InSinglePrecisionTheSumOfLogitsIsRoundedBeforeItIsCompared) {
  AttentionShape shape;
  shape.dtype = SL_F32, shape.n_q = 1, shape.n_k = 2, shape.logit_tau = 1;
  AttentionProblem problem(shape, 1);
  problem.q.fill([] { return 0; });
  problem.a.set(0, 0, 0, 0, 1);
  fill(problem.b, {-1e-9, -1e-3});  // 1 - 1e-9 rounds to 1
  run_forward(problem);
  expect_values("lse", problem.lse, {0});
}

TEST(ReferenceByHand, KeyRangeHidesPaddingWhateverTheWindowSays) {
  AttentionShape shape;
  shape.batch = 2, shape.n_q = 4, shape.n_k = 4, shape.causal = true, shape.window = 1, shape.sinks = 1;
  shape.key_range = {1, 3, 4, 4};
  AttentionProblem problem = pair_viewer(shape);
  run_both(problem);
  std::vector<double> want = {0, 0, 0, 0, 0, 1, 0, 0, 0, .5, .5, 0, 0, .5, .25, 0};
  want.resize(32, 0);  // no key is valid in the second batch
  expect_values("out", problem.out, want);
  const double none = -std::numeric_limits<double>::infinity(), two = std::log(2.0);
  expect_values("lse", problem.lse, {none, 0, two, two, none, none, none, none});
  for (int64_t query = 0; query < 4; ++query) EXPECT_EQ(problem.da.get(1, 0, query), 0);
}

TEST(ReferenceByHand, QueriesBeforeTheFirstKeyKeepNothing) {
  AttentionShape shape;
  shape.dtype = SL_F64, shape.n_q = 3, shape.n_k = 1, shape.causal = true, shape.sinks = 4;
  AttentionProblem problem(shape, 1);
  run_both(problem);
  for (int64_t query : {0, 1}) {
    EXPECT_EQ(problem.lse.get(0, 0, query), -std::numeric_limits<double>::infinity());
    EXPECT_EQ(problem.da.get(0, 0, query), 0);
    for (int64_t c = 0; c < 8; ++c) {
      EXPECT_EQ(problem.out.get(0, 0, query, c), 0);
      EXPECT_EQ(problem.dq.get(0, 0, query, c), 0);
    }
  }
  for (int64_t c = 0; c < 8; ++c) {
    EXPECT_EQ(problem.out.get(0, 0, 2, c), problem.v.get(0, 0, 0, c));
    EXPECT_EQ(problem.dv.get(0, 0, 0, c), problem.dout.get(0, 0, 2, c));
  }
}

TEST(ReferenceByHand, NoKeysAndNoQueriesAreEmptyResults) {
  AttentionShape shape;
  shape.n_k = 0;
  AttentionProblem no_keys(shape, 1);
  run_both(no_keys);
  for (double value : no_keys.out.values()) EXPECT_EQ(value, 0);
  for (double value : no_keys.dq.values()) EXPECT_EQ(value, 0);
  shape.n_k = 4, shape.n_q = 0;
  AttentionProblem no_queries(shape, 1);
  run_both(no_queries);
  for (double value : no_queries.dk.values()) EXPECT_EQ(value, 0);
  for (double value : no_queries.db.values()) EXPECT_EQ(value, 0);
  shape.n_q = 4, shape.batch = 0;
  AttentionProblem no_batch(shape, 1);
  run_both(no_batch);
}

TEST(ReferenceByHand, LogitsAreClampedAtForty) {
  AttentionProblem problem = two_keys();
  fill(problem.a, {1000}), fill(problem.b, {-1000, -40});  // both sums are 0, so g = 1/2
  run_both(problem);
  expect_values("out", problem.out, {7});
  expect_values("da", problem.da, {0});
  expect_values("db", problem.db, {0, 3});  // at exactly -40 the gradient still flows: 3/4 * 16 * 1/4
}

TEST(ReferenceByHand, ANanGateIsKeptAndShows) {
  AttentionShape shape;
  shape.dtype = SL_F64, shape.n_q = 2, shape.n_k = 3, shape.logit_tau = 30;
  AttentionProblem problem(shape, 1);
  problem.a.set(0, 0, 1, 0, std::nan(""));
  run_forward(problem);
  EXPECT_EQ(problem.lse.get(0, 0, 0), -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isfinite(problem.lse.get(0, 0, 1)));
  EXPECT_EQ(problem.out.get(0, 0, 0, 0), 0);
  EXPECT_TRUE(std::isnan(problem.out.get(0, 0, 1, 0)));
}

TEST(ReferenceByHand, ANanScoreMakesItsRowNan) {
  AttentionProblem problem = two_keys();
  fill(problem.k, {std::nan(""), 1});
  run_both(problem);
  EXPECT_TRUE(std::isnan(problem.out.get(0, 0, 0, 0)));
  EXPECT_TRUE(std::isnan(problem.lse.get(0, 0, 0)));
  EXPECT_TRUE(std::isnan(problem.dq.get(0, 0, 0, 0)));
}

TEST(ReferenceByHand, GroupedQueryHeadsReadTheirKeyHeadAndAddUp) {
  AttentionShape grouped, single;
  grouped.dtype = single.dtype = SL_F64;
  grouped.heads_q = 4, grouped.heads_kv = 2;
  AttentionProblem problem(grouped, 3);
  run_both(problem);
  std::vector<double> dk(2 * 4 * 8, 0.0), db(2 * 4, 0.0);
  for (int64_t head = 0; head < 4; ++head) {
    AttentionProblem one(single, 1);
    auto take = [&](Tensor &to, const Tensor &from, int64_t from_head) {
      to.for_each([&](int64_t, int64_t, int64_t t, int64_t c) { to.set(0, 0, t, c, from.get(0, from_head, t, c)); });
    };
    take(one.q, problem.q, head), take(one.a, problem.a, head), take(one.dout, problem.dout, head);
    take(one.k, problem.k, head / 2), take(one.v, problem.v, head / 2), take(one.b, problem.b, head / 2);
    run_both(one);
    one.out.for_each([&](int64_t, int64_t, int64_t t, int64_t c) {
      EXPECT_EQ(one.out.get(0, 0, t, c), problem.out.get(0, head, t, c));
    });
    one.dk.for_each([&](int64_t, int64_t, int64_t t, int64_t c) {
      dk[static_cast<size_t>((head / 2 * 4 + t) * 8 + c)] += one.dk.get(0, 0, t, c);
    });
    one.db.for_each([&](int64_t, int64_t, int64_t t, int64_t) {
      db[static_cast<size_t>(head / 2 * 4 + t)] += one.db.get(0, 0, t);
    });
  }
  expect_values("dk", problem.dk, dk);
  expect_values("db", problem.db, db);
}

namespace {

// The change of sum(dout * out) when one element of an input moves, over the size of the move.
double finite_difference(AttentionProblem &problem, Tensor &input, int64_t i, int64_t h, int64_t t, int64_t c) {
  const double step = 1e-5, before = input.get(i, h, t, c);
  double loss[2] = {0, 0};
  for (int side = 0; side < 2; ++side) {
    input.set(i, h, t, c, before + (side ? step : -step));
    run_forward(problem);
    std::vector<double> out = problem.out.values(), dout = problem.dout.values();
    for (size_t n = 0; n < out.size(); ++n) loss[side] += out[n] * dout[n];
  }
  input.set(i, h, t, c, before);
  return (loss[1] - loss[0]) / (2 * step);
}

void expect_gradients(const AttentionShape &shape, uint64_t seed, double gate_deviation = 2) {
  SCOPED_TRACE(shape.text());
  AttentionProblem problem(shape, seed, gate_deviation);
  run_both(problem);
  struct Pair {
    const char *name;
    Tensor *input, *gradient;
  } pairs[] = {{"q", &problem.q, &problem.dq},
               {"k", &problem.k, &problem.dk},
               {"v", &problem.v, &problem.dv},
               {"a", &problem.a, &problem.da},
               {"b", &problem.b, &problem.db}};
  for (const Pair &pair : pairs) {
    pair.gradient->for_each([&](int64_t i, int64_t h, int64_t t, int64_t c) {
      double want = finite_difference(problem, *pair.input, i, h, t, c), got = pair.gradient->get(i, h, t, c);
      EXPECT_NEAR(got, want, 1e-7 * (1 + std::fabs(want)))
          << "d" << pair.name << "[" << i << ", " << h << ", " << t << ", " << c << "]";
    });
  }
}

AttentionShape small_shape() {
  AttentionShape shape;
  shape.dtype = SL_F64, shape.n_q = 7, shape.n_k = 7, shape.head_dim = 3, shape.head_dim_v = 2;
  return shape;
}

}  // namespace

TEST(ReferenceGradients, FullAndCausal) {
  AttentionShape shape = small_shape();
  expect_gradients(shape, 1);
  shape.causal = true;
  expect_gradients(shape, 2);
}

TEST(ReferenceGradients, Threshold) {
  AttentionShape shape = small_shape();
  for (double logit_tau : {-2., 0., 2.}) {
    for (bool causal : {false, true}) {
      shape.logit_tau = logit_tau, shape.causal = causal;
      expect_gradients(shape, 3);
    }
  }
}

TEST(ReferenceGradients, WindowAndSinks) {
  AttentionShape shape = small_shape();
  shape.window = 2, shape.sinks = 1, shape.logit_tau = 0;
  expect_gradients(shape, 4);
  shape.causal = true;
  expect_gradients(shape, 5);
}

TEST(ReferenceGradients, MoreKeysAndMoreQueries) {
  AttentionShape shape = small_shape();
  shape.causal = true, shape.logit_tau = 0, shape.window = 1;
  shape.n_q = 3, shape.n_k = 8;
  expect_gradients(shape, 6);
  shape.n_q = 8, shape.n_k = 3;
  expect_gradients(shape, 7);
}

TEST(ReferenceGradients, GroupedHeadsKeyRangeAndLayouts) {
  AttentionShape shape = small_shape();
  shape.batch = 2, shape.heads_q = 4, shape.heads_kv = 2, shape.logit_tau = 0, shape.n_q = 4, shape.n_k = 5;
  shape.key_range = {1, 4, 0, 0};
  for (Layout layout : {Layout::kTokenMajor, Layout::kPadded}) {
    shape.layout = layout;
    expect_gradients(shape, 8);
  }
}

TEST(ReferenceGradients, BeyondTheClamp) {
  AttentionShape shape = small_shape();
  expect_gradients(shape, 9, 40);
}
