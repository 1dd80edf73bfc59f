// Where queries and keys lie in the text: caches longer than the text, and those that let go of its first tokens, give
// what the text alone gives. The formula first, then every tier against it, over several chunks.
#include <gtest/gtest.h>

#include <limits>

#include "support.h"

using namespace sluice_test;

namespace {

const double kNan = std::numeric_limits<double>::quiet_NaN();

AttentionShape text_shape(int64_t n_q, int64_t n_k) {
  AttentionShape shape;
  shape.dtype = SL_F64, shape.heads_q = 2, shape.n_q = n_q, shape.n_k = n_k, shape.causal = true;
  shape.window = 2, shape.sinks = 3, shape.logit_tau = 0.5;
  return shape;
}

void copy(const Tensor &source, int64_t first, Tensor &target, int64_t at) {
  auto [batch, heads, tokens, channels] = target.shape();
  int64_t count = std::min(tokens - at, source.shape()[2] - first);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t c = 0; c < channels; ++c) target.set(0, head, at + t, c, source.get(0, head, first + t, c));
    }
  }
}

void run_reference(AttentionProblem &problem) {
  sl_gated_attention_args args = problem.args();
  ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  ASSERT_EQ(sl_gated_attention_backward_reference(&args), SL_OK) << sl_last_error();
}

// The keys of found from `at` on are those of wanted from `first` on, and have their results; the others have none.
void expect_same(const AttentionProblem &found, int64_t at, const AttentionProblem &wanted, int64_t first) {
  EXPECT_EQ(found.out.values(), wanted.out.values());
  EXPECT_EQ(found.lse.values(), wanted.lse.values());
  EXPECT_EQ(found.dq.values(), wanted.dq.values());
  EXPECT_EQ(found.da.values(), wanted.da.values());
  const std::pair<const Tensor *, const Tensor *> keyed[] = {
      {&found.dk, &wanted.dk}, {&found.dv, &wanted.dv}, {&found.db, &wanted.db}};
  for (auto &[got, want] : keyed) {
    got->for_each([&, got = got, want = want](int64_t batch, int64_t head, int64_t t, int64_t c) {
      int64_t key = t - at + first;
      bool there = t >= at && key < want->shape()[2];
      EXPECT_EQ(got->get(batch, head, t, c), there ? want->get(batch, head, key, c) : 0) << t;
    });
  }
}

}  // namespace

TEST(ReferencePlaces, ACacheLongerThanTheTextIsTheText) {
  for (auto [n_q, past] : {std::pair<int64_t, int64_t>{1, 6}, {4, 3}, {7, 0}}) {
    AttentionProblem wanted(text_shape(n_q, past + n_q), 1);
    run_reference(wanted);
    AttentionShape shape = text_shape(n_q, 12);
    shape.q_offset = {past};
    AttentionProblem found(shape, 2);
    for (auto [source, target] : {std::pair{&wanted.q, &found.q},
                                  {&wanted.k, &found.k},
                                  {&wanted.v, &found.v},
                                  {&wanted.a, &found.a},
                                  {&wanted.b, &found.b},
                                  {&wanted.dout, &found.dout}}) {
      copy(*source, 0, *target, 0);
    }
    run_reference(found);
    expect_same(found, 0, wanted, 0);
  }
}

TEST(ReferencePlaces, ACacheThatLostTheFirstTokensHasTheSinksThatAreLeft) {
  for (int64_t lost : {1, 2, 3, 5}) {
    AttentionShape shape = text_shape(4, 10);
    shape.key_range = {lost, 10}, shape.text_begin = {0};
    AttentionProblem wanted(shape, 1);
    run_reference(wanted);
    shape = text_shape(4, 10 - lost);
    shape.text_begin = {-lost};
    AttentionProblem found(shape, 2);
    for (auto [source, target] : {std::pair{&wanted.k, &found.k}, {&wanted.v, &found.v}, {&wanted.b, &found.b}}) {
      copy(*source, lost, *target, 0);
    }
    for (auto [source, target] : {std::pair{&wanted.q, &found.q}, {&wanted.a, &found.a}, {&wanted.dout, &found.dout}}) {
      copy(*source, 0, *target, 0);
    }
    run_reference(found);
    expect_same(found, 0, wanted, lost);
  }
}

