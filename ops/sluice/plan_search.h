/* plan_search: the layouts under which a training step is fastest, of all that fit into memory.
 *
 * SPACE  Every cut of gpus into tp cp pp dp, every vpp, micro-batch, recomputation and zero stage within the ranges
 *   that sl_plan_predict() takes for the model: divisors only. vpp above 1 is interleaved, 1 is 1F1B, or GPipe if the
 *   layout handed in says so. All else is as in that layout; sequence_parallel of 1 stands for "where tp is above 1 and
 *   tp cp divides the sequence".
 * ANSWER  the `capacity` fastest that need no more than memory_bytes, the fastest first; of equal times the one that is
 *   enumerated first: fewer tp, then cp, pp, micro-batch, vpp, less recomputation, lower zero. It is what trying every
 *   layout would give: search.c proves what it leaves out. If none fits, count is 0, and `smallest` says what needs
 *   least.
 * ERRORS  SL_INVALID_ARGUMENT: as sl_plan_predict(), a range that is empty, or a space without any layout.
 * DETERMINISM  a pure function of its arguments; no allocation; safe on any thread. Overwrites sl_last_error().
 */
#ifndef SLUICE_PLAN_SEARCH_H
#define SLUICE_PLAN_SEARCH_H

#include <sluice/plan.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sl_plan_range {
  int64_t least, most; /* both included */
} sl_plan_range;

typedef struct sl_plan_space {
  size_t size;
  sl_plan_range dp, tp, pp, cp, vpp, micro_batch; /* within 1 to 2^40; micro_batch to 4096 */
  sl_plan_range recompute, zero;                  /* of sl_plan_recompute; of 0 to 3 */
} sl_plan_space;

typedef struct sl_plan_candidate {
  sl_plan_layout layout;
  sl_plan_estimate estimate;
} sl_plan_candidate;

typedef struct sl_plan_found {
  size_t size;
  int64_t count;              /* candidates that were written, at most capacity */
  int64_t cuttable;           /* cuts of the GPUs with a micro-batch that suit the model */
  int64_t predicted;          /* layouts whose cost was predicted */
  sl_plan_candidate smallest; /* of the layouts looked at, the one that needs least memory */
} sl_plan_found;

/* layout gives gpus, at most 2^20, global_batch and all options that the space has no range for; candidates has room
 * for capacity. */
SL_API sl_status sl_plan_search(const sl_plan_model *model, const sl_plan_cluster *cluster,
                                const sl_plan_layout *layout, const sl_plan_space *space, sl_plan_candidate *candidates,
                                int64_t capacity, sl_plan_found *found);

#ifdef __cplusplus
}
#endif
#endif
