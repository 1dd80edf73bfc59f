/* The step: stages from layers, the pipeline in closed form, data-parallel traffic, the optimizer, the slowest rank. */
#include <math.h>

#include "plan/collective.h"
#include "plan/layer.h"
#include "plan/memory.h"
#include "plan/validate.h"
#include "runtime/status.h"

/* One micro-batch on one stage, all of its chunks. */
typedef struct stage_time {
  double forward_s, backward_s, recompute_s, tp_s, cp_s, forward_hidden_s, backward_hidden_s;
} stage_time;

typedef struct problem {
  const sl_plan_model *model;
  const sl_plan_cluster *cluster;
  const sl_plan_layout *layout;
  double micro_batches;
} problem;

static void add_passes(stage_time *stage, double times, const sl_plan_passes *passes) {
  stage->forward_s += times * passes->forward.seconds;
  stage->backward_s += times * passes->backward.seconds;
  stage->recompute_s += times * passes->recompute.seconds;
  stage->tp_s += times * passes->tp_s;
  stage->cp_s += times * passes->cp_s;
  stage->forward_hidden_s += times * passes->forward_hidden_s;
  stage->backward_hidden_s += times * passes->backward_hidden_s;
}

static double stage_total(const stage_time *stage) {
  return stage->forward_s + stage->backward_s + stage->recompute_s + stage->tp_s + stage->cp_s;
}

static double computed_flops(const sl_plan_passes *passes) {
  return passes->forward.flops + passes->backward.flops + passes->recompute.flops;
}

/* Of an activation to the next stage and of its gradient back, for one chunk of one micro-batch. */
static double boundary_s(const problem *p) {
  const sl_plan_layout *layout = p->layout;
  sl_plan_group group = {layout->pp, layout->tp * layout->cp * layout->dp};
  double tokens = (double)layout->micro_batch * (double)p->model->sequence / (double)layout->cp;
  /* Tensor-parallel ranks send a part each over their own rail, whether or not activations are cut between them. */
  double bytes = 2 * tokens * (double)p->model->hidden / (double)layout->tp;
  return 2 * sl_plan_send_s(p->cluster, group, bytes);
}

/* Fills the times and FLOPs of the pipeline; *slowest: one micro-batch on the stage that the others wait for. */
static void fill_pipeline(const problem *p, sl_plan_estimate *estimate, stage_time *slowest) {
  const sl_plan_layout *layout = p->layout;
  sl_plan_passes layer = sl_plan_layer(p->model, p->cluster, layout);
  sl_plan_passes head = sl_plan_head(p->model, p->cluster, layout);
  sl_plan_passes embedding = sl_plan_embedding(p->model, p->cluster, layout);
  double stages = (double)layout->pp, chunks = (double)layout->vpp, layers = (double)p->model->layers;

  stage_time first = {0}, last = {0}, inner = {0};
  add_passes(&inner, layers / stages, &layer);
  first = last = inner;
  add_passes(layout->pp == 1 ? &last : &first, 1, &embedding);
  add_passes(&last, 1, &head);
  *slowest = stage_total(&last) >= stage_total(&first) ? last : first;
  double longest = stage_total(slowest);
  double all =
      layout->pp == 1 ? longest : stage_total(&first) + stage_total(&last) + (stages - 2) * stage_total(&inner);
  double m = p->micro_batches;
  estimate->compute_s = m * (slowest->forward_s + slowest->backward_s);
  estimate->recompute_s = m * slowest->recompute_s;
  estimate->tp_s = m * slowest->tp_s;
  estimate->cp_s = m * slowest->cp_s;
  estimate->bubble_s = (all - longest) / chunks;
  if (layout->pp > 1) {
    /* Filling and draining wait for every boundary; in between traffic can run beside the other micro-batches. */
    double boundary = boundary_s(p), filling = (stages - 1) * boundary;
    double visible = layout->pp_overlap ? 1 - p->cluster->overlap_share : 1;
    estimate->pp_s = filling + visible * boundary * m * chunks;
  }
  double copies = (double)layout->tp * (double)layout->cp * (double)layout->dp * m;
  double forward = layers * layer.forward_flops + head.forward_flops;
  estimate->model_flops = 3 * copies * forward;
  estimate->hardware_flops = copies * (layers * computed_flops(&layer) + computed_flops(&head));
}

/* Seconds of one micro-batch's passes in which the pipeline has the rails that the data-parallel group also needs. */
static double shared_rail_s(const problem *p, sl_plan_group data) {
  sl_plan_group pipeline = {p->layout->pp, p->layout->tp * p->layout->cp * p->layout->dp};
  int both_leave = sl_plan_ranks_per_node(p->cluster, data) < (double)data.size &&
                   sl_plan_ranks_per_node(p->cluster, pipeline) < (double)pipeline.size;
  return both_leave ? (double)p->layout->vpp * boundary_s(p) : 0;
}

