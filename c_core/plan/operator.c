/* The roofline of one operator: the longer of its arithmetic and its memory traffic, and a fixed cost. */
#include "plan/operator.h"

#include <math.h>

static void add_roofline(sl_plan_cost *cost, const sl_plan_cluster *cluster, double flops, double rate, double bytes) {
  double memory_s = bytes / (cluster->memory_bandwidth * cluster->memory_efficiency);
  cost->seconds += fmax(flops / rate, memory_s) + cluster->kernel_overhead;
  cost->flops += flops;
}

void sl_plan_add_product(sl_plan_cost *cost, const sl_plan_cluster *cluster, sl_plan_precision precision, double count,
                         double m, double n, double k, double output_bytes) {
  double peak = precision == SL_PLAN_FP8 ? cluster->peak_flops_fp8 : cluster->peak_flops;
  double input_bytes = precision == SL_PLAN_FP8 ? 1 : 2;
  double efficiency = cluster->gemm_efficiency / (1 + cluster->gemm_half_size * (1 / m + 1 / n + 1 / k));
  double bytes = count * (input_bytes * k * (m + n) + output_bytes * m * n);
  add_roofline(cost, cluster, 2 * count * m * n * k, peak * efficiency, bytes);
}

void sl_plan_add_pass(sl_plan_cost *cost, const sl_plan_cluster *cluster, double bytes) {
  add_roofline(cost, cluster, 0, 1, bytes);
}

void sl_plan_add_kernel(sl_plan_cost *cost, const sl_plan_cluster *cluster, double flops, double efficiency,
                        double bytes) {
  add_roofline(cost, cluster, flops, cluster->peak_flops * efficiency, bytes);
}
