/* A communicator: one rank's end of a group. And how a group breaks: the first rank that notices writes down why, and
 * every rank's calls return that from then on. */
#ifndef SL_COMM_GROUP_H
#define SL_COMM_GROUP_H

#include "comm/pace.h"
#include "comm/segment.h"

typedef enum sl_call_kind {
  SL_CALL_START = 0,
  SL_CALL_BARRIER,
  SL_CALL_BROADCAST,
  SL_CALL_ALL_REDUCE,
  SL_CALL_REDUCE,
  SL_CALL_REDUCE_SCATTER,
  SL_CALL_ALL_GATHER,
  SL_CALL_GATHER,
  SL_CALL_SCATTER,
  SL_CALL_ALL_TO_ALL,
} sl_call_kind;

_Static_assert((int)SL_CALL_ALL_TO_ALL < (int)SL_PACE_KINDS, "each kind has a pace");

struct sl_comm {
  int rank, size;
  int *names;            /* [size] */
  bool started, crowded; /* crowded: more ranks than processors, so that waiting must not keep one busy */
  bool reads_memory;     /* every rank of the group may read every other's memory */
  sl_comm_tuning tuning;
  sl_segment *segment;
  sl_header *header;
  sl_member *member; /* [size] */

  /* The collective in progress; see step.h. */
  uint32_t step;
  uint64_t calls;
  sl_signature signature;
  bool shown, compared;      /* signature: to the others; with those of all ranks that are waited for */
  int64_t timeout, deadline; /* deadline: 0 as long as the call has not had to sleep */

  sl_pace pace;

  struct sl_transfers *transfers;
};

/* What errors call a rank: "rank 3 (process 1234)". Returns text. */
const char *sl_comm_name_rank(const sl_comm *comm, int rank, char text[64]);

/* "all_reduce"; "all_reduce of 1024 bytes of float32 (call 17)". Both never NULL. */
const char *sl_call_name(int kind);
const char *sl_signature_describe(const sl_signature *signature, char text[160]);

/* Breaks the group, unless it is broken already, and returns why it is. */
sl_status sl_comm_break(sl_comm *comm, sl_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Cheap: one load as long as the group is whole. */
static inline bool sl_comm_is_broken(const sl_comm *comm) {
  return atomic_load_explicit(&comm->header->fault.state, memory_order_acquire) != 0;
}

/* The error of a broken group. */
sl_status sl_comm_fault(sl_comm *comm);

/* Breaks the group with SL_PEER_LOST if this rank has gone. Returns whether it has. */
bool sl_comm_check_rank(sl_comm *comm, int rank, const char *awaited_for);

/* When a wait that begins now is over, in nanoseconds of sl_clock(). */
int64_t sl_comm_deadline(int64_t timeout);

#endif
