// The planner's search against brute force on small spaces, its order, what it says where nothing fits, bad input.
#include <gtest/gtest.h>

#include <sluice/plan_search.h>

#include <algorithm>
#include <string>
#include <vector>

#include "plan_problem.h"

namespace sluice_test {
namespace {

sl_plan_space whole_space() {
  sl_plan_range any{1, 1 << 20};
  return {sizeof(sl_plan_space), any, any, any, {1, 4}, {1, 8}, {1, 8}, {SL_PLAN_KEEP, SL_PLAN_FULL}, {0, 3}};
}

struct Answer {
  std::vector<sl_plan_candidate> candidates;
  sl_plan_found found{};
};

Answer search(const PlanProblem &problem, const sl_plan_space &space, int64_t capacity) {
  Answer answer;
  answer.candidates.resize(static_cast<size_t>(capacity));
  answer.found.size = sizeof answer.found;
  EXPECT_EQ(sl_plan_search(&problem.model, &problem.cluster, &problem.layout, &space, answer.candidates.data(),
                           capacity, &answer.found),
            SL_OK)
      << sl_last_error();
  answer.candidates.resize(static_cast<size_t>(answer.found.count));
  return answer;
}

bool within(sl_plan_range range, int64_t value) { return range.least <= value && value <= range.most; }

// Every number up to the GPUs and the batch for every axis, in the order that the contract names.
std::vector<sl_plan_candidate> brute_force(const PlanProblem &problem, const sl_plan_space &space) {
  std::vector<sl_plan_candidate> all;
  int64_t gpus = problem.layout.gpus;
  for (int64_t tp = 1; tp <= gpus; ++tp)
    for (int64_t cp = 1; cp <= gpus; ++cp)
      for (int64_t pp = 1; pp <= gpus && gpus % (tp * cp) == 0; ++pp)
        for (int64_t micro = 1; micro <= problem.layout.global_batch; ++micro)
          for (int64_t vpp = 1; vpp <= problem.model.layers; ++vpp)
            for (int recompute = 0; recompute <= 2; ++recompute)
              for (int zero = 0; zero <= 3; ++zero) {
                if (gpus % (tp * cp * pp) || (vpp > 1 && pp == 1)) continue;
                PlanProblem p = problem;
                p.layout.tp = tp, p.layout.cp = cp, p.layout.pp = pp, p.layout.dp = gpus / (tp * cp * pp);
                p.layout.micro_batch = micro, p.layout.vpp = vpp, p.layout.zero = zero;
                p.layout.schedule = vpp > 1 ? SL_PLAN_INTERLEAVED : SL_PLAN_1F1B;
                p.layout.recompute = static_cast<sl_plan_recompute>(recompute);
                p.layout.sequence_parallel = tp > 1 && p.model.sequence % (tp * cp) == 0;
                if (!within(space.dp, p.layout.dp) || !within(space.tp, tp) || !within(space.pp, pp) ||
                    !within(space.cp, cp) || !within(space.vpp, vpp) || !within(space.micro_batch, micro) ||
                    !within(space.recompute, recompute) || !within(space.zero, zero))
                  continue;
                sl_plan_candidate candidate{p.layout, {}};
                if (p.predict(&candidate.estimate) == SL_OK && candidate.estimate.total_bytes <= p.cluster.memory_bytes)
                  all.push_back(candidate);
              }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto &a, const auto &b) { return a.estimate.step_s < b.estimate.step_s; });
  return all;
}

void expect_same(const Answer &answer, const std::vector<sl_plan_candidate> &expected, size_t capacity) {
  ASSERT_EQ(answer.candidates.size(), std::min(expected.size(), capacity));
  for (size_t i = 0; i < answer.candidates.size(); ++i) {
    const sl_plan_layout &a = answer.candidates[i].layout, &b = expected[i].layout;
    EXPECT_EQ(answer.candidates[i].estimate.step_s, expected[i].estimate.step_s) << i;
    EXPECT_EQ(std::vector<int64_t>({a.tp, a.cp, a.pp, a.dp, a.micro_batch, a.vpp, a.recompute, a.zero}),
              std::vector<int64_t>({b.tp, b.cp, b.pp, b.dp, b.micro_batch, b.vpp, b.recompute, b.zero}))
        << i;
  }
}

TEST(PlanSearch, EqualsBruteForce) {
  for (int64_t gpus : {1, 6, 16})
    for (double memory : {8e9, 20e9, 1e12})
      for (size_t capacity : {1, 5, 20000}) {
        PlanProblem problem;
        problem.model.layers = 12, problem.layout.gpus = gpus, problem.layout.global_batch = 24;
        problem.layout.sequence_parallel = 1, problem.cluster.memory_bytes = memory;
        sl_plan_space space = whole_space();
        Answer answer = search(problem, space, static_cast<int64_t>(capacity));
        expect_same(answer, brute_force(problem, space), capacity);
        if (capacity == 1) {
          EXPECT_LE(answer.found.predicted, search(problem, space, 20000).found.predicted);
        }
      }
}

TEST(PlanSearch, EqualsBruteForceInNarrowSpaces) {
  PlanProblem problem;
  problem.model.layers = 12, problem.layout.gpus = 12, problem.layout.global_batch = 24;
  problem.layout.sequence_parallel = 1;
  sl_plan_range sl_plan_space::*const axes[] = {&sl_plan_space::dp, &sl_plan_space::tp,  &sl_plan_space::pp,
                                                &sl_plan_space::cp, &sl_plan_space::vpp, &sl_plan_space::micro_batch};
  for (auto axis : axes) {
    sl_plan_space space = whole_space();
    space.*axis = {2, 2};
    std::vector<sl_plan_candidate> expected = brute_force(problem, space);
    ASSERT_FALSE(expected.empty());
    expect_same(search(problem, space, 3), expected, 3);
  }
  sl_plan_space space = whole_space();
  space.recompute = {SL_PLAN_FULL, SL_PLAN_FULL}, space.zero = {2, 3};
  expect_same(search(problem, space, 3), brute_force(problem, space), 3);
}

TEST(PlanSearch, SaysWhatNeedsLeastWhereNothingFits) {
  PlanProblem problem;
  problem.layout.gpus = 8, problem.layout.global_batch = 16, problem.layout.sequence_parallel = 1;
  problem.cluster.memory_bytes = 1e6;
  Answer answer = search(problem, whole_space(), 4);
  EXPECT_EQ(answer.found.count, 0);
  problem.cluster.memory_bytes = answer.found.smallest.estimate.total_bytes;
  EXPECT_GE(search(problem, whole_space(), 4).found.count, 1);
}

TEST(PlanSearch, ATrillionParametersOnAThousandGpus) {
  PlanProblem problem;
  problem.model.layers = 128, problem.model.hidden = 25600, problem.model.heads = 160, problem.model.kv_heads = 160;
  problem.model.head_dim = 160, problem.model.ffn = 102400, problem.model.gated = 0, problem.model.vocab = 51200;
  problem.layout.gpus = 1024, problem.layout.global_batch = 1024, problem.layout.sequence_parallel = 1;
  sl_plan_space space = whole_space();
  space.tp.most = 8;
  Answer answer = search(problem, space, 8);
  ASSERT_EQ(answer.found.count, 8);
  EXPECT_LE(answer.candidates[0].estimate.total_bytes, 80e9);
  EXPECT_GE(answer.candidates[0].layout.pp * answer.candidates[0].layout.tp, 32); /* 16 TB of weights and state */
}

TEST(PlanSearch, BadInputIsNamed) {
  PlanProblem problem;
  sl_plan_space space = whole_space();
  sl_plan_found found{};
  auto refuses = [&](sl_plan_space wrong, int64_t gpus, const std::string &text) {
    found.size = sizeof found;
    PlanProblem changed = problem;
    changed.layout.gpus = gpus;
    EXPECT_EQ(sl_plan_search(&changed.model, &changed.cluster, &changed.layout, &wrong, nullptr, 0, &found),
              SL_INVALID_ARGUMENT);
    EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos) << sl_last_error();
  };
  refuses(space, 0, "layout->gpus is 0, expected 1 to 2^20");
  sl_plan_space wrong = space;
  wrong.tp = {4, 2};
  refuses(wrong, 8, "space.tp is 4 to 2, expected a range within 1 to");
  wrong = space, wrong.zero = {0, 4};
  refuses(wrong, 8, "space.zero is 0 to 4, expected a range within 0 to 3");
  wrong = space, wrong.size = 1;
  refuses(wrong, 8, "space.size is 1, expected sizeof(sl_plan_space)");
  refuses(space, 7919, "layout->gpus is 7919, expected a number that some dp, tp, pp and cp of the space cut");
  found.size = sizeof found;
  EXPECT_EQ(sl_plan_search(&problem.model, &problem.cluster, &problem.layout, &space, nullptr, 3, &found),
            SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_plan_search(&problem.model, &problem.cluster, nullptr, &space, nullptr, 0, &found), SL_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace sluice_test
