/* The time of one operator on one GPU, and sums of such operators. */
#ifndef SL_PLAN_OPERATOR_H
#define SL_PLAN_OPERATOR_H

#include <sluice/plan.h>

typedef struct sl_plan_cost {
  double seconds, flops; /* flops: as computed */
} sl_plan_cost;

/* A product [m, k] x [k, n], `count` of them in one kernel. Inputs have 16 bits,
 * or 8 under SL_PLAN_FP8; output_bytes: read and written for each element of the output. */
void sl_plan_add_product(sl_plan_cost *cost, const sl_plan_cluster *cluster, sl_plan_precision precision, double count,
                         double m, double n, double k, double output_bytes);

/* A pass over memory that reads and writes this much. */
void sl_plan_add_pass(sl_plan_cost *cost, const sl_plan_cluster *cluster, double bytes);

/* A fused kernel of this many FLOPs at a share of the peak. */
void sl_plan_add_kernel(sl_plan_cost *cost, const sl_plan_cluster *cluster, double flops, double efficiency,
                        double bytes);

#endif
