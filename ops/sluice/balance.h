/* balance: how work is divided so that uneven ranks are done at the same time. Both answers are exact optima.
 *
 * LAYERS OVER STAGES. A model's layers, in their order, are cut into stages: stage s gets the layers from first[s] to
 * first[s + 1] - 1. Its time is
 *   t_s = factors[s] * (sum of layer_s of its layers) + extra_s[s]
 * and its memory, which may not exceed limits[s],
 *   b_s = sum of layer_bytes + kept[s] * (sum of kept_bytes) + extra_bytes[s].
 * Of all cuts that fit, sl_cut_layers() finds one with the smallest
 *   bottleneck_weight * max t_s + sum of t_s.
 * With bottleneck_weight = m - 1 that is the time of a step of m micro-batches under GPipe, whose messages take no time
 * and whose forwards and backwards are in one proportion: the slowest stage works without a pause once the first
 * micro-batch has come through, and the pipeline fills and drains through all stages. 1F1B takes no longer than that.
 * An infinite weight asks for the smallest maximum, and of cuts with that for the smallest sum.
 *   METHOD  Dynamic programming gives the smallest maximum, and the smallest sum of which no stage takes as long as a
 *   bound. The bound starts at the longest maximum that could still be better than the cut with the smallest one, and
 *   each answer's own maximum is the next bound. So it goes down through all (maximum, sum) pairs that no cut beats in
 *   both, and the optimum is one of them. Sums that differ by 1e-13 of their size count as equal.
 *   O(stages * layers^2) for each round, of which there are few where bottleneck_weight is large.
 *
 * MICRO-BATCHES OVER RANKS. Rank r works for fixed_s[r] + shares[r] * micro_batch_s[r]. Of all shares that add up to
 * micro_batches, each at least `least` and at most most[r], sl_share_micro_batches() finds some with the smallest
 * maximum.
 *   METHOD  Each micro-batch in turn goes to the rank that would be done with it first, of several the lowest (Fox,
 *   "Discrete Optimization via Marginal Analysis", 1966). Ranks' times only grow, so the micro-batches in the order of
 *   their ends are handed out from the earliest on, and no other choice of as many ends earlier.
 *
 * ERRORS  SL_INVALID_ARGUMENT; SL_OUT_OF_RANGE also where nothing fits: the message says how much would;
 *         SL_OUT_OF_MEMORY (workspace is too small).
 */
#ifndef SLUICE_BALANCE_H
#define SLUICE_BALANCE_H

#include <sluice/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Times are 0 to 1e9 s, bytes 0 to 1e18. */
typedef struct sl_cut_args {
  size_t size;               /* sizeof(sl_cut_args) */
  int64_t layers;            /* 1 to 2^14 */
  int64_t stages;            /* 1 to 2^12 */
  int64_t least_layers;      /* of a stage: 0 or more */
  double bottleneck_weight;  /* 0 to infinity */
  const double *layer_s;     /* [layers] */
  const double *factors;     /* [stages] 1e-6 to 1e6; NULL: 1 */
  const double *extra_s;     /* [stages] such as the embedding's on the first stage; NULL: 0 */
  const double *layer_bytes; /* [layers] weights, gradients and optimizer state; NULL: 0 */
  const double *kept_bytes;  /* [layers] activations of a micro-batch; NULL: 0 */
  const double *kept;        /* [stages] micro-batches that the schedule keeps at once, 0 to 1e9; NULL: 1 */
  const double *extra_bytes; /* [stages] NULL: 0 */
  const double *limits;      /* [stages] 0 to infinity; NULL: none */
  void *workspace;           /* sl_cut_layers_workspace_size() bytes, aligned to 8 bytes; contents don't matter */
  size_t workspace_size;
  int64_t *first; /* [stages + 1] written; the last is `layers` */
} sl_cut_args;

typedef struct sl_cut_result {
  size_t size;    /* set by the caller: sizeof(sl_cut_result) */
  double max_s;   /* the longest t_s */
  double sum_s;   /* of all t_s */
  int64_t rounds; /* of dynamic programming that it took */
} sl_cut_result;

/* Reads layers and stages. */
SL_API sl_status sl_cut_layers_workspace_size(const sl_cut_args *args, size_t *workspace_size);

/* Writes args->first and the result. */
SL_API sl_status sl_cut_layers(const sl_cut_args *args, sl_cut_result *result);

typedef struct sl_share_args {
  size_t size;                 /* sizeof(sl_share_args) */
  int64_t ranks;               /* 1 to 2^14 */
  int64_t micro_batches;       /* 0 to 2^30 */
  int64_t least;               /* of a rank; 0 or more */
  const int64_t *most;         /* [ranks] NULL: no limit */
  const double *micro_batch_s; /* [ranks] 1e-12 to 1e9 */
  const double *fixed_s;       /* [ranks] 0 to 1e9; NULL: 0 */
  int64_t *shares;             /* [ranks] written */
} sl_share_args;

/* max_s: when the last rank is done. */
SL_API sl_status sl_share_micro_batches(const sl_share_args *args, double *max_s);

#ifdef __cplusplus
}
#endif
#endif
