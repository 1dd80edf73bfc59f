// The planner's cost model: FLOPs and memory against counts by hand, the pipeline's closed form, bad input by name.
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "plan_problem.h"

extern "C" {
#include "plan/collective.h"
#include "plan/operator.h"
}

namespace sluice_test {
namespace {

sl_plan_estimate predict(const PlanProblem &problem) {
  sl_plan_estimate estimate{};
  EXPECT_EQ(problem.predict(&estimate), SL_OK) << sl_last_error();
  return estimate;
}

double parts(const sl_plan_estimate &e) {
  return e.compute_s + e.recompute_s + e.tp_s + e.cp_s + e.pp_s + e.bubble_s + e.spread_s + e.dp_s + e.optimizer_s;
}

TEST(Plan, FlopsAreThoseCountedByHand) {
  PlanProblem problem;
  problem.model.causal = 0;
  double tokens = 64.0 * 2048, h = 2048, weights = h * 128 * (2 * 16 + 2 * 8) + 3 * h * 8192;
  double attention = 4 * 2048.0 * 2048; /* per token: scores and values over all keys */
  double expected = 3 * tokens * (16 * (2 * weights + attention) + 2 * h * 32000);
  EXPECT_DOUBLE_EQ(predict(problem).model_flops, expected);
  problem.model.gated = 0;
  EXPECT_DOUBLE_EQ(predict(problem).model_flops, expected - 3 * tokens * 16 * 2 * h * 8192);
}

TEST(Plan, FlopsOfKorthikantisFormula) {
  PlanProblem problem; /* 72 B L s h^2 (1 + s / 6h + V / 12 h L), appendix A, equation 7 */
  problem.model.causal = problem.model.gated = 0, problem.model.kv_heads = problem.model.heads;
  double b = 64, l = 16, s = 2048, h = 2048, v = 32000;
  double expected = 72 * b * l * s * h * h * (1 + s / (6 * h) + v / (12 * h * l));
  EXPECT_NEAR(predict(problem).model_flops / expected, 1, 1e-12);
}

TEST(Plan, HardwareFlopsCountWhatIsComputedAgain) {
  PlanProblem problem;
  double kept = predict(problem).hardware_flops;
  problem.layout.recompute = SL_PLAN_FULL;
  sl_plan_estimate full = predict(problem);
  double head = 3 * 64.0 * 2048 * 2 * 2048 * 32000;
  double attention = 3.5 * 64 * 2048 * 16 * 4 * 2048 * 2048 * (2049.0 / 4096);
  double linear = kept - head - attention;
  EXPECT_NEAR((full.hardware_flops - kept) / (linear / 3 + attention / 3.5), 1, 1e-12);
  EXPECT_DOUBLE_EQ(full.model_flops, predict(PlanProblem()).model_flops);
}

TEST(Plan, FlopsAreConservedOverSplits) {
  double whole = predict(PlanProblem()).model_flops;
  for (int64_t dp : {1, 2, 8})
    for (int64_t tp : {1, 2, 8})
      for (int64_t pp : {1, 4, 16})
        for (int64_t cp : {1, 4})
          for (int64_t micro : {1, 4}) {
            PlanProblem problem;
            problem.cut(dp, tp, pp, cp, 64).layout.micro_batch = micro;
            sl_plan_estimate estimate = predict(problem);
            EXPECT_NEAR(estimate.model_flops / whole, 1, 1e-12);
            EXPECT_NEAR(estimate.hardware_flops / predict(PlanProblem()).hardware_flops, 1, 1e-12);
          }
}

TEST(Plan, ParametersAreThoseCountedByHand) {
  PlanProblem problem;
  double layer = 2048.0 * 128 * (2 * 16 + 2 * 8) + 3 * 2048.0 * 8192 + 2 * 2048;
  EXPECT_DOUBLE_EQ(predict(problem).parameters, 16 * layer + 2 * 2048.0 * 32000);
  problem.model.tied = 1;
  EXPECT_DOUBLE_EQ(predict(problem).parameters, 16 * layer + 2048.0 * 32000);
}

TEST(Plan, TheBubbleIsTheClosedFormOnEvenStages) {
  PlanProblem problem;
  problem.cut(1, 1, 8, 1, 64);
  problem.model.vocab = 1; /* the head and the embedding weigh next to nothing */
  problem.cluster.kernel_overhead = 0;
  for (int64_t vpp : {1, 2}) {
    problem.layout.vpp = vpp, problem.layout.schedule = vpp > 1 ? SL_PLAN_INTERLEAVED : SL_PLAN_1F1B;
    sl_plan_estimate estimate = predict(problem);
    double closed_form = 7.0 / (64.0 * static_cast<double>(vpp));
    EXPECT_NEAR(estimate.bubble_s / estimate.compute_s / closed_form, 1, 0.01);
  }
  problem.layout.schedule = SL_PLAN_GPIPE, problem.layout.vpp = 1;
  EXPECT_NEAR(predict(problem).bubble_s / predict(problem).compute_s / (7.0 / 64), 1, 0.01);
}

TEST(Plan, OneStageHasNoBubbleAndNoTraffic) {
  sl_plan_estimate estimate = predict(PlanProblem());
  EXPECT_EQ(estimate.bubble_s, 0);
  EXPECT_EQ(estimate.pp_s, 0);
  EXPECT_EQ(estimate.tp_s, 0);
  EXPECT_EQ(estimate.cp_s, 0);
  EXPECT_EQ(estimate.dp_s, 0);
  EXPECT_EQ(estimate.spread_s, 0);
  EXPECT_DOUBLE_EQ(parts(estimate), estimate.step_s);
}

TEST(Plan, ActivationsOfKorthikanti) {
  PlanProblem problem; /* s b h (34 + 5 a s / h) a layer, section 4.1; /t with sequence parallel, section 4.2.2 */
  problem.model.gated = 0, problem.model.dropout = 1, problem.model.kv_heads = problem.model.heads;
  problem.model.ffn = 4 * problem.model.hidden;
  problem.layout.fused_attention = 0, problem.layout.global_batch = 1;
  double sbh = 2048.0 * 2048, layers = 16, pairs = 5.0 * 16 * 2048 / 2048;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, layers * sbh * (34 + pairs));
  problem.layout.recompute = SL_PLAN_SELECTIVE;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, layers * sbh * 34);
  problem.layout.recompute = SL_PLAN_FULL;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, layers * sbh * 2);
  problem.cut(1, 4, 1, 1, 1).layout.recompute = SL_PLAN_KEEP;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, layers * sbh * (34 + pairs) / 4);
  problem.layout.sequence_parallel = 0;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, layers * sbh * (10 + (24 + pairs) / 4));
}

