/* Checks of what the planner is given: every message names the argument, its value and what was expected. */
#include "plan/validate.h"

#include <math.h>

#include "runtime/status.h"

static const int64_t largest_count = INT64_C(1) << 40;

#define CHECK_SIZE(name, type)                                                                                        \
  SL_REQUIRE(name, SL_INVALID_ARGUMENT, #name " is NULL, expected an " #type);                                        \
  SL_REQUIRE(name->size == sizeof(type), SL_INVALID_ARGUMENT, #name ".size is %zu, expected sizeof(" #type ") = %zu", \
             name->size, sizeof(type))

#define CHECK_COUNT(name) SL_CHECK(check_count(#name, name))
#define CHECK_FLAG(name) \
  SL_REQUIRE(name == 0 || name == 1, SL_INVALID_ARGUMENT, #name " is %d, expected 0 or 1", (int)name)
#define CHECK_RANGE(name, least, most) SL_CHECK(check_range(#name, name, least, most))
#define CHECK_POSITIVE(name) \
  SL_REQUIRE(isfinite(name) && name > 0, SL_INVALID_ARGUMENT, #name " is %g, expected a number above 0", name)

static sl_status check_count(const char *name, int64_t value) {
  SL_REQUIRE(value >= 1 && value <= largest_count, SL_INVALID_ARGUMENT, "%s is %lld, expected 1 to 2^40", name,
             (long long)value);
  return SL_OK;
}

static sl_status check_range(const char *name, double value, double least, double most) {
  SL_REQUIRE(value >= least && value <= most && isfinite(value), SL_INVALID_ARGUMENT, "%s is %g, expected %g to %g",
             name, value, least, most);
  return SL_OK;
}

static sl_status check_multiple(const char *name, int64_t value, const char *divisor_name, int64_t divisor) {
  SL_REQUIRE(value % divisor == 0, SL_INVALID_ARGUMENT, "%s is %lld, expected a multiple of %s = %lld", name,
             (long long)value, divisor_name, (long long)divisor);
  return SL_OK;
}

static sl_status check_model(const sl_plan_model *model) {
  CHECK_SIZE(model, sl_plan_model);
  CHECK_COUNT(model->layers);
  CHECK_COUNT(model->hidden);
  CHECK_COUNT(model->heads);
  CHECK_COUNT(model->kv_heads);
  CHECK_COUNT(model->head_dim);
  CHECK_COUNT(model->ffn);
  CHECK_COUNT(model->vocab);
  CHECK_COUNT(model->sequence);
  SL_CHECK(check_multiple("model->heads", model->heads, "model->kv_heads", model->kv_heads));
  CHECK_FLAG(model->gated);
  CHECK_FLAG(model->tied);
  CHECK_FLAG(model->dropout);
  CHECK_FLAG(model->causal);
  CHECK_POSITIVE(model->kept_share);
  CHECK_RANGE(model->kept_share, 0, 1);
  return SL_OK;
}

static sl_status check_cluster(const sl_plan_cluster *cluster) {
  CHECK_SIZE(cluster, sl_plan_cluster);
  CHECK_POSITIVE(cluster->peak_flops);
  CHECK_POSITIVE(cluster->peak_flops_fp8);
  CHECK_POSITIVE(cluster->memory_bytes);
  CHECK_POSITIVE(cluster->memory_bandwidth);
  const double shares[] = {cluster->gemm_efficiency, cluster->attention_efficiency_forward,
                           cluster->attention_efficiency_backward, cluster->memory_efficiency,
                           cluster->link_efficiency};
  const char *const names[] = {"cluster->gemm_efficiency", "cluster->attention_efficiency_forward",
                               "cluster->attention_efficiency_backward", "cluster->memory_efficiency",
                               "cluster->link_efficiency"};
  for (int i = 0; i < 5; ++i)
    SL_REQUIRE(shares[i] > 0 && shares[i] <= 1, SL_INVALID_ARGUMENT, "%s is %g, expected above 0 to 1", names[i],
               shares[i]);
  CHECK_RANGE(cluster->gemm_half_size, 0, 1e6);
  CHECK_RANGE(cluster->kernel_overhead, 0, 1);
  CHECK_COUNT(cluster->gpus_per_node);
  CHECK_POSITIVE(cluster->intra_bandwidth);
  CHECK_POSITIVE(cluster->inter_bandwidth);
  CHECK_RANGE(cluster->intra_latency, 0, 1);
  CHECK_RANGE(cluster->inter_latency, 0, 1);
  CHECK_RANGE(cluster->overlap_share, 0, 1);
  CHECK_RANGE(cluster->spread, 0, 10);
  return SL_OK;
}

static sl_status check_options(const sl_plan_layout *layout) {
  SL_REQUIRE(layout->schedule >= SL_PLAN_GPIPE && layout->schedule <= SL_PLAN_INTERLEAVED, SL_INVALID_ARGUMENT,
             "layout->schedule is %d, expected an sl_plan_schedule", (int)layout->schedule);
  SL_REQUIRE(layout->recompute >= SL_PLAN_KEEP && layout->recompute <= SL_PLAN_FULL, SL_INVALID_ARGUMENT,
             "layout->recompute is %d, expected an sl_plan_recompute", (int)layout->recompute);
  SL_REQUIRE(layout->precision == SL_PLAN_BF16 || layout->precision == SL_PLAN_FP8, SL_INVALID_ARGUMENT,
             "layout->precision is %d, expected an sl_plan_precision", (int)layout->precision);
  SL_REQUIRE(layout->exchange == SL_PLAN_RING || layout->exchange == SL_PLAN_ALL_TO_ALL, SL_INVALID_ARGUMENT,
             "layout->exchange is %d, expected an sl_plan_exchange", (int)layout->exchange);
  SL_REQUIRE(layout->zero >= 0 && layout->zero <= 3, SL_INVALID_ARGUMENT, "layout->zero is %d, expected 0 to 3",
             (int)layout->zero);
  CHECK_FLAG(layout->sequence_parallel);
  CHECK_FLAG(layout->fused_attention);
  CHECK_FLAG(layout->fused_loss);
  CHECK_FLAG(layout->fused_accumulation);
  SL_REQUIRE(layout->tp_overlap >= SL_PLAN_OVERLAP_NONE && layout->tp_overlap <= SL_PLAN_OVERLAP_ALL,
             SL_INVALID_ARGUMENT, "layout->tp_overlap is %d, expected an sl_plan_overlap", (int)layout->tp_overlap);
  CHECK_FLAG(layout->pp_overlap);
  CHECK_FLAG(layout->dp_overlap);
  CHECK_RANGE(layout->gradient_bytes, 0.125, 8);
  CHECK_RANGE(layout->reduce_bytes, 0.125, 8);
  CHECK_RANGE(layout->state_bytes, 0, 64);
  CHECK_RANGE(layout->margin, 0, 1);
  return SL_OK;
}

static sl_status check_cut(const sl_plan_model *model, const sl_plan_layout *layout) {
  SL_CHECK(check_multiple("model->heads", model->heads, "layout->tp", layout->tp));
  SL_CHECK(check_multiple("model->ffn", model->ffn, "layout->tp", layout->tp));
  SL_REQUIRE(model->kv_heads % layout->tp == 0 || layout->tp % model->kv_heads == 0, SL_INVALID_ARGUMENT,
             "model->kv_heads is %lld, expected a multiple or a divisor of layout->tp = %lld",
             (long long)model->kv_heads, (long long)layout->tp);
  if (layout->cp > 1 && layout->exchange == SL_PLAN_ALL_TO_ALL)
    SL_CHECK(check_multiple("model->heads", model->heads, "layout->tp * layout->cp", layout->tp * layout->cp));
  SL_CHECK(check_multiple("model->sequence", model->sequence, "layout->cp", layout->cp));
  if (layout->sequence_parallel)
    SL_CHECK(check_multiple("model->sequence", model->sequence, "layout->cp * layout->tp", layout->cp * layout->tp));
  SL_REQUIRE(layout->vpp == 1 || layout->schedule == SL_PLAN_INTERLEAVED, SL_INVALID_ARGUMENT,
             "layout->vpp is %lld, expected 1 unless layout->schedule is SL_PLAN_INTERLEAVED", (long long)layout->vpp);
  SL_CHECK(check_multiple("model->layers", model->layers, "layout->pp * layout->vpp", layout->pp * layout->vpp));
  SL_CHECK(check_multiple("layout->global_batch", layout->global_batch, "layout->dp * layout->micro_batch",
                          layout->dp * layout->micro_batch));
  return SL_OK;
}

sl_status sl_plan_validate(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout) {
  SL_CHECK(check_model(model));
  SL_CHECK(check_cluster(cluster));
  CHECK_SIZE(layout, sl_plan_layout);
  CHECK_COUNT(layout->gpus);
  CHECK_COUNT(layout->dp);
  CHECK_COUNT(layout->tp);
  CHECK_COUNT(layout->pp);
  CHECK_COUNT(layout->cp);
  CHECK_COUNT(layout->vpp);
  CHECK_COUNT(layout->micro_batch);
  CHECK_COUNT(layout->global_batch);
  double product = (double)layout->dp * (double)layout->tp * (double)layout->pp * (double)layout->cp;
  SL_REQUIRE(product == (double)layout->gpus, SL_INVALID_ARGUMENT,
             "layout->gpus is %lld, expected dp * tp * pp * cp = %.0f", (long long)layout->gpus, product);
  SL_REQUIRE((double)layout->dp * (double)layout->micro_batch <= (double)layout->global_batch, SL_INVALID_ARGUMENT,
             "layout->global_batch is %lld, expected at least dp * micro_batch = %.0f", (long long)layout->global_batch,
             (double)layout->dp * (double)layout->micro_batch);
  SL_REQUIRE((double)layout->pp * (double)layout->vpp <= (double)model->layers, SL_INVALID_ARGUMENT,
             "model->layers is %lld, expected at least pp * vpp = %.0f", (long long)model->layers,
             (double)layout->pp * (double)layout->vpp);
  SL_CHECK(check_options(layout));
  SL_CHECK(check_cut(model, layout));
  return SL_OK;
}

sl_status sl_plan_check(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout) {
  return sl_plan_validate(model, cluster, layout);
}
