/* prune: how much each channel of a weight is worth, as structured pruning asks before it removes one.
 * One pass over the weight's own memory, whatever its layout: no copy, no transposition.
 *
 * FORMULA (the L1 norm of Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710), for channel c along
 * dimension dim of a weight w:
 *   norm_c = sum of |w_i| over all i whose index along dim is c
 * Values are widened to float64 and added there, so that the norm of a float32 weight is the exact sum to within one
 * rounding to float32, and equal channels tie exactly.
 *
 * ORDER of the additions, the same on every tier. The other dimensions are sorted by stride and merged where one
 * continues the other, which leaves runs of equally spaced elements. Where channels are neighbours in memory and the
 * elements of a run are not, runs are added element by element; else element i of a run goes to lane i % 16, lanes are
 * added by halves (l and l + 8, then l and l + 4, ...), and the run to its channel.
 *
 * OPERATOR
 *   sluice::channel_norms(Tensor weight, int dim) -> Tensor norms
 *
 * SHAPES  weight of rank 1 to 8 and of any size, 0 included. dim in [-rank, rank). norms [weight.size(dim)].
 * DTYPES  weight: float32, bfloat16, float16 or float64. norms: float64 for float64, else float32.
 * STRIDES any, overlaps included (a stride of 0 counts its element as often as the shape says).
 * VALUES  a channel with NaN has the norm NaN; one with an infinity and no NaN, infinity. A channel without elements
 *         has the norm 0. A sum beyond float32 is infinity.
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE (dim, rank, sizes), SL_UNSUPPORTED (dtype).
 * DETERMINISM  the same weight in the same layout gives the same bits, whatever the number of threads and the CPU tier.
 */
#ifndef SLUICE_PRUNE_H
#define SLUICE_PRUNE_H

#include <sluice/cpu.h>
#include <sluice/executor.h>
#include <sluice/types.h>

#define SL_CHANNEL_NORMS_SCHEMA "channel_norms(Tensor weight, int dim) -> Tensor norms"

/* The highest rank of a weight. */
#define SL_PRUNE_MAX_RANK 8

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sl_channel_norms_args {
  sl_dtype dtype;                     /* SL_F32, SL_BF16, SL_F16 or SL_F64 */
  const void *weight;                 /* the element whose indices are all 0 */
  int64_t rank;                       /* 1 to SL_PRUNE_MAX_RANK */
  int64_t sizes[SL_PRUNE_MAX_RANK];   /* at least 0 each */
  int64_t strides[SL_PRUNE_MAX_RANK]; /* in elements, at least 0 each */
  int64_t dim;                        /* [0, rank) */
  void *norms;                        /* written: sizes[dim] values, double for SL_F64, else float */
  const sl_executor *executor;        /* NULL: serial */
} sl_channel_norms_args;

SL_API sl_status sl_channel_norms(const sl_channel_norms_args *args);

/* The same in plain scalar C: the specification that every kernel is tested against, bit for bit. */
SL_API sl_status sl_channel_norms_reference(const sl_channel_norms_args *args);

/* Name of the kernel that dispatch picks on this machine, e.g. "avx2". Never NULL. */
SL_API const char *sl_channel_norms_kernel_name(void);

#ifdef __cplusplus
}
#endif
#endif