TEST(Plan, SchedulesKeepWhatTheyHaveInFlight) {
  PlanProblem problem;
  problem.cut(1, 1, 4, 1, 64);
  double one_f_one_b = predict(problem).activation_bytes; /* 4 micro-batches of 4 layers */
  problem.layout.schedule = SL_PLAN_GPIPE;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, one_f_one_b * 16);
  problem.layout.schedule = SL_PLAN_INTERLEAVED, problem.layout.vpp = 2;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, one_f_one_b * (1 + 3.0 / (4 * 2)));
  problem.layout.global_batch = 2, problem.layout.vpp = 1, problem.layout.schedule = SL_PLAN_1F1B;
  EXPECT_DOUBLE_EQ(predict(problem).activation_bytes, one_f_one_b / 2);
}

TEST(Plan, ZeroShardsStateThenGradientsThenWeights) {
  PlanProblem problem;
  problem.cut(8, 1, 1, 1, 64);
  double parameters = predict(problem).parameters;
  for (int zero = 0; zero <= 3; ++zero) {
    problem.layout.zero = zero;
    sl_plan_estimate estimate = predict(problem);
    EXPECT_DOUBLE_EQ(estimate.state_bytes, 12 * parameters / (zero >= 1 ? 8 : 1));
    EXPECT_DOUBLE_EQ(estimate.gradient_bytes, 4 * parameters / (zero >= 2 ? 8 : 1));
    EXPECT_DOUBLE_EQ(estimate.weight_bytes, 2 * parameters / (zero >= 3 ? 8 : 1));
  }
}

TEST(Plan, CollectivesMoveWhatTheirAlgorithmSays) {
  PlanProblem problem;
  sl_plan_cluster cluster = problem.cluster;
  cluster.link_efficiency = 1, cluster.kernel_overhead = cluster.intra_latency = cluster.inter_latency = 0;
  double bytes = 8e9;
  EXPECT_DOUBLE_EQ(sl_plan_gather_s(&cluster, {8, 1}, bytes), bytes * 7 / 8 / 450e9);
  EXPECT_DOUBLE_EQ(sl_plan_gather_s(&cluster, {16, 1}, bytes), bytes * 15 / 16 / 400e9); /* eight rails */
  EXPECT_DOUBLE_EQ(sl_plan_gather_s(&cluster, {16, 4}, bytes), bytes * 15 / 16 / 100e9); /* two of a host's ranks */
  EXPECT_DOUBLE_EQ(sl_plan_gather_s(&cluster, {16, 8}, bytes), bytes * 15 / 16 / 50e9);
  EXPECT_DOUBLE_EQ(sl_plan_all_reduce_s(&cluster, {8, 1}, bytes), 2 * bytes * 7 / 8 / 450e9);
  EXPECT_DOUBLE_EQ(sl_plan_all_to_all_s(&cluster, {8, 1}, bytes), bytes * 7 / 8 / 450e9);
  EXPECT_DOUBLE_EQ(sl_plan_all_to_all_s(&cluster, {16, 1}, bytes), bytes * 8 / 16 / 50e9);
  EXPECT_DOUBLE_EQ(sl_plan_send_s(&cluster, {4, 8}, bytes), bytes / 50e9);
  cluster.intra_latency = 1e-6, cluster.inter_latency = 1e-5; /* a short message over many: the tree wins */
  EXPECT_NEAR(sl_plan_all_reduce_s(&cluster, {1024, 8}, 8), 2 * 10 * 1e-5, 1e-8);
  EXPECT_NEAR(sl_plan_gather_s(&cluster, {16, 1}, 0), 7e-6 + 1e-5, 1e-12);
}

