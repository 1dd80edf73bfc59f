/* Memory of the first and of the last stage: model state, activations in flight, temporaries. */
#include "plan/memory.h"

#include <math.h>

#include "plan/layer.h"

double sl_plan_stage_parameters(const sl_plan_model *model, const sl_plan_layout *layout, int64_t stage) {
  double tp = (double)layout->tp;
  double layer = sl_plan_layer_parameters(model, tp, sl_plan_local_kv_heads(model, layout));
  double count = (double)model->layers / (double)layout->pp * layer;
  double vocab = sl_plan_vocab_parameters(model, tp);
  int is_first = stage == 0, is_last = stage == layout->pp - 1;
  count += (is_first + is_last) * vocab;
  if (model->tied && is_first && is_last) count -= vocab;
  return count;
}

/* Bytes that one layer keeps of one micro-batch: Korthikanti et al., section 4, for any heads and MLP. */
static double layer_bytes(const sl_plan_model *model, const sl_plan_layout *layout, sl_plan_recompute recompute) {
  double tp = (double)layout->tp, tokens = (double)layout->micro_batch * (double)model->sequence / (double)layout->cp;
  double narrow = (layout->sequence_parallel ? tokens / tp : tokens) * (double)model->hidden;
  if (recompute == SL_PLAN_FULL) return 2 * narrow;
  double heads = (double)model->heads / tp, width = heads * (double)model->head_dim;
  double kv_width = sl_plan_local_kv_heads(model, layout) * (double)model->head_dim;
  double element = layout->precision == SL_PLAN_FP8 ? 1 : 2; /* of what the layers' products take */
  double bytes = narrow * (4 + 2 * element + (model->dropout ? 2 : 0));
  bytes += tokens * (2 * (width + 2 * kv_width) + element * width);
  bytes += tokens * (double)model->ffn / tp * ((model->gated ? 4 : 2) + element);
  if (layout->fused_attention)
    bytes += 4 * tokens * heads; /* each row's log-sum-exp */
  else if (recompute == SL_PLAN_KEEP)
    bytes += (model->dropout ? 5 : 2) * heads * tokens * (double)model->sequence;
  return bytes;
}

/* Micro-batches, each of the stage's layers, that the schedule keeps on this stage. */
static double in_flight(const sl_plan_layout *layout, int64_t stage, double micro_batches) {
  double stages = (double)layout->pp, behind = stages - (double)stage;
  if (layout->schedule == SL_PLAN_GPIPE) return micro_batches;
  if (layout->schedule == SL_PLAN_INTERLEAVED && layout->pp > 1)
    behind = stages + (2 * behind - stages - 1) / (double)layout->vpp;
  return fmin(behind, micro_batches);
}

static double temporary_bytes(const sl_plan_model *model, const sl_plan_layout *layout, int64_t stage) {
  double tp = (double)layout->tp, tokens = (double)layout->micro_batch * (double)model->sequence / (double)layout->cp;
  /* Gradients inside an MLP beside a gathered input; a layer that is computed again is there whole. */
  double layer = tokens * (2 * (double)model->hidden + (model->gated ? 6 : 4) * (double)model->ffn / tp);
  if (layout->recompute == SL_PLAN_FULL) layer += layer_bytes(model, layout, SL_PLAN_KEEP);
  if (layout->recompute == SL_PLAN_SELECTIVE)
    layer += layer_bytes(model, layout, SL_PLAN_KEEP) - layer_bytes(model, layout, SL_PLAN_SELECTIVE);
  double head = tokens * (double)model->vocab / tp * (layout->fused_loss ? 4 : 10); /* logits, and their gradient */
  double bytes = stage == layout->pp - 1 ? fmax(layer, head) : layer;
  /* A product that adds to the accumulator still hands autograd a gradient, kept once for each shape of weight. Without
   * it the gradient of one weight is there until it is added. */
  if (layout->fused_accumulation)
    bytes += 2 * sl_plan_layer_parameters(model, tp, sl_plan_local_kv_heads(model, layout)) +
             (stage == layout->pp - 1 ? 2 * sl_plan_vocab_parameters(model, tp) : 0);
  else
    bytes += 2 * (double)model->hidden * (model->gated ? 2 : 1) * (double)model->ffn / tp;
  if (layout->zero == 3) /* the weights of a layer that runs and of the next */
    bytes += 2 * 2 * sl_plan_layer_parameters(model, tp, sl_plan_local_kv_heads(model, layout));
  return bytes;
}

void sl_plan_memory(const sl_plan_model *model, const sl_plan_layout *layout, int64_t micro_batches,
                    sl_plan_estimate *estimate) {
  double shards = (double)layout->dp * (double)layout->cp;
  estimate->total_bytes = -1;
  for (int64_t stage = 0; stage < layout->pp; stage += layout->pp > 1 ? layout->pp - 1 : 1) {
    double parameters = sl_plan_stage_parameters(model, layout, stage);
    double weights = 2 * parameters / (layout->zero >= 3 ? shards : 1);
    double gradients = layout->gradient_bytes * parameters / (layout->zero >= 2 ? shards : 1);
    double state = layout->state_bytes * parameters / (layout->zero >= 1 ? shards : 1);
    double layers = (double)model->layers / (double)layout->pp;
    double activations =
        in_flight(layout, stage, (double)micro_batches) * layers * layer_bytes(model, layout, layout->recompute);
    double temporary = temporary_bytes(model, layout, stage);
    double margin = layout->margin * (weights + gradients + state + activations + temporary);
    double total = weights + gradients + state + activations + temporary + margin;
    if (total <= estimate->total_bytes) continue;
    estimate->weight_bytes = weights, estimate->gradient_bytes = gradients, estimate->state_bytes = state;
    estimate->activation_bytes = activations, estimate->temporary_bytes = temporary;
    estimate->margin_bytes = margin, estimate->total_bytes = total;
  }
}
