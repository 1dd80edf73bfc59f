// A model, a cluster and a layout for tests of the planner, with plain values to start from.
#pragma once

#include <sluice/plan.h>

namespace sluice_test {

struct PlanProblem {
  sl_plan_model model{};
  sl_plan_cluster cluster{};
  sl_plan_layout layout{};

  PlanProblem() {
    model.size = sizeof model;
    model.layers = 16, model.hidden = 2048, model.heads = 16, model.kv_heads = 8, model.head_dim = 128;
    model.ffn = 8192, model.vocab = 32000, model.sequence = 2048;
    model.gated = 1, model.causal = 1, model.kept_share = 1;

    cluster.size = sizeof cluster;
    cluster.peak_flops = 1e15, cluster.peak_flops_fp8 = 2e15, cluster.memory_bytes = 80e9;
    cluster.memory_bandwidth = 3e12, cluster.gemm_efficiency = 0.7, cluster.gemm_half_size = 100;
    cluster.attention_efficiency_forward = 0.6, cluster.attention_efficiency_backward = 0.5;
    cluster.memory_efficiency = 0.7, cluster.kernel_overhead = 5e-6, cluster.gpus_per_node = 8;
    cluster.intra_bandwidth = 450e9, cluster.intra_latency = 3e-6;
    cluster.inter_bandwidth = 50e9, cluster.inter_latency = 5e-6;
    cluster.link_efficiency = 0.8, cluster.overlap_share = 0.6, cluster.spread = 0.01;

    layout.size = sizeof layout;
    layout.vpp = 1, layout.micro_batch = 1, layout.schedule = SL_PLAN_1F1B;
    layout.fused_attention = layout.fused_loss = layout.fused_accumulation = 1;
    layout.pp_overlap = layout.dp_overlap = 1, layout.tp_overlap = SL_PLAN_OVERLAP_GRADIENTS, layout.zero = 1;
    layout.gradient_bytes = layout.reduce_bytes = 4, layout.state_bytes = 12, layout.margin = 0.05;
    cut(1, 1, 1, 1, 64);
  }
  PlanProblem &cut(int64_t dp, int64_t tp, int64_t pp, int64_t cp, int64_t global_batch) {
    layout.dp = dp, layout.tp = tp, layout.pp = pp, layout.cp = cp, layout.gpus = dp * tp * pp * cp;
    layout.global_batch = global_batch, layout.sequence_parallel = tp > 1;
    return *this;
  }
  sl_status predict(sl_plan_estimate *estimate) const {
    estimate->size = sizeof *estimate;
    return sl_plan_predict(&model, &cluster, &layout, estimate);
  }
};

}  // namespace sluice_test
