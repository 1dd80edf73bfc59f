/* Collectives over hosts with a fast network inside and rails between: ring, tree, all-to-all, send. */
#include "plan/collective.h"

#include <math.h>

double sl_plan_ranks_per_node(const sl_plan_cluster *cluster, sl_plan_group group) {
  double ranks = floor((double)cluster->gpus_per_node / (double)group.stride);
  return fmin(fmax(ranks, 1), (double)group.size);
}

/* Of a ring: r rings leave a host by r rails, so that the host's network limits them until there are enough rails. */
static double ring_bandwidth(const sl_plan_cluster *cluster, sl_plan_group group) {
  double ranks = sl_plan_ranks_per_node(cluster, group), bandwidth = cluster->intra_bandwidth;
  if (ranks < (double)group.size)
    bandwidth = ranks > 1 ? fmin(bandwidth, ranks * cluster->inter_bandwidth) : cluster->inter_bandwidth;
  return bandwidth * cluster->link_efficiency;
}

double sl_plan_gather_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes) {
  if (group.size == 1) return 0;
  double n = (double)group.size, ranks = sl_plan_ranks_per_node(cluster, group);
  double latency = (ranks - 1) * cluster->intra_latency + (n / ranks - 1) * cluster->inter_latency;
  return bytes * (n - 1) / n / ring_bandwidth(cluster, group) + latency + cluster->kernel_overhead;
}

double sl_plan_all_reduce_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes) {
  if (group.size == 1) return 0;
  double n = (double)group.size, ranks = sl_plan_ranks_per_node(cluster, group);
  double ring = 2 * sl_plan_gather_s(cluster, group, bytes) - cluster->kernel_overhead;
  double latency = log2(ranks) * cluster->intra_latency + log2(n / ranks) * cluster->inter_latency;
  double tree = 2 * bytes / ring_bandwidth(cluster, group) + 2 * latency + cluster->kernel_overhead;
  return fmin(ring, tree);
}

double sl_plan_all_to_all_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes) {
  if (group.size == 1) return 0;
  double n = (double)group.size, ranks = sl_plan_ranks_per_node(cluster, group);
  double inside = bytes * (ranks - 1) / n / cluster->intra_bandwidth;
  double outside = bytes * (n - ranks) / n / cluster->inter_bandwidth;
  double latency = ranks < n ? cluster->inter_latency : cluster->intra_latency;
  return fmax(inside, outside) / cluster->link_efficiency + latency + cluster->kernel_overhead;
}

double sl_plan_send_s(const sl_plan_cluster *cluster, sl_plan_group group, double bytes) {
  if (group.size == 1) return 0;
  int is_inside = sl_plan_ranks_per_node(cluster, group) >= (double)group.size;
  double bandwidth = is_inside ? cluster->intra_bandwidth : cluster->inter_bandwidth;
  double latency = is_inside ? cluster->intra_latency : cluster->inter_latency;
  return bytes / (bandwidth * cluster->link_efficiency) + latency + cluster->kernel_overhead;
}
