/* comm: collectives and point-to-point transfers between the ranks of one host, over shared memory.
 *
 * A COMMUNICATOR is one rank's end of a group. Rank 0 creates the group's memory and hands out a text; the other ranks
 * join with it. How the text travels is the caller's affair (c10d: the store):
 *   rank 0:  sl_comm_create(&options, &comm, handle)     handle -> all
 *   others:  sl_comm_join(&options, handle, &comm)
 *   all:     sl_comm_start(comm, timeout)                waits until all have joined; then nothing of the group is left
 *                                                        in any file system, however its processes may end
 *   ...
 *   all:     sl_comm_close(comm)                         does not wait for the others
 * Whether two ranks share a host cannot be computed, only tried: ranks with equal sl_comm_host_identity() may; those
 * for whom sl_comm_join() returns SL_OK do.
 *
 * CALLS block until the rank's part is done. All ranks of a group make the same calls on it in the same order. A
 * communicator serves one collective at a time: two threads must not be in one together; transfers (send, receive) may
 * go on beside it, from any threads. Different communicators are independent, whatever ranks they have in common.
 *
 * REDUCTION, in the order of the ranks, by whichever rank computes an element: out = x_0 o x_1 o ... o x_(size-1).
 * bfloat16 and float16 are added up in float32 and rounded once, at the end. Hence the same bits on every rank, in
 * every run. Integers wrap around. AVG divides the sum by the size (integers: towards zero). PREMUL_SUM multiplies each
 * input by factor first, in the type of the sum. MIN and MAX give NaN if an input is NaN. BAND, BOR and BXOR are for
 * integers and booleans. Booleans: SUM and MAX are or, PRODUCT and MIN are and.
 *
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY, SL_UNSUPPORTED as everywhere, at the rank that made
 *         the mistake; then the ones below, which every rank of the group gets, within a second, with a text that names
 *         the rank, its process and the call:
 *   SL_PEER_LOST   a rank's process has ended, or has closed its communicator, and is waited for
 *   SL_TIMEOUT     a rank has not come within the timeout: it is stopped, or is doing something else
 *   SL_MISMATCH    ranks disagree on the call: another collective, dtype, size, operator or root
 * After one of these three the group is broken: every later call returns the same error at once. Buffers that a failed
 * call would have written hold anything.
 */
#ifndef SLUICE_COMM_H
#define SLUICE_COMM_H

#include <stdbool.h>

#include <sluice/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes for a text that sl_comm_create() or sl_comm_host_identity() writes, its 0 included. */
#define SL_COMM_TEXT 256

/* Most ranks of a group. */
#define SL_COMM_MAX_SIZE 1024

typedef enum sl_reduce_op {
  SL_REDUCE_SUM = 0,
  SL_REDUCE_AVG = 1,
  SL_REDUCE_PRODUCT = 2,
  SL_REDUCE_MIN = 3,
  SL_REDUCE_MAX = 4,
  SL_REDUCE_BAND = 5,
  SL_REDUCE_BOR = 6,
  SL_REDUCE_BXOR = 7,
  SL_REDUCE_PREMUL_SUM = 8,
} sl_reduce_op;

typedef struct sl_comm sl_comm;

/* Which algorithm serves which size, in bytes. What is measured best differs between machines; all ranks use rank
 * 0's. */
typedef struct sl_comm_tuning {
  size_t flat;  /* reductions up to here: every rank reads all inputs. Beyond: each reduces a share, then shares it */
  size_t piece; /* what a rank puts into its buffer at a time, at most; half of buffer_bytes, at most */
  size_t
      direct; /* messages of collectives from here on are read from the sender's memory, where the system allows it */
  size_t direct_send;      /* what is sent and received, likewise */
  size_t streaming;        /* outputs from here on are written past the caches */
  size_t buffer_streaming; /* what a rank puts into its buffer at a time, from here on, may be, if that is faster */
} sl_comm_tuning;

/* What sl_comm_create() uses for a group of this size if it isn't told. */
SL_API void sl_comm_default_tuning(int size, sl_comm_tuning *tuning);

typedef struct sl_comm_options {
  int rank;            /* 0 <= rank < size */
  int size;            /* 1 .. SL_COMM_MAX_SIZE */
  const int *names;    /* [size] how errors call the ranks, e.g. their global ranks; NULL: their numbers in the group */
  size_t buffer_bytes; /* rank 0 only: shared memory per rank; touched only as far as used; 0: a good size */
  const sl_comm_tuning *tuning; /* rank 0 only; NULL: the default */
} sl_comm_options;

/* Which host this is, as far as can be told without trying: the boot and the space of processes. SLUICE_COMM_HOST in
 * the environment is added to it, so that one machine can stand for several in tests. */
SL_API sl_status sl_comm_host_identity(char text[SL_COMM_TEXT]);

/* Rank 0: makes the group's memory. Mode 0600, no name that could be guessed. */
SL_API sl_status sl_comm_create(const sl_comm_options *options, sl_comm **comm, char handle[SL_COMM_TEXT]);

/* The other ranks. SL_UNSUPPORTED: rank 0's memory can't be opened from here, so this is another host. */
SL_API sl_status sl_comm_join(const sl_comm_options *options, const char *handle, sl_comm **comm);

/* All ranks, once. timeout in milliseconds, here and below; below 0: none. */
SL_API sl_status sl_comm_start(sl_comm *comm, int64_t timeout);

