/* Waiting for other ranks. A wait spins for as long as waking up would take, then sleeps in the kernel; now and then it
 * wakes by itself to see whether the ranks that it waits for still live. */
#define _GNU_SOURCE
#include "comm/step.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "comm/futex.h"
#include "comm/spin.h"
#include "runtime/status.h"

enum {
  CHECK_INTERVAL = 50000000, /* ns between looks at whether the others live */
  LOOK_AROUND = 200          /* spins between looks at who needs this processor */
};

static inline bool has_come(atomic_uint *word, uint32_t step) {
  return (int32_t)(atomic_load_explicit(word, memory_order_acquire) - step) >= 0;
}

sl_status sl_call_begin(sl_comm *comm, const sl_signature *signature, int64_t timeout) {
  if (sl_comm_is_broken(comm)) return sl_comm_fault(comm);
  comm->signature = *signature;
  comm->signature.call = comm->calls++;
  comm->compared = false;
  comm->timeout = timeout;
  comm->deadline = 0;
  comm->shown = false;
  return SL_OK;
}

/* By the letter that the kernel gives a process. */
bool sl_comm_is_stopped(const sl_comm *comm, int rank) {
  char path[48], line[512];
  snprintf(path, sizeof path, "/proc/%d/stat", (int)comm->member[rank].process);
  FILE *file = fopen(path, "r");
  if (!file) return false;
  size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = 0;
  const char *name_end = strrchr(line, ')');
  char state = name_end && name_end[1] ? name_end[2] : 0;
  return state == 'T' || state == 't';
}

/* What the rank that does not come is doing, as far as can be seen. */
static sl_status report_timeout(sl_comm *comm, int rank) {
  char name[64], call[160], other[160], where[200] = "";
  const sl_member *member = comm->member + rank;
  if (atomic_load(&member->state) == SL_MEMBER_ABSENT) {
    return sl_comm_break(comm, SL_TIMEOUT, "timeout: rank %d has not joined the group", comm->names[rank]);
  }
  if (comm->started) {
    const sl_signature *last = member->signature;
    if ((int32_t)(member->signature[1].call - last->call) > 0) last = member->signature + 1;
    snprintf(where, sizeof where, "; the last call it made is %s", sl_signature_describe(last, other));
  }
  return sl_comm_break(comm, SL_TIMEOUT, "timeout in %s: rank %d waits for %s, which %s%s",
                       sl_signature_describe(&comm->signature, call), comm->names[comm->rank],
                       sl_comm_name_rank(comm, rank, name),
                       sl_comm_is_stopped(comm, rank) ? "is stopped" : "has not come", where);
}

/* Looks after the ranks that have not come; only one, or all for rank -1. */
static sl_status look_after(sl_comm *comm, int rank) {
  char text[160];
  int64_t now = sl_clock();
  for (int i = rank < 0 ? 0 : rank; i < (rank < 0 ? comm->size : rank + 1); ++i) {
    sl_member *member = comm->member + i;
    if (i == comm->rank || has_come(&member->step, comm->step)) continue;
    unsigned state = atomic_load(&member->state);
    bool gone = state == SL_MEMBER_LEFT || (state == SL_MEMBER_PRESENT && !sl_segment_is_present(comm->segment, i));
    /* It may have arrived, and then gone, in between. */
    if (gone && !has_come(&member->step, comm->step) &&
        sl_comm_check_rank(comm, i, sl_signature_describe(&comm->signature, text)))
      return sl_comm_fault(comm);
    if (now >= comm->deadline) return report_timeout(comm, i);
  }
  return SL_OK;
}

/* Whether a rank that has not come may need the very processor that this one keeps busy: two ranks can share one as
 * long as another is taken by something else. */
static bool is_in_the_way(const sl_comm *comm, uint32_t step, int rank) {
  int processor = sched_getcpu();
  for (int i = rank < 0 ? 0 : rank; i < (rank < 0 ? comm->size : rank + 1); ++i) {
    if (i != comm->rank && !has_come(&comm->member[i].step, step) &&
        atomic_load_explicit(&comm->member[i].processor, memory_order_relaxed) == processor)
      return true;
  }
  return false;
}

