/* The operators of a decoder's layer, head and embedding under tensor, sequence and context parallel cuts. */
#include "plan/layer.h"

#include <math.h>

#include "plan/collective.h"

/* Extents of one micro-batch on one GPU. */
typedef struct extents {
  double tokens;      /* of a context-parallel rank */
  double norm_tokens; /* that normalisation and residual passes see: a tensor-parallel rank's share of them, or all */
  double heads, kv_heads, width, kv_width, ffn; /* of a tensor-parallel rank; width = heads * head_dim */
} extents;

static extents find_extents(const sl_plan_model *model, const sl_plan_layout *layout) {
  extents e;
  double tp = (double)layout->tp;
  e.tokens = (double)layout->micro_batch * (double)model->sequence / (double)layout->cp;
  e.norm_tokens = layout->sequence_parallel ? e.tokens / tp : e.tokens;
  e.heads = (double)model->heads / tp;
  e.kv_heads = sl_plan_local_kv_heads(model, layout);
  e.width = e.heads * (double)model->head_dim;
  e.kv_width = e.kv_heads * (double)model->head_dim;
  e.ffn = (double)model->ffn / tp;
  return e;
}

double sl_plan_local_kv_heads(const sl_plan_model *model, const sl_plan_layout *layout) {
  return fmax((double)model->kv_heads / (double)layout->tp, 1);
}

double sl_plan_pair_share(const sl_plan_model *model) {
  double s = (double)model->sequence;
  return (model->causal ? (s + 1) / (2 * s) : 1) * model->kept_share;
}

double sl_plan_layer_parameters(const sl_plan_model *model, double tp, double kv_heads) {
  double h = (double)model->hidden, d = (double)model->head_dim;
  double attention = h * d * (2 * (double)model->heads / tp + 2 * kv_heads);
  return attention + (model->gated ? 3 : 2) * h * (double)model->ffn / tp + 2 * h;
}

double sl_plan_vocab_parameters(const sl_plan_model *model, double tp) {
  return (double)model->hidden * (double)model->vocab / tp;
}

/* A linear layer [rows, in] x [in, out] with its two products of the backward pass and its gradient's accumulation. */
static void add_linear(sl_plan_passes *passes, const sl_plan_cluster *cluster, const sl_plan_layout *layout,
                       sl_plan_precision precision, double rows, double in, double out) {
  double accumulate = 2 * layout->gradient_bytes; /* an accumulator's element is read and written */
  sl_plan_add_product(&passes->forward, cluster, precision, 1, rows, out, in, 2);
  sl_plan_add_product(&passes->backward, cluster, precision, 1, rows, in, out, 2);
  sl_plan_add_product(&passes->backward, cluster, precision, 1, in, out, rows,
                      layout->fused_accumulation ? accumulate : 2);
  if (!layout->fused_accumulation) sl_plan_add_pass(&passes->backward, cluster, in * out * (2 + accumulate));
  passes->forward_flops += 2 * rows * in * out;
}

static void add_passes(sl_plan_passes *passes, const sl_plan_cluster *cluster, double forward, double backward) {
  sl_plan_add_pass(&passes->forward, cluster, forward);
  sl_plan_add_pass(&passes->backward, cluster, backward);
}

/* The probabilities go through memory: products, masked softmax, dropout. Kept pairs save nothing here. */
static void add_unfused_attention(sl_plan_passes *core, const sl_plan_model *model, const sl_plan_cluster *cluster,
                                  const extents *e, double sequences) {
  double count = sequences * e->heads, keys = (double)model->sequence, d = (double)model->head_dim;
  double queries = e->tokens / sequences, pairs = count * queries * keys;
  for (int product = 0; product < 2; ++product) {
    double out = product == 0 ? keys : d, in = product == 0 ? d : keys;
    sl_plan_add_product(&core->forward, cluster, SL_PLAN_BF16, count, queries, out, in, 2);
    sl_plan_add_product(&core->backward, cluster, SL_PLAN_BF16, count, queries, in, out, 2);
    sl_plan_add_product(&core->backward, cluster, SL_PLAN_BF16, count, in, out, queries, 2);
  }
  add_passes(core, cluster, 4 * pairs, 6 * pairs);
  if (model->dropout) add_passes(core, cluster, 5 * pairs, 5 * pairs);
}