/* Ends this rank's part. comm may be NULL. Not while a call on it is in progress. */
SL_API void sl_comm_close(sl_comm *comm);

/* Breaks the group: every rank's calls on it, also those in progress, return SL_PEER_LOST with this reason. */
SL_API void sl_comm_abort(sl_comm *comm, const char *reason);

/* SL_OK, or the error that broke the group; the text is then in sl_last_error(). */
SL_API sl_status sl_comm_state(sl_comm *comm);

/* Collectives. Sizes of buffers are in bytes, except where they are counted in elements of dtype. in and out may be the
 * same buffer where both have the same size, and must not overlap otherwise. A buffer of 0 bytes may be NULL. */

/* Returns when all ranks have called it. */
SL_API sl_status sl_comm_barrier(sl_comm *comm, int64_t timeout);

/* buffer is read at root and written elsewhere. */
SL_API sl_status sl_comm_broadcast(sl_comm *comm, void *buffer, size_t bytes, int root, int64_t timeout);

/* out[i] = the reduction of in[i] over the ranks. factor: of SL_REDUCE_PREMUL_SUM, rounded to the type of the sum. */
SL_API sl_status sl_comm_all_reduce(sl_comm *comm, const void *in, void *out, size_t count, sl_dtype dtype,
                                    sl_reduce_op op, double factor, int64_t timeout);

/* The same at root alone; out is not used elsewhere and may be NULL there. */
SL_API sl_status sl_comm_reduce(sl_comm *comm, const void *in, void *out, size_t count, sl_dtype dtype, sl_reduce_op op,
                                double factor, int root, int64_t timeout);

/* in[rank]: what is reduced for that rank; counts[rank]: its elements, alike on all ranks, may differ by rank. */
SL_API sl_status sl_comm_reduce_scatter(sl_comm *comm, const void *const *in, const size_t *counts, void *out,
                                        sl_dtype dtype, sl_reduce_op op, double factor, int64_t timeout);

/* out[rank], of out_bytes[rank]: what that rank gave as in. Sizes may differ by rank. */
SL_API sl_status sl_comm_all_gather(sl_comm *comm, const void *in, size_t bytes, void *const *out,
                                    const size_t *out_bytes, int64_t timeout);

/* The same at root alone; out and out_bytes are not used elsewhere and may be NULL there. */
SL_API sl_status sl_comm_gather(sl_comm *comm, const void *in, size_t bytes, void *const *out, const size_t *out_bytes,
                                int root, int64_t timeout);

/* in[rank], of in_bytes[rank], at root alone: what that rank gets. */
SL_API sl_status sl_comm_scatter(sl_comm *comm, const void *const *in, const size_t *in_bytes, void *out, size_t bytes,
                                 int root, int64_t timeout);

/* in[rank], of in_bytes[rank], goes to that rank; out[rank], of out_bytes[rank], comes from it. */
SL_API sl_status sl_comm_all_to_all(sl_comm *comm, const void *const *in, const size_t *in_bytes, void *const *out,
                                    const size_t *out_bytes, int64_t timeout);

/* Transfers between two ranks, matched by sender, receiver and tag, in the order in which they were begun. They begin
 * here and go on whenever either side is in one of the functions below; each of those moves every transfer of its
 * communicator as far as it can. A small message is complete for its sender at once; a larger one when it was received.
 * A message whose size is not the receiver's is SL_MISMATCH for both. These functions may be called from any thread. */
#define SL_COMM_ANY_RANK (-1)

typedef struct sl_transfer sl_transfer;

/* buffer must stay as it is until the transfer is done. bytes may be 0. rank must not be the caller's own. */
SL_API sl_status sl_comm_send(sl_comm *comm, const void *buffer, size_t bytes, int rank, uint64_t tag,
                              sl_transfer **transfer);

/* rank may be SL_COMM_ANY_RANK. */
SL_API sl_status sl_comm_receive(sl_comm *comm, void *buffer, size_t bytes, int rank, uint64_t tag,
                                 sl_transfer **transfer);

/* Without waiting: whether it is done. The error of a transfer that failed is the result, then and later. */
SL_API sl_status sl_transfer_test(sl_transfer *transfer, bool *done);

/* Waits until it is done. SL_TIMEOUT breaks the group, as everywhere. */
SL_API sl_status sl_transfer_wait(sl_transfer *transfer, int64_t timeout);

/* Breaks the group if a rank that could complete it has ended or left, as sl_transfer_wait() does in between. For those
 * who only test: a few times a second will do. */
SL_API sl_status sl_transfer_look_after(sl_transfer *transfer);

/* The rank of the other side; SL_COMM_ANY_RANK as long as it isn't known. */
SL_API int sl_transfer_peer(const sl_transfer *transfer);

/* Whether done or not: one that isn't is called off, and breaks the group if the other side had already met it. */
SL_API void sl_transfer_free(sl_transfer *transfer);

/* For a thread that drives the transfers of a communicator: a number that changes with every event that concerns this
 * rank, and waiting until it is no longer the one that was seen, or the timeout has passed (which is no error). */
SL_API uint32_t sl_comm_events(const sl_comm *comm);
SL_API sl_status sl_comm_wait_for_event(sl_comm *comm, uint32_t seen, int64_t timeout);

/* Wakes whoever is in sl_comm_wait_for_event() of this communicator in this process. */
SL_API void sl_comm_wake(sl_comm *comm);

#ifdef __cplusplus
}
#endif
#endif
