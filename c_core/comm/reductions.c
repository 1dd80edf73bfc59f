/* Flat: every rank puts its input into its slot and reduces all of them; one step. Two-shot, piece by piece: each rank
 * reduces one share of the piece, then collects the others' shares. Both go on in the same step, for pieces that follow
 * each other: a step puts in piece i, reduces piece i - 1 and collects piece i - 2, so that a piece costs one barrier,
 * and two more steps end it. A rank's own input is read where it is. */
#include "comm/reductions.h"

#include <string.h>

#include "comm/reduce.h"
#include "comm/step.h"
#include "runtime/status.h"

static size_t smaller(size_t x, size_t y) { return x < y ? x : y; }

static size_t larger(size_t x, size_t y) { return x > y ? x : y; }

enum {
  BLOCK = 16 << 10,        /* bytes that stay in the nearest cache from one pass over them to the next */
  OVERLAPPING = 4,         /* pieces that a reduction of middling size is divided into, for the two shots to overlap */
  SMALL_PIECE = 256 << 10, /* smaller ones take longer to wait for than that gains */
};

/* out = the reduction of own input and, at the same offset, these slots of the others. */
static void reduce_slots(const sl_comm *comm, const sl_reduction *reduction, const void *own, bool last_slots,
                         size_t offset, void *out, size_t bytes) {
  const void *in[SL_COMM_MAX_SIZE];
  for (int i = 0; i < comm->size; ++i) {
    const char *slot = last_slots ? sl_step_last_slot(comm, i) : sl_step_slot(comm, i);
    in[i] = i == comm->rank ? own : slot + offset;
  }
  sl_reduce_args args = {.out = out,
                         .in = in,
                         .sources = comm->size,
                         .count = bytes / sl_dtype_size(reduction->dtype),
                         .dtype = reduction->dtype,
                         .op = reduction->op,
                         .factor = reduction->factor};
  if (bytes) sl_reduce(&args);
}

static void copy(void *to, const void *from, size_t bytes, bool streaming) {
  if (streaming)
    sl_copy_streaming(to, from, bytes);
  else if (bytes)
    memcpy(to, from, bytes);
}

