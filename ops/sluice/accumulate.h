/* accumulate: adds gradients into an accumulator, in float32 or in scaled float16, and measures them on the way.
 * One pass over memory gives what would otherwise take five: norm, largest magnitude, finiteness, cast and add.
 *
 * FORMULA, for the elements g of a gradient in memory order:
 *   s_i = old_i + g_i * grad_scale          in float32, product and sum each rounded (no fused multiply-add)
 *   s_i = g_i * grad_scale                  with overwrite, which spares the pass that zeroes the accumulator
 * A float32 accumulator stores s_i. A float16 accumulator is cut into blocks of SL_ACCUMULATE_BLOCK elements, each with
 * an exponent e, and holds h_i * 2^e:
 *   amax = largest finite |s_i| of the block
 *   e    = clamp(floor(log2(amax)) - 14, -126, 113)       so that amax * 2^-e is in [2^14, 2^15); -126 for amax = 0
 *   h_i  = round(s_i * 2^-e) to float16
 * The block is scaled by what it holds now, so nothing saturates, and elements down to 2^-28 of the block's largest
 * keep all eleven bits. (The seed casts by norm without a scale, which flushes what is small to zero.)
 *
 * ROUNDING of the float16 accumulator: to nearest even, or stochastic, upwards with the probability that makes the
 * expected value exact, so that what is too small to change a sum still counts on average. With |x| = |s_i| * 2^e:
 *   |x| >= 2^-14:  the 13 bits that float16 lacks are cut off after r was added to the bits of x
 *   |x| <  2^-14:  floor(|x| * 2^24 + r * 2^-13) * 2^-24, in float32
 * r is a 13-bit number that depends on the seed and the position alone. With B = i / 1024 and p = i % 1024 = 32 j + m:
 *   z  = mix64(seed + (B + 1) * 0x9E3779B97F4A7C15)       mix64: the output function of splitmix64
 *   w  = low32(z) + (16 j + m % 16) * 0x9E3779B1;  w ^= w >> 16;  w *= 0x7FEB352D;  w ^= w >> 15     in 32 bits
 *   r  = m < 16 ? w & 0x1FFF : w >> 19
 * A block with a sum that is not finite is rounded to nearest.
 *
 * STATISTICS (sl_accumulate_stats, as six float64 numbers): of the gradient before grad_scale, and of the accumulator
 * after the call. A gradient that is not finite is counted in grad_nonfinite, the other two leave it out. Sums of
 * squares are good to 1e-6, whatever the magnitudes: what float32 cannot hold is summed in float64.
 * sqrt(error_sumsq / sum_sumsq) is the relative error that the call's rounding to float16 has made.
 *
 * READING: value_i = (h_i * 2^e) * scale, rounded to the type of out. Its statistics are those of the values written.
 * The first product is exact for whatever an accumulator can hold, so reading into float32 with scale 1 loses nothing.
 *
 * OPERATORS
 *   sluice::accumulate_(Tensor(a!) accumulator, Tensor(b!)? exponents, Tensor grad, float grad_scale, bool overwrite,
 *                       int? seed) -> Tensor stats             seed absent: round to nearest
 *   sluice::measure_gradient(Tensor grad) -> Tensor stats      the first three numbers; the others are 0
 *   sluice::read_accumulator(Tensor accumulator, Tensor? exponents, float scale, Tensor(a!) out) -> Tensor stats
 *
 * SHAPES  accumulator, grad and out alike, of any rank, 0 included, and any size, 0 included.
 *         exponents [ceil(numel / 1024)], contiguous; absent if and only if the accumulator is float32. stats [6].
 * DTYPES  grad and out: float32, bfloat16 or float16. accumulator: float32 or float16. exponents int8. stats float64.
 * STRIDES the accumulator must fill its memory without gaps or overlaps (what torch.empty_like gives); i counts in its
 *         memory order. A grad or an out with other strides goes through a copy. out may be a float32 accumulator
 *         itself.
 * WRITES  of an operator raise the version counters of accumulator and exponents, or of out, by one, so that autograd
 *         finds a tensor that it saved and that was written since. No gradient flows through them. A tensor made in
 *         inference mode may be written in inference mode only: torch's own rule.
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY (workspace_size too small), SL_UNSUPPORTED (dtype).
 * DETERMINISM  the same inputs give the same bits, whatever the number of threads and whichever the CPU tier. On
 *         another kind of device the accumulator's bits are the same; sums of squares may differ in their last bits.
 */
