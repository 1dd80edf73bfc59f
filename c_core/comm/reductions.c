/* Flat: every rank puts its input into its slot and reduces all of them; one step. Two-shot, piece by piece: each rank
 * reduces one share of the piece, then collects the others' shares; two steps. A rank's own input is read where it
 * is. */
#include "comm/reductions.h"

#include <string.h>

#include "comm/reduce.h"
#include "comm/step.h"
#include "runtime/status.h"

static size_t smaller(size_t x, size_t y) { return x < y ? x : y; }

/* out = the reduction of own input and, at the same offset, the others' slots. */
static void reduce_slots(const sl_comm *comm, const sl_reduction *reduction, const void *own, size_t offset, void *out,
                         size_t count) {
  const void *in[SL_COMM_MAX_SIZE];
  for (int i = 0; i < comm->size; ++i) in[i] = i == comm->rank ? own : sl_step_slot(comm, i) + offset;
  sl_reduce_args args = {.out = out,
                         .in = in,
                         .sources = comm->size,
                         .count = count,
                         .dtype = reduction->dtype,
                         .op = reduction->op,
                         .factor = reduction->factor};
  sl_reduce(&args);
}

static sl_status run_flat(sl_comm *comm, const void *in, void *out, size_t count, size_t bytes,
                          const sl_reduction *reduction, int root) {
  bool wanted = root < 0 || root == comm->rank;
  SL_CHECK(sl_step_begin(comm));
  if (bytes && root != comm->rank) memcpy(sl_step_slot(comm, comm->rank), in, bytes);
  sl_step_arrive(comm);
  if (!wanted) return SL_OK;
  SL_CHECK(sl_step_wait(comm));
  if (count) reduce_slots(comm, reduction, in, 0, out, count);
  return SL_OK;
}

/* A rank's share of a piece, in bytes from its start; whole lines, so that no two ranks write the same one. */
typedef struct share {
  size_t begin, end;
} share;

static share share_of(const sl_comm *comm, int rank, size_t bytes) {
  size_t lines = (bytes + SL_COMM_LINE - 1) / SL_COMM_LINE, size = (size_t)comm->size, i = (size_t)rank;
  share result = {smaller(lines * i / size * SL_COMM_LINE, bytes),
                  smaller(lines * (i + 1) / size * SL_COMM_LINE, bytes)};
  return result;
}

static sl_status run_piece(sl_comm *comm, const char *in, char *out, size_t bytes, const sl_reduction *reduction,
                           int root) {
  share own = share_of(comm, comm->rank, bytes);
  size_t own_bytes = own.end - own.begin;
  SL_CHECK(sl_step_begin(comm));
  char *slot = sl_step_slot(comm, comm->rank);
  if (own.begin) memcpy(slot, in, own.begin);
  if (own.end < bytes) memcpy(slot + own.end, in + own.end, bytes - own.end);
  sl_step_arrive(comm);
  SL_CHECK(sl_step_wait(comm));

  bool wanted = root < 0 || root == comm->rank;
  size_t count = own_bytes / sl_dtype_size(reduction->dtype);
  if (wanted && own_bytes) reduce_slots(comm, reduction, in + own.begin, own.begin, out + own.begin, count);
  const char *mine = in + own.begin;
  if (!wanted && own_bytes) {
    /* The result goes into the slot of the next step, the inputs lie in those of this one. */
    const void *sources[SL_COMM_MAX_SIZE];
    for (int i = 0; i < comm->size; ++i) sources[i] = i == comm->rank ? mine : sl_step_slot(comm, i) + own.begin;
    SL_CHECK(sl_step_begin(comm));
    sl_reduce_args args = {.out = sl_step_slot(comm, comm->rank),
                           .in = sources,
                           .sources = comm->size,
                           .count = count,
                           .dtype = reduction->dtype,
                           .op = reduction->op,
                           .factor = reduction->factor};
    sl_reduce(&args);
  } else {
    SL_CHECK(sl_step_begin(comm));
    if (root < 0 && own_bytes) memcpy(sl_step_slot(comm, comm->rank), out + own.begin, own_bytes);
  }
  sl_step_arrive(comm);
  if (!wanted) return SL_OK;
  SL_CHECK(sl_step_wait(comm));
  for (int turn = 1; turn < comm->size; ++turn) {
    int i = (comm->rank + turn) % comm->size; /* not all from the same rank at the same time */
    share theirs = share_of(comm, i, bytes);
    if (theirs.end > theirs.begin) memcpy(out + theirs.begin, sl_step_slot(comm, i), theirs.end - theirs.begin);
  }
  return SL_OK;
}

sl_status sl_reduction_run(sl_comm *comm, const void *in, void *out, size_t count, const sl_reduction *reduction,
                           int root, int64_t timeout) {
  size_t bytes = count * sl_dtype_size(reduction->dtype);
  sl_signature signature = {.kind = root < 0 ? SL_CALL_ALL_REDUCE : SL_CALL_REDUCE,
                            .bytes = bytes,
                            .factor = reduction->factor,
                            .root = root,
                            .dtype = (uint8_t)reduction->dtype,
                            .op = (uint8_t)reduction->op};
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  if (bytes <= comm->tuning.flat) return run_flat(comm, in, out, count, bytes, reduction, root);
  for (size_t done = 0; done < bytes; done += comm->tuning.piece) {
    SL_CHECK(run_piece(comm, (const char *)in + done, out ? (char *)out + done : NULL,
                       smaller(bytes - done, comm->tuning.piece), reduction, root));
  }
  return SL_OK;
}

sl_status sl_reduction_scatter(sl_comm *comm, const void *const *in, const size_t *counts, void *out,
                               const sl_reduction *reduction, int64_t timeout) {
  size_t width = sl_dtype_size(reduction->dtype), largest = 0;
  sl_signature signature = {.kind = SL_CALL_REDUCE_SCATTER,
                            .factor = reduction->factor,
                            .root = -1,
                            .dtype = (uint8_t)reduction->dtype,
                            .op = (uint8_t)reduction->op};
  for (int i = 0; i < comm->size; ++i) {
    signature.bytes += counts[i] * width;
    if (counts[i] * width > largest) largest = counts[i] * width;
  }
  size_t piece =
      smaller(comm->tuning.piece, comm->header->slot_bytes / (size_t)comm->size) / SL_COMM_LINE * SL_COMM_LINE;
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  size_t done = 0;
  do {
    SL_CHECK(sl_step_begin(comm));
    char *slot = sl_step_slot(comm, comm->rank);
    for (int i = 0; i < comm->size; ++i) {
      size_t bytes = counts[i] * width;
      if (i != comm->rank && done < bytes)
        memcpy(slot + (size_t)i * piece, (const char *)in[i] + done, smaller(bytes - done, piece));
    }
    sl_step_arrive(comm);
    SL_CHECK(sl_step_wait(comm));
    size_t bytes = counts[comm->rank] * width;
    if (done < bytes)
      reduce_slots(comm, reduction, (const char *)in[comm->rank] + done, (size_t)comm->rank * piece, (char *)out + done,
                   smaller(bytes - done, piece) / width);
    done += piece;
  } while (done < largest);
  return SL_OK;
}
