/* Collectives that compute: all_reduce, reduce and reduce_scatter on a group that has more than one rank. */
#ifndef SL_COMM_REDUCTIONS_H
#define SL_COMM_REDUCTIONS_H

#include "comm/group.h"

typedef struct sl_reduction {
  sl_dtype dtype;
  sl_reduce_op op;
  double factor;
} sl_reduction;

/* root -1: every rank gets the result. */
sl_status sl_reduction_run(sl_comm *comm, const void *in, void *out, size_t count, const sl_reduction *reduction,
                           int root, int64_t timeout);

/* Each rank gets its own part: in[rank] of counts[rank] elements. */
sl_status sl_reduction_scatter(sl_comm *comm, const void *const *in, const size_t *counts, void *out,
                               const sl_reduction *reduction, int64_t timeout);

#endif