static void add_fused_attention(sl_plan_passes *core, const sl_plan_model *model, const sl_plan_cluster *cluster,
                                const extents *e) {
  double flops = 4 * e->tokens * (double)model->sequence * e->width * sl_plan_pair_share(model);
  double bytes = 2 * e->tokens * 2 * (e->width + e->kv_width);
  sl_plan_add_kernel(&core->forward, cluster, flops, cluster->attention_efficiency_forward, bytes);
  sl_plan_add_kernel(&core->backward, cluster, 2.5 * flops, cluster->attention_efficiency_backward, 2 * bytes);
}

/* Context-parallel exchange: what the passes of the attention hide, and what they don't. */
static void add_exchange(sl_plan_passes *layer, const sl_plan_cluster *cluster, const sl_plan_layout *layout,
                         const extents *e, const sl_plan_passes *core, double forwards) {
  if (layout->cp == 1) return;
  sl_plan_group group = {layout->cp, layout->tp};
  double cp = (double)layout->cp, kv_bytes = 2 * 2 * e->tokens * e->kv_width;
  if (layout->exchange == SL_PLAN_ALL_TO_ALL) {
    double bytes = kv_bytes + 2 * 2 * e->tokens * e->width; /* q, k, v before, the output after */
    layer->cp_s = (forwards + 1) * sl_plan_all_to_all_s(cluster, group, bytes);
    return;
  }
  /* Each step attends to one part of the keys while the next part travels; the gradients travel with them back. */
  double forward = (cp - 1) * sl_plan_send_s(cluster, group, kv_bytes);
  double backward = (cp - 1) * sl_plan_send_s(cluster, group, 2 * kv_bytes);
  double share = cluster->overlap_share, part = (cp - 1) / cp;
  double forward_hidden = fmin(share * forward, core->forward.seconds * part);
  double backward_hidden = fmin(share * backward, core->backward.seconds * part);
  layer->forward_hidden_s = forward_hidden;
  layer->backward_hidden_s = backward_hidden + (forwards - 1) * forward_hidden;
  layer->cp_s = forwards * (forward - forward_hidden) + backward - backward_hidden;
}

/* Seconds of tensor-parallel traffic of a layer that nothing hides, all passes. In the backward pass of the first of
 * two products, its weight gradient can run beside the traffic of its input's gradient, and its other product beside
 * the gathering of its input; the rest depends on what is computed, unless products are cut up. */
static double tensor_s(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout,
                       const extents *e, double forwards) {
  if (layout->tp == 1) return 0;
  sl_plan_group group = {layout->tp, 1};
  double bytes = 2 * e->tokens * (double)model->hidden, bound, loose;
  if (layout->sequence_parallel) {
    double gather = sl_plan_gather_s(cluster, group, bytes);
    bound = (4 * forwards + 2) * gather, loose = 4 * gather;
  } else {
    double reduce = sl_plan_all_reduce_s(cluster, group, bytes);
    bound = 2 * forwards * reduce, loose = 2 * reduce;
  }
  double visible = 1 - cluster->overlap_share;
  if (layout->tp_overlap >= SL_PLAN_OVERLAP_GRADIENTS) loose *= visible;
  if (layout->tp_overlap >= SL_PLAN_OVERLAP_ALL) bound *= visible;
  return bound + loose;
}

