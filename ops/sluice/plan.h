/* plan: how long a training step of a transformer takes on a cluster under a layout, and what memory it needs.
 *
 * The step is added up from its operators; nothing is run. Times are seconds, sizes bytes, rates per second.
 *
 * OPERATORS  Every matrix product, attention, normalisation and elementwise pass of a layer, of the vocabulary head and
 *   of the optimizer has FLOPs F and bytes B. It takes max(F / (peak e), B / (bandwidth memory_efficiency)) +
 *   kernel_overhead: the roofline of Williams et al., CACM 52(4), 2009. A product of m x k by k x n has F = 2 m n k and
 *   e = gemm_efficiency / (1 + gemm_half_size (1/m + 1/n + 1/k)): the asymptote, less what edges of tiles and the
 *   filling of pipelines cost. The backward pass has two products for each of the forward.
 * ATTENTION  fused: forward 4 s^2 d FLOPs a head times the share of pairs that is kept (half if causal), backward 2.5
 *   times that (Dao, arXiv 2307.08691, section 3.1), at attention_efficiency_*. Not fused: products, softmax and
 *   dropout over all s^2 pairs, in memory (Korthikanti et al., arXiv 2205.05198, section 4).
 * TENSOR PARALLEL  a layer has 2 all-reduces of its activations in the forward pass and 2 in the backward (Shoeybi et
 *   al., arXiv 1909.08053); sequence parallel makes of each a reduce-scatter and an all-gather, and gathers once more
 *   for each of the two weight gradients (Korthikanti et al., section 4.2.2).
 * COLLECTIVES  over n ranks of which r share a host, S bytes at each rank: all-gather and reduce-scatter by rings,
 *   S (n-1)/n / min(intra, r inter) + (r-1) intra_latency + (n/r - 1) inter_latency, since r rings leave by r rails;
 *   all-reduce the smaller of two such rings and of a tree, 2 S / bandwidth + 2 log2 n latencies (Thakur et al., IJHPCA
 *   19(1), 2005). Ranks are placed tensor first, then context, data, pipeline.
 * PIPELINE  m micro-batches, stages of times t_i over their v chunks: m max t + (sum of the other t_i) / v, which for
 *   even stages is m t (1 + (p-1)/(m v)) (Narayanan et al., SC'21, arXiv 2104.04473, section 2.2).
 * DATA PARALLEL  reduce-scatter of the gradients and all-gather of the weights (ZeRO 1 to 3: Rajbhandari et al., arXiv
 *   1910.02054), or an all-reduce; hidden behind the passes of one micro-batch as far as overlap_share allows.
 * SPREAD  a step ends with its slowest rank: all but the last two are multiplied by 1 + spread sqrt(2 ln gpus), which
 *   bounds the mean maximum of that many normal speeds from above.
 * MEMORY  weights, gradients and optimizer state over the ranks that share them, the activations that the schedule
 *   keeps in flight, the largest temporaries, and a margin for fragmentation.
 *
 * STRUCTS begin with their size, so that a library newer than its caller knows what the caller has: set size to
 *   sizeof(the struct). Another size is refused. All members must be set.
 * ERRORS  SL_INVALID_ARGUMENT, with the argument, its value and what was expected. What does not fit into memory is no
 *   error: compare total_bytes.
 * DETERMINISM  pure functions of their arguments; no allocation; safe on any thread.
 */
#ifndef SLUICE_PLAN_H
#define SLUICE_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include <sluice/status.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sl_plan_schedule {
  SL_PLAN_GPIPE = 0,       /* all forward passes, then all backward: keeps every micro-batch */
  SL_PLAN_1F1B = 1,        /* keeps as many micro-batches as there are stages */
  SL_PLAN_INTERLEAVED = 2, /* 1F1B with vpp chunks of layers on each stage */
} sl_plan_schedule;

typedef enum sl_plan_recompute {
  SL_PLAN_KEEP = 0,      /* every activation is kept for the backward pass */
  SL_PLAN_SELECTIVE = 1, /* the core of attention is computed again; of a fused one nothing needs to be */
  SL_PLAN_FULL = 2,      /* only the input of each layer is kept */
} sl_plan_recompute;

typedef enum sl_plan_precision { SL_PLAN_BF16 = 0, SL_PLAN_FP8 = 1 } sl_plan_precision; /* of the layers' products */

typedef enum sl_plan_exchange {
  SL_PLAN_RING = 0,       /* keys and values go round the context-parallel ranks while attention runs */
  SL_PLAN_ALL_TO_ALL = 1, /* heads for tokens, before attention and after it */
} sl_plan_exchange;

typedef enum sl_plan_overlap {
  SL_PLAN_OVERLAP_NONE = 0,
  SL_PLAN_OVERLAP_GRADIENTS = 1, /* traffic of the backward pass beside the other product of a linear layer */
  SL_PLAN_OVERLAP_ALL = 2,       /* also traffic that a product needs or makes: products are cut into pieces */
} sl_plan_overlap;