static sl_status run_flat(sl_comm *comm, const void *in, void *out, size_t bytes, const sl_reduction *reduction,
                          int root) {
  bool wanted = root < 0 || root == comm->rank;
  SL_CHECK(sl_step_begin(comm));
  if (root != comm->rank) sl_step_put(comm, sl_step_slot(comm, comm->rank), in, bytes, bytes);
  sl_step_arrive(comm);
  if (!wanted) return SL_OK;
  SL_CHECK(sl_step_wait(comm));
  reduce_slots(comm, reduction, in, false, 0, out, bytes);
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

/* The two shots of a large reduction. */
typedef struct two_shot {
  sl_comm *comm;
  const sl_reduction *reduction;
  const char *in;
  char *out;
  size_t bytes, piece; /* what a rank reduced of a piece stands in its slot behind a whole piece */
  bool wanted, shared; /* the result, by this rank; by others */
  bool streaming;
} two_shot;

static size_t piece_bytes(const two_shot *pass, size_t piece) {
  return smaller(pass->bytes - piece * pass->piece, pass->piece);
}

/* All but the own share, which nobody else reduces. */
static void put_piece(const two_shot *pass, size_t piece) {
  size_t bytes = piece_bytes(pass, piece);
  share own = share_of(pass->comm, pass->comm->rank, bytes);
  const char *in = pass->in + piece * pass->piece;
  char *slot = sl_step_slot(pass->comm, pass->comm->rank);
  sl_step_put(pass->comm, slot, in, own.begin, bytes);
  sl_step_put(pass->comm, slot + own.end, in + own.end, bytes - own.end, bytes);
}

/* The own share of a piece that was put in with the last step, for the others to collect after this one. */
static void reduce_share(const two_shot *pass, size_t piece) {
  share own = share_of(pass->comm, pass->comm->rank, piece_bytes(pass, piece));
  size_t start = piece * pass->piece;
  char *result = sl_step_slot(pass->comm, pass->comm->rank) + pass->piece;
  _Alignas(SL_COMM_LINE) char block[BLOCK];
  for (size_t at = own.begin; at < own.end; at += BLOCK) {
    size_t bytes = smaller(own.end - at, BLOCK);
    char *out = pass->wanted ? pass->out + start + at : NULL, *to = out && !pass->streaming ? out : block;
    reduce_slots(pass->comm, pass->reduction, pass->in + start + at, true, at, to, bytes);
    if (pass->shared) sl_step_put(pass->comm, result + (at - own.begin), to, bytes, own.end - own.begin);
    if (out && to != out) sl_copy_streaming(out, to, bytes);
  }
}

static void collect_shares(const two_shot *pass, size_t piece, bool last_slots) {
  sl_comm *comm = pass->comm;
  for (int turn = 1; turn < comm->size && pass->wanted; ++turn) {
    int i = (comm->rank + turn) % comm->size; /* not all from the same rank at the same time */
    share theirs = share_of(comm, i, piece_bytes(pass, piece));
    const char *slot = last_slots ? sl_step_last_slot(comm, i) : sl_step_slot(comm, i);
    copy(pass->out + piece * pass->piece + theirs.begin, slot + pass->piece, theirs.end - theirs.begin,
         pass->streaming);
  }
}

static sl_status run_two_shot(const two_shot *pass) {
  size_t pieces = (pass->bytes + pass->piece - 1) / pass->piece;
  for (size_t i = 0; i <= pieces; ++i) {
    SL_CHECK(sl_step_begin(pass->comm));
    if (i >= 1) reduce_share(pass, i - 1);
    if (i >= 2) collect_shares(pass, i - 2, true);
    if (i < pieces) put_piece(pass, i);
    sl_step_arrive(pass->comm);
    if (i < pieces || pass->wanted) SL_CHECK(sl_step_wait(pass->comm));
  }
  collect_shares(pass, pieces - 1, false);
  return SL_OK;
}

sl_status sl_reduction_run(sl_comm *comm, const void *in, void *out, size_t count, const sl_reduction *reduction,
                           int root, int64_t timeout) {
  size_t bytes = count * sl_dtype_size(reduction->dtype);
  sl_signature signature = {.kind = root < 0 ? SL_CALL_ALL_REDUCE : SL_CALL_REDUCE,
                            .bytes = bytes,
                            .factor = reduction->factor,
                            .root = (int16_t)root,
                            .dtype = (uint8_t)reduction->dtype,
                            .op = (uint8_t)reduction->op};
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  if (bytes <= comm->tuning.flat) return run_flat(comm, in, out, bytes, reduction, root);
  two_shot pass = {.comm = comm, .reduction = reduction, .in = in, .out = out, .bytes = bytes};
  size_t room = (comm->header->slot_bytes - SL_COMM_LINE) / ((size_t)comm->size + 1) * (size_t)comm->size;
  pass.piece = smaller(smaller(comm->tuning.piece, room), larger(bytes / OVERLAPPING, SMALL_PIECE));
  pass.piece = pass.piece / SL_COMM_LINE * SL_COMM_LINE;
  pass.wanted = root < 0 || root == comm->rank;
  pass.shared = root != comm->rank && comm->size > 1;
  pass.streaming = bytes >= comm->tuning.streaming && in != out; /* in place it is in the cache already */
  return run_two_shot(&pass);
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
        sl_step_put(comm, slot + (size_t)i * piece, (const char *)in[i] + done, smaller(bytes - done, piece),
                    bytes - done);
    }
    sl_step_arrive(comm);
    SL_CHECK(sl_step_wait(comm));
    size_t whole = counts[comm->rank] * width, end = smaller(whole, done + piece), offset = (size_t)comm->rank * piece;
    _Alignas(SL_COMM_LINE) char block[BLOCK]; /* for what is to be written past the caches */
    bool streaming = whole >= comm->tuning.streaming && in[comm->rank] != out;
    for (size_t at = done; at < end; at += BLOCK) {
      size_t bytes = smaller(end - at, BLOCK);
      const char *own = (const char *)in[comm->rank] + at;
      char *to = streaming ? block : (char *)out + at;
      reduce_slots(comm, reduction, own, false, offset + (at - done), to, bytes);
      if (streaming) sl_copy_streaming((char *)out + at, to, bytes);
    }
    done += piece;
  } while (done < largest);
  return SL_OK;
}