sl_plan_passes sl_plan_layer(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout) {
  sl_plan_passes layer = {0}, core = {0};
  extents e = find_extents(model, layout);
  double h = (double)model->hidden, rows = e.tokens, narrow = e.norm_tokens * h;
  sl_plan_precision precision = layout->precision;

  add_passes(&layer, cluster, 4 * narrow, 6 * narrow); /* normalisation */
  add_linear(&layer, cluster, layout, precision, rows, h, e.width + 2 * e.kv_width);
  double rotated = 4 * rows * (e.width + e.kv_width); /* rotary embedding, or biases and the split into heads */
  add_passes(&layer, cluster, rotated, rotated);
  add_linear(&layer, cluster, layout, precision, rows, e.width, h);
  double added = model->dropout ? 7 : 6; /* residual; dropout also writes a mask and reads it in the backward */
  double added_backward = model->dropout ? 7 : 4;
  add_passes(&layer, cluster, added * narrow, added_backward * narrow);
  add_passes(&layer, cluster, 4 * narrow, 6 * narrow); /* normalisation */
  double inner = rows * e.ffn;
  add_linear(&layer, cluster, layout, precision, rows, h, (model->gated ? 2 : 1) * e.ffn);
  add_passes(&layer, cluster, (model->gated ? 6 : 4) * inner, (model->gated ? 10 : 6) * inner); /* activation */
  add_linear(&layer, cluster, layout, precision, rows, e.ffn, h);
  add_passes(&layer, cluster, added * narrow, added_backward * narrow);
  if (precision == SL_PLAN_FP8) /* casts of each product's inputs, and of the gradients with their transposes */
    add_passes(&layer, cluster, 3 * (2 * rows * h + rows * e.width + inner),
               4 * (2 * rows * h + rows * (e.width + 2 * e.kv_width) + (model->gated ? 2 : 1) * inner));

  if (layout->fused_attention)
    add_fused_attention(&core, model, cluster, &e);
  else
    add_unfused_attention(&core, model, cluster, &e, (double)layout->micro_batch);
  layer.forward_flops += 4 * rows * (double)model->sequence * e.width * sl_plan_pair_share(model);
  layer.forward.seconds += core.forward.seconds, layer.forward.flops += core.forward.flops;
  layer.backward.seconds += core.backward.seconds, layer.backward.flops += core.backward.flops;

  double forwards = layout->recompute == SL_PLAN_FULL ? 2 : 1;
  if (layout->recompute == SL_PLAN_FULL) layer.recompute = layer.forward;
  if (layout->recompute == SL_PLAN_SELECTIVE && !layout->fused_attention) layer.recompute = core.forward;
  layer.tp_s = tensor_s(model, cluster, layout, &e, forwards);
  add_exchange(&layer, cluster, layout, &e, &core, forwards);
  return layer;
}

sl_plan_passes sl_plan_head(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout) {
  sl_plan_passes head = {0};
  extents e = find_extents(model, layout);
  double h = (double)model->hidden, vocab = (double)model->vocab / (double)layout->tp;
  add_passes(&head, cluster, 4 * e.norm_tokens * h, 6 * e.norm_tokens * h);
  add_linear(&head, cluster, layout, SL_PLAN_BF16, e.tokens, h, vocab);
  /* Cross entropy: in one kernel logits are read twice and their gradient is written over them; in several a float32
   * copy is made, its exponentials are written, and their gradient is cast back. */
  double logits = e.tokens * vocab;
  add_passes(&head, cluster, (layout->fused_loss ? 4 : 18) * logits, (layout->fused_loss ? 4 : 14) * logits);
  if (layout->tp > 1) {
    sl_plan_group group = {layout->tp, 1};
    double bytes = 2 * e.tokens * h;
    head.tp_s = layout->sequence_parallel ? 3 * sl_plan_gather_s(cluster, group, bytes)
                                          : sl_plan_all_reduce_s(cluster, group, bytes);
    head.tp_s += 3 * sl_plan_all_reduce_s(cluster, group, 4 * e.tokens); /* maximum, sum, the label's logit */
  }
  return head;
}

sl_plan_passes sl_plan_embedding(const sl_plan_model *model, const sl_plan_cluster *cluster,
                                 const sl_plan_layout *layout) {
  sl_plan_passes embedding = {0};
  extents e = find_extents(model, layout);
  double bytes = 2 * e.tokens * (double)model->hidden;
  add_passes(&embedding, cluster, 2 * bytes, bytes * (1 + layout->gradient_bytes));
  if (layout->tp > 1) {
    sl_plan_group group = {layout->tp, 1};
    embedding.tp_s = layout->sequence_parallel ? 2 * sl_plan_gather_s(cluster, group, bytes)
                                               : sl_plan_all_reduce_s(cluster, group, bytes);
  }
  return embedding;
}