TEST(Plan, OperatorsFollowTheRoofline) {
  PlanProblem problem;
  problem.cluster.gemm_half_size = 0, problem.cluster.kernel_overhead = 1e-6;
  sl_plan_cost large{}, thin{}, pass{};
  sl_plan_add_product(&large, &problem.cluster, SL_PLAN_BF16, 1, 8192, 8192, 8192, 2);
  EXPECT_DOUBLE_EQ(large.seconds, 2 * std::pow(8192.0, 3) / 0.7e15 + 1e-6);
  sl_plan_add_product(&thin, &problem.cluster, SL_PLAN_BF16, 1, 1, 8192, 8192, 2);
  EXPECT_DOUBLE_EQ(thin.seconds, (2 * 8192.0 * 8193 + 2 * 8192) / 2.1e12 + 1e-6);
  sl_plan_add_pass(&pass, &problem.cluster, 2.1e9);
  EXPECT_DOUBLE_EQ(pass.seconds, 1e-3 + 1e-6);
}

TEST(Plan, BadInputIsNamed) {
  auto refuses = [](auto change, const std::string &text) {
    PlanProblem problem;
    change(problem);
    sl_plan_estimate estimate{};
    EXPECT_EQ(problem.predict(&estimate), SL_INVALID_ARGUMENT);
    EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos) << sl_last_error();
    EXPECT_EQ(sl_plan_check(&problem.model, &problem.cluster, &problem.layout), SL_INVALID_ARGUMENT);
  };
  refuses([](PlanProblem &p) { p.layout.gpus = 0; }, "layout->gpus is 0, expected 1 to 2^40");
  refuses([](PlanProblem &p) { p.layout.gpus = 3; }, "layout->gpus is 3, expected dp * tp * pp * cp = 1");
  refuses([](PlanProblem &p) { p.cut(1, 3, 1, 1, 64); }, "model->heads is 16, expected a multiple of layout->tp = 3");
  refuses([](PlanProblem &p) { p.cut(1, 1, 3, 1, 64); },
          "model->layers is 16, expected a multiple of layout->pp * layout->vpp = 3");
  refuses([](PlanProblem &p) { p.cut(3, 1, 1, 1, 64); },
          "layout->global_batch is 64, expected a multiple of layout->dp * layout->micro_batch = 3");
  refuses([](PlanProblem &p) { p.cut(128, 1, 1, 1, 64); }, "expected at least dp * micro_batch = 128");
  refuses([](PlanProblem &p) { p.layout.vpp = 2; }, "layout->vpp is 2, expected 1 unless");
  refuses([](PlanProblem &p) { p.model.kv_heads = 5; }, "model->heads is 16, expected a multiple of model->kv_heads");
  refuses([](PlanProblem &p) { p.model.kept_share = 0; }, "model->kept_share is 0, expected a number above 0");
  refuses([](PlanProblem &p) { p.cluster.peak_flops = NAN; }, "cluster->peak_flops is nan");
  refuses([](PlanProblem &p) { p.cluster.memory_efficiency = 1.5; }, "memory_efficiency is 1.5, expected above 0 to 1");
  refuses([](PlanProblem &p) { p.cluster.size = 8; }, "cluster.size is 8, expected sizeof(sl_plan_cluster)");
  refuses([](PlanProblem &p) { p.layout.zero = 4; }, "layout->zero is 4, expected 0 to 3");
  refuses([](PlanProblem &p) { p.layout.pp_overlap = 2; }, "layout->pp_overlap is 2, expected 0 or 1");
  refuses([](PlanProblem &p) { p.layout.schedule = static_cast<sl_plan_schedule>(7); }, "layout->schedule is 7");
  PlanProblem problem;
  sl_plan_estimate estimate{};
  EXPECT_EQ(sl_plan_predict(nullptr, &problem.cluster, &problem.layout, &estimate), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_plan_predict(&problem.model, &problem.cluster, &problem.layout, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_plan_predict(&problem.model, &problem.cluster, &problem.layout, &estimate), SL_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(sl_last_error()).substr(0, 18), "estimate.size is 0");
}

}  // namespace
}  // namespace sluice_test
