/* The kernel table: what one instruction-set tier supplies for channel norms. Both functions work on elements that are
 * neighbours in memory; everything else is plain C above the table. */
#ifndef SL_PRUNE_KERNEL_H
#define SL_PRUNE_KERNEL_H

#include <sluice/prune.h>

enum { SL_PRUNE_LANES = 16 };

typedef struct sl_prune_kernel {
  const char *name;
  sl_isa isa;
  /* The sum of |values[i]| over count neighbours, in the lanes of the contract. */
  double (*add_run)(sl_dtype dtype, const void *values, int64_t count);
  /* sums[i] += |values[i]| for count neighbours. */
  void (*add_to_each)(sl_dtype dtype, const void *values, int64_t count, double *sums);
} sl_prune_kernel;

/* The kernel number i of kernels.def, NULL behind the last. */
const sl_prune_kernel *sl_prune_list_kernels(int number);

extern const sl_prune_kernel sl_prune_scalar;

/* |element index of data| */
double sl_prune_magnitude(sl_dtype dtype, const void *data, int64_t index);

/* Adds the lanes by halves. Leaves rubbish in them. */
static inline double sl_prune_add_lanes(double *lanes) {
  for (int width = SL_PRUNE_LANES / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

/* The sum of |values[i * stride]| over count elements, in the same lanes: for runs with gaps. */
double sl_prune_add_spaced(sl_dtype dtype, const void *values, int64_t count, int64_t stride);

/* data + index elements. */
static inline const void *sl_prune_offset(const void *data, int64_t index, sl_dtype dtype) {
  return (const char *)data + index * (dtype == SL_F64 ? 8 : dtype == SL_F32 ? 4 : 2);
}

#endif
