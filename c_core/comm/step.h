/* How a collective goes forward: in steps, which all ranks of the group take in the same number and order.
 *
 *   sl_step_begin    the rank's slot for this step is free to be written
 *   sl_step_arrive   what is in the slot is there to be read
 *   sl_step_wait     all ranks have arrived: their slots may be read, until the next sl_step_begin but one
 *
 * Each rank has two slots and uses them in turn. A rank that begins step s + 1 has read all that it wanted of step s,
 * so its arrival tells the others that its reading is over; so step s + 2, which overwrites what s had, begins when all
 * have arrived at s + 1. One barrier a step is all the waiting there is. */
#ifndef SL_COMM_STEP_H
#define SL_COMM_STEP_H

#include <string.h>

#include "comm/group.h"
#include "comm/reduce.h"

/* Begins a collective: refuses it if the group is broken, shows the signature to the others, sets the deadline. */
sl_status sl_call_begin(sl_comm *comm, const sl_signature *signature, int64_t timeout);

sl_status sl_step_begin(sl_comm *comm);
void sl_step_arrive(sl_comm *comm);
sl_status sl_step_wait(sl_comm *comm);

/* Waits for one rank only: its slot alone may be read. */
sl_status sl_step_wait_for(sl_comm *comm, int rank);

/* Whether the rank's process is stopped, as far as can be seen: to tell that from one that is busy. */
bool sl_comm_is_stopped(const sl_comm *comm, int rank);

/* A rank's slot of this step. */
static inline char *sl_step_slot(const sl_comm *comm, int rank) {
  const sl_header *header = comm->header;
  return (char *)header + header->slots + ((size_t)rank * 2 + (comm->step & 1)) * header->slot_bytes;
}

/* A rank's slot of the step before, which may be read until this rank arrives at this step. */
static inline char *sl_step_last_slot(const sl_comm *comm, int rank) {
  const sl_header *header = comm->header;
  return (char *)header + header->slots + ((size_t)rank * 2 + (~comm->step & 1)) * header->slot_bytes;
}

/* Into the own slot. whole: bytes that are put there at about the same time. The lines of the slot are in the caches of
 * whoever read them last, and a plain store calls each of them back first: see pace.h. */
static inline void sl_step_put(sl_comm *comm, void *slot, const void *from, size_t bytes, size_t whole) {
  bool large = whole >= comm->tuning.buffer_streaming;
  if (large) comm->pace.bytes += bytes;
  if (large && comm->pace.streaming)
    sl_copy_streaming(slot, from, bytes);
  else if (bytes)
    memcpy(slot, from, bytes);
}

/* A rank's signature of this call; valid once that rank was waited for. */
static inline const sl_signature *sl_call_signature(const sl_comm *comm, int rank) {
  return &comm->member[rank].signature[comm->signature.call & 1];
}

#endif