#ifndef SLUICE_ACCUMULATE_H
#define SLUICE_ACCUMULATE_H

#include <stdbool.h>

#include <sluice/cpu.h>
#include <sluice/executor.h>
#include <sluice/types.h>

#define SL_ACCUMULATE_SCHEMA                                                                   \
  "accumulate_(Tensor(a!) accumulator, Tensor(b!)? exponents, Tensor grad, float grad_scale, " \
  "bool overwrite, int? seed) -> Tensor stats"
#define SL_MEASURE_GRADIENT_SCHEMA "measure_gradient(Tensor grad) -> Tensor stats"
#define SL_READ_ACCUMULATOR_SCHEMA                                                        \
  "read_accumulator(Tensor accumulator, Tensor? exponents, float scale, Tensor(a!) out) " \
  "-> Tensor stats"

/* Elements that share an exponent. */
#define SL_ACCUMULATE_BLOCK 1024

/* How many float64 numbers sl_accumulate_stats is. */
#define SL_ACCUMULATE_STATS 6

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sl_accumulate_stats {
  double grad_sumsq;     /* sum of squares */
  double grad_amax;      /* largest magnitude */
  double grad_nonfinite; /* how many elements are infinite or NaN */
  double sum_sumsq;      /* sum of squares of s_i; infinity if one of them is not finite */
  double error_sumsq;    /* sum of (h_i * 2^e - s_i)^2; 0 for a float32 accumulator */
  double underflow;      /* how many s_i * 2^-e other than 0 are below 2^-14, float16's normal range */
} sl_accumulate_stats;

typedef struct sl_accumulate_args {
  int64_t count;       /* elements */
  sl_dtype grad_dtype; /* SL_F32, SL_BF16 or SL_F16 */
  const void *grad;    /* read by sl_accumulate and sl_measure_gradient */
  sl_dtype dtype;      /* of the accumulator: SL_F32 or SL_F16 */
  void *accumulator;   /* written by sl_accumulate, read by sl_read_accumulator */
  int8_t *exponents;   /* one per block; NULL if and only if dtype is SL_F32 */
  double grad_scale;   /* rounded to float32; finite there */
  bool overwrite;      /* the content of accumulator and exponents on entry does not matter */
  bool stochastic;     /* round stochastically; read for SL_F16 only */
  uint64_t seed;       /* of the stochastic rounding: another one for each call */

  /* sl_read_accumulator only. */
  double scale;       /* rounded to float32; finite there */
  sl_dtype out_dtype; /* SL_F32, SL_BF16 or SL_F16 */
  void *out;          /* written; may be the accumulator if both are SL_F32 */

  sl_accumulate_stats *stats; /* written; NULL: not wanted */
  void *workspace;            /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_accumulate_args;

/* Bytes of workspace that a call on count elements needs. */
SL_API sl_status sl_accumulate_workspace_size(int64_t count, size_t *bytes);

SL_API sl_status sl_accumulate(const sl_accumulate_args *args);
SL_API sl_status sl_measure_gradient(const sl_accumulate_args *args);
SL_API sl_status sl_read_accumulator(const sl_accumulate_args *args);

/* The same three in plain scalar C: the specification that every kernel is tested against, bit for bit.
 * They need no workspace and run on the calling thread. */
SL_API sl_status sl_accumulate_reference(const sl_accumulate_args *args);
SL_API sl_status sl_measure_gradient_reference(const sl_accumulate_args *args);
SL_API sl_status sl_read_accumulator_reference(const sl_accumulate_args *args);

/* Name of the kernel that dispatch picks on this machine, e.g. "avx2". Never NULL. */
SL_API const char *sl_accumulate_kernel_name(void);

#ifdef __cplusplus
}
#endif
#endif
