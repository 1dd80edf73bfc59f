/* What a layer, the vocabulary head and the embedding cost for one micro-batch on one GPU. */
#ifndef SL_PLAN_LAYER_H
#define SL_PLAN_LAYER_H

#include "plan/operator.h"

/* Of a layer or of the head: operators, and traffic that nothing hides, of each pass. */
typedef struct sl_plan_passes {
  sl_plan_cost forward, backward, recompute;  /* recompute: of the forward's operators, those that run twice */
  double tp_s, cp_s;                          /* both passes, and what recomputation adds */
  double forward_hidden_s, backward_hidden_s; /* context-parallel traffic beside the passes: nothing else fits there */
  double forward_flops;                       /* that the model needs: visible kept pairs only */
} sl_plan_passes;

sl_plan_passes sl_plan_layer(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout);
sl_plan_passes sl_plan_head(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout);
sl_plan_passes sl_plan_embedding(const sl_plan_model *model, const sl_plan_cluster *cluster,
                                 const sl_plan_layout *layout);

/* Share of all query-key pairs that are visible and kept. */
double sl_plan_pair_share(const sl_plan_model *model);
/* Key heads on one GPU: at least one, so that they are repeated where tp exceeds their number. */
double sl_plan_local_kv_heads(const sl_plan_model *model, const sl_plan_layout *layout);
/* Parameters of one layer on one GPU, and of the embedding or the head. */
double sl_plan_layer_parameters(const sl_plan_model *model, double tp, double kv_heads);
double sl_plan_vocab_parameters(const sl_plan_model *model, double tp);

#endif