/* A decoder: layers of attention and MLP between an embedding and a vocabulary head. */
typedef struct sl_plan_model {
  size_t size;
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab; /* at least 1 each; kv_heads divides heads */
  int64_t sequence;                                              /* tokens of a sequence */
  int32_t gated;     /* 1: an MLP of three matrices (SwiGLU); 0: of two (GELU) */
  int32_t tied;      /* 1: the head's weight is the embedding's */
  int32_t dropout;   /* 1: dropout after attention, on its probabilities if it isn't fused, and after the MLP */
  int32_t causal;    /* 1: a query sees the keys up to its own; a fused kernel skips the others */
  double kept_share; /* (0, 1]: share of the visible pairs that a gate keeps; 1 for dense attention */
} sl_plan_model;

/* A GPU and the network between its kind. */
typedef struct sl_plan_cluster {
  size_t size;
  double peak_flops, peak_flops_fp8;                                  /* FLOP/s of dense 16-bit and 8-bit products */
  double memory_bytes, memory_bandwidth;                              /* of one GPU: bytes, bytes/s */
  double gemm_efficiency, gemm_half_size;                             /* (0, 1]; elements, at least 0 */
  double attention_efficiency_forward, attention_efficiency_backward; /* (0, 1] of peak_flops, fused kernels */
  double memory_efficiency;                                           /* (0, 1] of memory_bandwidth */
  double kernel_overhead;                                             /* s that each operator takes beside its work */
  int64_t gpus_per_node;
  double intra_bandwidth, intra_latency; /* bytes/s each way of a GPU to others of its host; s a hop */
  double inter_bandwidth, inter_latency; /* bytes/s each way of a GPU's share of its host's rails; s a hop */
  double link_efficiency;                /* (0, 1] of both bandwidths that collectives reach */
  double overlap_share;                  /* [0, 1] of a collective's time that can hide behind compute */
  double spread;                         /* relative standard deviation of the ranks' speeds, at least 0 */
} sl_plan_cluster;

/* How the work is cut. */
typedef struct sl_plan_layout {
  size_t size;
  int64_t gpus, dp, tp, pp, cp;      /* gpus = dp tp pp cp */
  int64_t vpp;                       /* chunks of layers on a stage: 1 unless interleaved */
  int64_t micro_batch, global_batch; /* sequences; global_batch is a multiple of dp micro_batch */
  sl_plan_schedule schedule;
  sl_plan_recompute recompute;
  sl_plan_precision precision;
  sl_plan_exchange exchange; /* of context parallel */
  int32_t zero;              /* 0: all replicated; 1: optimizer state, 2: and gradients, 3: and weights sharded */
  int32_t sequence_parallel, fused_attention, fused_loss; /* 0 or 1 */
  int32_t fused_accumulation;     /* 1: weight gradients are added up by the product that makes them; 0: by a pass */
  sl_plan_overlap tp_overlap;     /* of tensor-parallel traffic */
  int32_t pp_overlap, dp_overlap; /* 0 or 1: whether that traffic runs beside compute */
  double gradient_bytes;          /* of an accumulated gradient's element: 4, or 2 for 16-bit accumulators */
  double reduce_bytes;            /* of a gradient's element on the wire: 4, 2, or about 1 for compressed all-reduce */
  double state_bytes;             /* of an element's optimizer state, master weight included: 12 for float32 Adam */
  double margin;                  /* share of the memory added for fragmentation and the runtime's own, at least 0 */
} sl_plan_layout;

/* What a step costs. The times add up to step_s, the sizes of the busiest rank to total_bytes. */
typedef struct sl_plan_estimate {
  size_t size;
  double step_s;
  double compute_s;   /* all micro-batches of the slowest stage: its operators */
  double recompute_s; /* of that stage: operators that run again in the backward pass */
  double tp_s, cp_s;  /* of that stage: traffic that nothing hides */
  double pp_s;        /* between stages, not hidden */
  double bubble_s;    /* the slowest stage waits for others to fill and drain */
  double spread_s;    /* waiting for the slowest rank */
  double dp_s;        /* gradients and weights between data-parallel ranks, not hidden */
  double optimizer_s;
  int64_t micro_batches; /* of a data-parallel rank in a step */
  double parameters;     /* of the model */
  double model_flops;    /* of a step on all GPUs, visible kept pairs only, without recomputation */
  double hardware_flops; /* of a step on all GPUs, all that is computed */
  double mfu;            /* model_flops / (step_s gpus peak_flops of the layout's precision) */
  double weight_bytes, gradient_bytes, state_bytes;
  double activation_bytes; /* kept for the backward pass by the micro-batches in flight */
  double temporary_bytes;  /* largest at one time: logits, recomputed layers, gathered weights */
  double margin_bytes;
  double total_bytes;
} sl_plan_estimate;

/* Fills estimate, whose size must be set. */
SL_API sl_status sl_plan_predict(const sl_plan_model *model, const sl_plan_cluster *cluster,
                                 const sl_plan_layout *layout, sl_plan_estimate *estimate);

/* Checks what sl_plan_predict() checks, in microseconds: whether the layout suits the model and the cluster. */
SL_API sl_status sl_plan_check(const sl_plan_model *model, const sl_plan_cluster *cluster,
                               const sl_plan_layout *layout);

#ifdef __cplusplus
}
#endif
#endif