/* Gradients and weights between ranks that share them; for what zero shards also within the step. */
static double data_parallel_s(const problem *p, const stage_time *stage, double parameters) {
  const sl_plan_layout *layout = p->layout;
  sl_plan_group group = {layout->dp * layout->cp, layout->tp};
  double gradients = layout->reduce_bytes * parameters, weights = 2 * parameters;
  /* What hides behind a pass: its time, less what hides there already and what the pipeline takes of the rails. */
  double m = p->micro_batches, forward = fmax(stage->forward_s - stage->forward_hidden_s, 0);
  double backward = stage->backward_s + stage->recompute_s - stage->backward_hidden_s;
  backward = fmax(backward - shared_rail_s(p, group), 0);
  double share = layout->dp_overlap ? p->cluster->overlap_share : 0;
  if (layout->zero == 0) {
    double seconds = sl_plan_all_reduce_s(p->cluster, group, gradients);
    return seconds - fmin(share * seconds, backward);
  }
  /* Zero 2 reduces after every micro-batch, zero 3 also gathers the weights for both passes of each. */
  double reductions = layout->zero >= 2 ? m : 1, gathers = layout->zero == 3 ? m : 1;
  double reduce = sl_plan_gather_s(p->cluster, group, gradients);
  double gather = sl_plan_gather_s(p->cluster, group, weights);
  double seconds = reductions * (reduce - fmin(share * reduce, backward));
  seconds += gathers * (gather - fmin(share * gather, forward));
  if (layout->zero == 3) seconds += gathers * (gather - fmin(share * gather, fmax(backward - share * reduce, 0)));
  return seconds;
}

/* Gradients are read for their norm and cleared; state, gradient and weight are read, state and weight written. */
static double optimizer_s(const problem *p, double parameters) {
  const sl_plan_layout *layout = p->layout;
  double shards = layout->zero >= 1 ? (double)layout->dp * (double)layout->cp : 1;
  double bytes = parameters * 2 * layout->gradient_bytes;
  bytes += parameters / shards * (2 * layout->state_bytes + layout->gradient_bytes + 2);
  return bytes / (p->cluster->memory_bandwidth * p->cluster->memory_efficiency) + 3 * p->cluster->kernel_overhead;
}

static double model_parameters(const sl_plan_model *model) {
  double vocab = sl_plan_vocab_parameters(model, 1);
  double layer = sl_plan_layer_parameters(model, 1, (double)model->kv_heads);
  return (double)model->layers * layer + (model->tied ? 1 : 2) * vocab;
}

sl_status sl_plan_predict(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout,
                          sl_plan_estimate *estimate) {
  SL_CHECK(sl_plan_validate(model, cluster, layout));
  SL_REQUIRE(estimate, SL_INVALID_ARGUMENT, "estimate is NULL");
  SL_REQUIRE(estimate->size == sizeof *estimate, SL_INVALID_ARGUMENT,
             "estimate.size is %zu, expected sizeof(sl_plan_estimate) = %zu", estimate->size, sizeof *estimate);
  *estimate = (sl_plan_estimate){.size = sizeof *estimate};
  estimate->micro_batches = layout->global_batch / (layout->dp * layout->micro_batch);
  problem p = {model, cluster, layout, (double)estimate->micro_batches};
  stage_time slowest;
  fill_pipeline(&p, estimate, &slowest);
  double pipeline = estimate->compute_s + estimate->recompute_s + estimate->tp_s + estimate->cp_s + estimate->pp_s +
                    estimate->bubble_s;
  estimate->spread_s = pipeline * cluster->spread * sqrt(2 * log((double)layout->gpus));
  double parameters =
      fmax(sl_plan_stage_parameters(model, layout, 0), sl_plan_stage_parameters(model, layout, layout->pp - 1));
  if (layout->dp * layout->cp > 1) estimate->dp_s = data_parallel_s(&p, &slowest, parameters);
  estimate->optimizer_s = optimizer_s(&p, parameters);
  estimate->step_s = pipeline + estimate->spread_s + estimate->dp_s + estimate->optimizer_s;
  estimate->parameters = model_parameters(model);
  double peak = layout->precision == SL_PLAN_FP8 ? cluster->peak_flops_fp8 : cluster->peak_flops;
  estimate->mfu = estimate->model_flops / (estimate->step_s * (double)layout->gpus * peak);
  sl_plan_memory(model, layout, estimate->micro_batches, estimate);
  return SL_OK;
}