static sl_status wait_for_word(sl_comm *comm, atomic_uint *word, atomic_uint *sleepers, uint32_t step, int rank) {
  sl_spin spin = sl_spin_begin(comm->crowded);
  do {
    if (has_come(word, step)) return SL_OK;
  } while (sl_spin_once(&spin) && (spin.left % LOOK_AROUND != 0 || !is_in_the_way(comm, step, rank)));
  sl_status status = SL_OK;
  if (comm->deadline == 0) comm->deadline = sl_comm_deadline(comm->timeout);
  int64_t checked = sl_clock();
  atomic_fetch_add(sleepers, 1);
  while (status == SL_OK) {
    unsigned value = atomic_load(word);
    if ((int32_t)(value - step) >= 0) break;
    if (sl_comm_is_broken(comm)) {
      status = sl_comm_fault(comm);
      break;
    }
    int64_t left = comm->deadline - sl_clock();
    if (left > 0) sl_futex_wait(word, value, left < CHECK_INTERVAL ? left : CHECK_INTERVAL);
    int64_t now = sl_clock();
    if (now - checked >= CHECK_INTERVAL || now >= comm->deadline) {
      if (has_come(word, step)) break;
      status = look_after(comm, rank);
      checked = now;
    }
  }
  atomic_fetch_sub(sleepers, 1);
  return status;
}

static uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static bool is_alike(const sl_signature *one, const sl_signature *other) {
  bool sized = one->kind == SL_CALL_ALL_REDUCE || one->kind == SL_CALL_REDUCE || one->kind == SL_CALL_BROADCAST ||
               one->kind == SL_CALL_REDUCE_SCATTER;
  return one->kind == other->kind && one->call == other->call && one->dtype == other->dtype && one->op == other->op &&
         one->root == other->root && (!sized || one->bytes == other->bytes) &&
         bits_of(one->factor) == bits_of(other->factor); /* a NaN is like itself */
}

/* Compares this rank's signature with that of the ranks waited for: one, or all for rank -1. */
static sl_status compare(sl_comm *comm, int rank) {
  char own_name[64], other_name[64], own[160], other[160];
  for (int i = rank < 0 ? 0 : rank; i < (rank < 0 ? comm->size : rank + 1); ++i) {
    const sl_signature *theirs = sl_call_signature(comm, i);
    if (!is_alike(&comm->signature, theirs))
      return sl_comm_break(comm, SL_MISMATCH, "%s is in %s, but %s is in %s",
                           sl_comm_name_rank(comm, comm->rank, own_name), sl_signature_describe(&comm->signature, own),
                           sl_comm_name_rank(comm, i, other_name), sl_signature_describe(theirs, other));
  }
  comm->compared = true;
  return SL_OK;
}

sl_status sl_step_begin(sl_comm *comm) {
  sl_header *header = comm->header;
  uint32_t before = comm->step;
  SL_CHECK(wait_for_word(comm, &header->phase, &header->phase_sleepers, before, -1));
  comm->step = before + 1;
  /* A call of one step may take less time than it takes to look at the clock. */
  sl_pace_step(&comm->pace, comm->signature.kind, comm->step, comm->shown ? sl_clock() : 0);
  if (!comm->shown) {
    /* Only now has everybody seen the signature that this one overwrites. */
    comm->member[comm->rank].signature[comm->signature.call & 1] = comm->signature;
    comm->shown = true;
  }
  return SL_OK;
}

void sl_step_arrive(sl_comm *comm) {
  sl_header *header = comm->header;
  sl_member *own = comm->member + comm->rank;
  /* No rank arrives at a step before all have arrived at the one before, so the sum tells that all have at this one. */
  if (atomic_fetch_add(&header->arrivals, 1) + 1 == comm->step * (unsigned)comm->size) {
    atomic_store(&header->phase, comm->step);
    if (atomic_load(&header->phase_sleepers)) sl_futex_wake_all(&header->phase);
  }
  /* Last, so that whoever ends in the middle of this has not come, to those who look after it. */
  atomic_store_explicit(&own->processor, sched_getcpu(), memory_order_relaxed);
  atomic_store(&own->step, comm->step);
  if (atomic_load(&own->step_sleepers)) sl_futex_wake_all(&own->step);
}

sl_status sl_step_wait(sl_comm *comm) {
  sl_header *header = comm->header;
  SL_CHECK(wait_for_word(comm, &header->phase, &header->phase_sleepers, comm->step, -1));
  return comm->compared ? SL_OK : compare(comm, -1);
}

sl_status sl_step_wait_for(sl_comm *comm, int rank) {
  sl_member *member = comm->member + rank;
  SL_CHECK(wait_for_word(comm, &member->step, &member->step_sleepers, comm->step, rank));
  return comm->compared ? SL_OK : compare(comm, rank);
}