// Without causality the offset moves the window alone.
TEST(ReferencePlaces, TheWindowFollowsTheQueries) {
  AttentionShape shape = text_shape(2, 6);
  shape.causal = false, shape.window = 1, shape.sinks = 0, shape.logit_tau = 79, shape.q_offset = {1};
  AttentionProblem problem(shape, 1);
  run_reference(problem);
  for (int64_t query : {0, 1}) {
    for (int64_t c = 0; c < 8; ++c) EXPECT_EQ(problem.out.get(0, 0, query, c), problem.v.get(0, 0, query + 1, c));
  }
}

class Places : public testing::TestWithParam<sl_isa> {
 protected:
  void SetUp() override {
    if (GetParam() > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(GetParam());
    cap.emplace(GetParam());
  }
  std::optional<IsaCap> cap;
};

TEST_P(Places, SeveralChunksOfALongCacheWhoseEndIsNotThereYet) {
  struct Case {
    int64_t n_q, n_k, offset, window, sinks, lost;
    bool causal;
    double tau;
  } cases[] = {{600, 1900, 0, 0, 0, 0, true, 1.5},   {600, 1900, 411, 0, 0, 0, true, -100},
               {430, 1500, 700, 130, 5, 3, true, 2}, {300, 900, 299, 40, 3, 0, true, -100},
               {500, 900, 20, 70, 3, 0, false, 2},   {3, 900, 500, 0, 0, 0, true, 0.5},
               {3, 900, 500, 6, 9, 4, true, 2},      {40, 900, 860, 0, 4, 2000, true, 2}};
  for (const Case &row : cases) {
    AttentionShape shape;
    shape.n_q = row.n_q, shape.n_k = row.n_k, shape.window = row.window, shape.sinks = row.sinks;
    shape.causal = row.causal, shape.logit_tau = row.tau, shape.q_offset = {row.offset};
    shape.text_begin = {-row.lost}, shape.head_dim = 3, shape.head_dim_v = 2;
    SCOPED_TRACE(shape.text() + " on " + sl_gated_attention_kernel_name(shape.dtype));
    AttentionProblem problem(shape, 5);
    if (row.causal) {  // what a cache holds behind the text is anything
      problem.k.for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) {
        if (t < row.offset + row.n_q) return;
        problem.k.set(i, j, t, c, kNan), problem.v.set(i, j, t, c, kNan), problem.b.set(i, j, t, 0, kNan);
      });
    }
    run_reference(problem);
    AttentionProblem found(shape, 5);
    copy(problem.k, 0, found.k, 0), copy(problem.v, 0, found.v, 0), copy(problem.b, 0, found.b, 0);
    ThreadExecutor threads(2);
    ASSERT_EQ(found.run_forward(threads.get()), SL_OK) << sl_last_error();
    ASSERT_EQ(found.run_backward(threads.get()), SL_OK) << sl_last_error();
    EXPECT_EQ(found.damage(), "");
    const std::pair<const char *, Tensor AttentionProblem::*> results[] = {
        {"out", &AttentionProblem::out}, {"lse", &AttentionProblem::lse}, {"dq", &AttentionProblem::dq},
        {"dk", &AttentionProblem::dk},   {"dv", &AttentionProblem::dv},   {"da", &AttentionProblem::da},
        {"db", &AttentionProblem::db}};
    for (auto &[name, tensor] : results) {
      Distance distance = measure_distance((found.*tensor).values(), (problem.*tensor).values(), 0.1);
      EXPECT_TRUE(distance.same_specials) << name;
      EXPECT_LT(distance.relative_maximum, 5e-5) << name;
      EXPECT_LT(distance.relative_rms, 1e-5) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Attention, Places, testing::Values(SL_ISA_SCALAR, SL_ISA_AVX2, SL_ISA_AVX512),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });
