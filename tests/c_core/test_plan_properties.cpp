// What holds for every layout: parts add up, better hardware is never slower, less work never costs more.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "plan_problem.h"

namespace sluice_test {
namespace {

// Random layouts of a random model, with every option at random; those that can't be cut are drawn again.
PlanProblem draw(std::mt19937 &random) {
  auto pick = [&](std::vector<int64_t> values) { return values[random() % values.size()]; };
  auto flag = [&] { return static_cast<int32_t>(random() % 2); };
  for (;;) {
    PlanProblem p;
    p.model.layers = pick({8, 24, 96}), p.model.heads = pick({8, 32}), p.model.kv_heads = pick({2, 8});
    p.model.hidden = p.model.heads * 128, p.model.ffn = p.model.hidden * 4, p.model.sequence = pick({1024, 8192});
    p.model.gated = flag(), p.model.tied = flag(), p.model.dropout = flag(), p.model.causal = flag();
    p.cut(pick({1, 2, 16}), pick({1, 2, 8}), pick({1, 2, 8}), pick({1, 2, 4}), pick({16, 128}));
    p.layout.micro_batch = pick({1, 2, 4}), p.layout.vpp = pick({1, 1, 3});
    p.layout.schedule = p.layout.vpp > 1 ? SL_PLAN_INTERLEAVED : static_cast<sl_plan_schedule>(random() % 2);
    p.layout.recompute = static_cast<sl_plan_recompute>(random() % 3);
    p.layout.precision = static_cast<sl_plan_precision>(random() % 2);
    p.layout.exchange = static_cast<sl_plan_exchange>(random() % 2);
    p.layout.tp_overlap = static_cast<sl_plan_overlap>(random() % 3);
    p.layout.zero = static_cast<int32_t>(random() % 4);
    p.layout.sequence_parallel = flag(), p.layout.fused_attention = flag(), p.layout.fused_loss = flag();
    p.layout.fused_accumulation = flag(), p.layout.pp_overlap = flag(), p.layout.dp_overlap = flag();
    if (sl_plan_check(&p.model, &p.cluster, &p.layout) == SL_OK) return p;
  }
}

double step(const PlanProblem &problem) {
  sl_plan_estimate estimate{};
  EXPECT_EQ(problem.predict(&estimate), SL_OK) << sl_last_error();
  return estimate.step_s;
}

double bytes(const PlanProblem &problem) {
  sl_plan_estimate estimate{};
  EXPECT_EQ(problem.predict(&estimate), SL_OK) << sl_last_error();
  return estimate.total_bytes;
}

constexpr double kRounding = 1 + 1e-12;

TEST(PlanProperties, PartsAddUpAndNoneIsNegative) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    sl_plan_estimate e{};
    ASSERT_EQ(draw(random).predict(&e), SL_OK);
    double seconds = 0, sizes = 0;
    for (double part :
         {e.compute_s, e.recompute_s, e.tp_s, e.cp_s, e.pp_s, e.bubble_s, e.spread_s, e.dp_s, e.optimizer_s}) {
      EXPECT_GE(part, 0);
      seconds += part;
    }
    for (double part :
         {e.weight_bytes, e.gradient_bytes, e.state_bytes, e.activation_bytes, e.temporary_bytes, e.margin_bytes}) {
      EXPECT_GE(part, 0);
      sizes += part;
    }
    EXPECT_NEAR(e.step_s / seconds, 1, 1e-12);
    EXPECT_NEAR(e.total_bytes / sizes, 1, 1e-12);
    EXPECT_GT(e.mfu, 0);
    EXPECT_LT(e.mfu, 1);
    EXPECT_LE(e.model_flops, e.hardware_flops * kRounding);
  }
}

TEST(PlanProperties, BetterHardwareIsNeverSlower) {
  std::mt19937 random(2);
  double sl_plan_cluster::*const better[] = {
      &sl_plan_cluster::peak_flops,      &sl_plan_cluster::peak_flops_fp8,  &sl_plan_cluster::memory_bandwidth,
      &sl_plan_cluster::intra_bandwidth, &sl_plan_cluster::inter_bandwidth,
  };
  double sl_plan_cluster::*const worse[] = {
      &sl_plan_cluster::intra_latency,  &sl_plan_cluster::inter_latency, &sl_plan_cluster::kernel_overhead,
      &sl_plan_cluster::gemm_half_size, &sl_plan_cluster::spread,
  };
  for (int i = 0; i < 2000; ++i) {
    PlanProblem problem = draw(random);
    double before = step(problem);
    for (auto member : better) {
      PlanProblem changed = problem;
      changed.cluster.*member *= 1 + static_cast<double>(random() % 1000) / 100;
      EXPECT_LE(step(changed), before * kRounding) << "draw " << i;
    }
    for (auto member : worse) {
      PlanProblem changed = problem;
      changed.cluster.*member *= 1 + static_cast<double>(random() % 1000) / 100;
      EXPECT_GE(step(changed) * kRounding, before) << "draw " << i;
    }
    PlanProblem changed = problem;
    changed.cluster.overlap_share = 1;
    EXPECT_LE(step(changed), before * kRounding);
  }
}

TEST(PlanProperties, RecomputationTradesTimeForMemory) {
  std::mt19937 random(3);
  for (int i = 0; i < 1000; ++i) {
    PlanProblem keep = draw(random);
    keep.layout.recompute = SL_PLAN_KEEP;
    PlanProblem selective = keep, full = keep;
    selective.layout.recompute = SL_PLAN_SELECTIVE, full.layout.recompute = SL_PLAN_FULL;
    EXPECT_LE(step(keep), step(selective) * kRounding);
    EXPECT_LE(step(selective), step(full) * kRounding);
    sl_plan_estimate kept{}, some{}, all{};
    ASSERT_EQ(keep.predict(&kept) + selective.predict(&some) + full.predict(&all), SL_OK);
    if (keep.layout.pp == 1) { /* with stages, the fullest may be another one */
      EXPECT_LE(some.activation_bytes, kept.activation_bytes);
      EXPECT_LE(all.activation_bytes, some.activation_bytes);
    }
  }
}

TEST(PlanProperties, LessToKeepNeedsNoMoreMemoryOrTime) {
  std::mt19937 random(4);
  for (int i = 0; i < 1000; ++i) {
    PlanProblem problem = draw(random);
    for (auto member : {&sl_plan_layout::gradient_bytes, &sl_plan_layout::reduce_bytes, &sl_plan_layout::state_bytes}) {
      PlanProblem changed = problem;
      changed.layout.*member /= 2;
      EXPECT_LE(bytes(changed), bytes(problem) * kRounding);
      EXPECT_LE(step(changed), step(problem) * kRounding);
    }
    PlanProblem sparse = problem;
    sparse.model.kept_share = 0.25;
    EXPECT_LE(step(sparse), step(problem) * kRounding);
    if (problem.layout.zero < 3) {
      PlanProblem sharded = problem;
      sharded.layout.zero += 1;
      if (sharded.layout.zero < 3) {
        EXPECT_LE(bytes(sharded), bytes(problem) * kRounding);
      }
    }
  }
}

}  // namespace
}  // namespace sluice_test
