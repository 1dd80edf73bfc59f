/* The CUDA entry points of every family: the same argument structs, formulas and errors as on the CPU.
 *
 * WHERE DATA LIVES  every data pointer in the args, the workspace included, is memory of the calling thread's current
 *     CUDA device, which is also the device of stream. The args themselves are in host memory and are copied.
 * STREAM  a cudaStream_t as void*; NULL is the default stream. Work is queued there; no entry point synchronises,
 *     allocates or copies, so a call may be captured into a CUDA graph. The executor is not used.
 * ERRORS  of arguments: as on the CPU. Of a CUDA call: SL_INTERNAL, with CUDA's own text. What fails while the work
 *     runs shows in the caller's next CUDA call, as with any queued work. A build without CUDA kernels
 *     (SLUICE_BUILD_CUDA=OFF) has the same symbols, and they return SL_UNSUPPORTED.
 * DETERMINISM  the same inputs on the same device give the same bits: no atomics on floating-point numbers.
 */
#ifndef SLUICE_CUDA_H
#define SLUICE_CUDA_H

#include <stdbool.h>

#include <sluice/accumulate.h>
#include <sluice/gated_attention.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Whether this build has CUDA kernels. Says nothing about a device being there. */
SL_API bool sl_cuda_built(void);

/* gated_attention.h on a CUDA device, for all four dtypes: float64 is computed in float64, the others in float32.
 * key_range, q_offset and text_begin are device memory, so their values are not checked: they are clamped to
 * 0 <= begin <= end <= n_k, 0 <= q_offset <= n_k - n_q and -2^31 <= text_begin <= begin.
 * The forward needs no workspace. The backward needs what its workspace_size function says. */
SL_API sl_status sl_gated_attention_cuda(const sl_gated_attention_args *args, void *stream);
SL_API sl_status sl_gated_attention_backward_cuda_workspace_size(const sl_gated_attention_args *args, size_t *bytes);
SL_API sl_status sl_gated_attention_backward_cuda(const sl_gated_attention_args *args, void *stream);

/* accumulate.h on a CUDA device. The accumulator and what is read from it have the bits that the CPU gives, but for
 * those of a NaN; statistics may differ in their last bits. stats is device memory too. */
SL_API sl_status sl_accumulate_cuda_workspace_size(int64_t count, size_t *bytes);
SL_API sl_status sl_accumulate_cuda(const sl_accumulate_args *args, void *stream);
SL_API sl_status sl_measure_gradient_cuda(const sl_accumulate_args *args, void *stream);
SL_API sl_status sl_read_accumulator_cuda(const sl_accumulate_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
