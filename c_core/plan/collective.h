/* The time of a collective over the ranks of a group. */
#ifndef SL_PLAN_COLLECTIVE_H
#define SL_PLAN_COLLECTIVE_H

#include <sluice/plan.h>

/* `size` ranks that are `stride` apart in the placement. */
typedef struct sl_plan_group {
  int64_t size, stride;
} sl_plan_group;

double sl_plan_ranks_per_node(const sl_plan_cluster *cluster, sl_plan_group group);

/* All-gather to, or reduce-scatter from, `bytes` at every rank. */
double sl_plan_gather_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes);
double sl_plan_all_reduce_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes);
/* Every rank holds `bytes` and sends 1 / size of them to each other. */
double sl_plan_all_to_all_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes);
/* One rank to its neighbour in the group. */
double sl_plan_send_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes);

#endif
