/* Making, joining, breaking and leaving a group. */
#define _GNU_SOURCE
#include "comm/group.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/futex.h"
#include "comm/memory.h"
#include "comm/reduce.h"
#include "comm/step.h"
#include "comm/transfers.h"
#include "runtime/status.h"

/* Enough for pieces that amortise a step's waiting, and few enough bytes for two ranks' to stay in a shared cache. */
enum { DEFAULT_BUFFER = 4 << 20, SMALLEST_BUFFER = 64 << 10 };

static const char *const call_names[] = {"the group's start", "barrier",    "broadcast", "all_reduce", "reduce",
                                         "reduce_scatter",    "all_gather", "gather",    "scatter",    "all_to_all"};

const char *sl_call_name(int kind) {
  return kind >= 0 && kind < (int)(sizeof call_names / sizeof *call_names) ? call_names[kind] : "an unknown call";
}

const char *sl_signature_describe(const sl_signature *signature, char text[160]) {
  int kind = signature->kind, used = snprintf(text, 160, "%s", sl_call_name(kind));
  bool reduces = kind == SL_CALL_ALL_REDUCE || kind == SL_CALL_REDUCE || kind == SL_CALL_REDUCE_SCATTER;
  if (kind != SL_CALL_START && kind != SL_CALL_BARRIER)
    used += snprintf(text + used, 160 - (size_t)used, " of %" PRIu64 " bytes", signature->bytes);
  if (reduces)
    used += snprintf(text + used, 160 - (size_t)used, " of %s, %s", sl_dtype_name((sl_dtype)signature->dtype),
                     sl_reduce_op_name((sl_reduce_op)signature->op));
  if (signature->root >= 0) used += snprintf(text + used, 160 - (size_t)used, ", root %d", signature->root);
  snprintf(text + used, 160 - (size_t)used, " (call %" PRIu32 ")", signature->call);
  return text;
}

const char *sl_comm_name_rank(const sl_comm *comm, int rank, char text[64]) {
  snprintf(text, 64, "rank %d (process %d)", comm->names[rank], (int)comm->member[rank].process);
  return text;
}

int64_t sl_comm_deadline(int64_t timeout) {
  if (timeout < 0 || timeout > INT64_MAX / 2000000) return INT64_MAX;
  return sl_clock() + timeout * 1000000;
}

sl_status sl_comm_fault(sl_comm *comm) {
  sl_fault *fault = &comm->header->fault;
  /* Its writer may be gone in mid-sentence. */
  for (int tries = 0; atomic_load_explicit(&fault->state, memory_order_acquire) == 1; ++tries) {
    if (tries == 1000) return sl_fail(SL_PEER_LOST, "the group is broken, and the rank that noticed why has gone");
    usleep(100);
  }
  return sl_fail((sl_status)fault->status, "%.*s", SL_COMM_FAULT_TEXT, fault->text);
}

sl_status sl_comm_break(sl_comm *comm, sl_status status, const char *format, ...) {
  sl_header *header = comm->header;
  unsigned whole = 0;
  if (atomic_compare_exchange_strong(&header->fault.state, &whole, 1)) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(header->fault.text, SL_COMM_FAULT_TEXT, format, arguments);
    va_end(arguments);
    header->fault.status = (int32_t)status;
    atomic_store(&header->fault.state, 2);
    sl_futex_wake_all(&header->phase);
    for (int i = 0; i < comm->size; ++i) {
      sl_futex_wake_all(&comm->member[i].step);
      atomic_fetch_add(&comm->member[i].events, 1);
      sl_futex_wake_all(&comm->member[i].events);
    }
  }
  return sl_comm_fault(comm);
}

bool sl_comm_check_rank(sl_comm *comm, int rank, const char *awaited_for) {
  sl_member *member = comm->member + rank;
  unsigned state = atomic_load(&member->state);
  if (state == SL_MEMBER_ABSENT) return false;
  bool left = state == SL_MEMBER_LEFT;
  if (!left && sl_segment_is_present(comm->segment, rank)) return false;
  char name[64];
  sl_comm_break(comm, SL_PEER_LOST, "%s has %s; it was awaited for %s", sl_comm_name_rank(comm, rank, name),
                left ? "left the group" : "ended", awaited_for);
  return true;
}

void sl_comm_default_tuning(int size, sl_comm_tuning *tuning) {
  /* Flat moves the more, the more ranks, but waits once. Where ranks take turns on processors, waiting costs more. */
  bool crowded = size > sysconf(_SC_NPROCESSORS_ONLN);
  size_t flat = crowded ? 1 << 20 : 256 << 10;
  /* Reading another process's memory makes the kernel look up every page, which takes longer than both copies through
   * a slot that stays in the cache: no size is large enough. */
  *tuning = (sl_comm_tuning){.piece = 1 << 20, .direct = SIZE_MAX, .direct_send = SIZE_MAX, .streaming = 4 << 20};
  /* Where sender and receiver can't copy at the same time, it takes about as long, and wakes the sender less often. */
  if (crowded) tuning->direct_send = 0;
  tuning->flat = flat / (size_t)(size > 1 ? size - 1 : 1);
  /* Taking lines away from another processor's cache can take more than twice as long as writing to memory, and reading
   * from there. It depends on which processors, and ranks that share one hand small things over in its cache. */
  tuning->buffer_streaming = crowded ? 512 << 10 : 64 << 10;
}

static sl_status check_options(const sl_comm_options *options) {
  SL_REQUIRE(options, SL_INVALID_ARGUMENT, "options is NULL");
  SL_REQUIRE(options->size >= 1 && options->size <= SL_COMM_MAX_SIZE, SL_INVALID_ARGUMENT,
             "options.size is %d, expected 1 to %d", options->size, SL_COMM_MAX_SIZE);
  SL_REQUIRE(options->rank >= 0 && options->rank < options->size, SL_INVALID_ARGUMENT,
             "options.rank is %d, expected 0 to %d", options->rank, options->size - 1);
  return SL_OK;
}

static void show_processors(sl_member *own) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set)) return;
  for (int i = 0; i < SL_COMM_PROCESSORS && i < CPU_SETSIZE; ++i)
    own->processors[i / 64] |= (uint64_t)CPU_ISSET(i, &set) << (i % 64);
}

/* That the ranks may run on, all together: each may be bound to one of its own. */
static int count_processors(const sl_comm *comm) {
  int count = 0;
  for (int word = 0; word < SL_COMM_PROCESSORS / 64; ++word) {
    uint64_t bits = 0;
    for (int i = 0; i < comm->size; ++i) bits |= comm->member[i].processors[word];
    count += __builtin_popcountll(bits);
  }
  return count;
}

static sl_status attach(const sl_comm_options *options, sl_segment *segment, sl_comm **comm) {
  sl_comm *new = calloc(1, sizeof *new);
  int *names = calloc((size_t)options->size, sizeof *names);
  sl_header *header = sl_segment_header(segment);
  sl_status status = new && names ? sl_segment_mark_presence(segment, options->rank)
                                  : sl_fail(SL_OUT_OF_MEMORY, "no memory for a communicator of %d", options->size);
  unsigned absent = SL_MEMBER_ABSENT;
  if (status == SL_OK) {
    sl_member *member = header->member + options->rank;
    if (atomic_load(&member->state) != SL_MEMBER_ABSENT)
      status = sl_fail(SL_INVALID_ARGUMENT, "options.rank is %d, which process %d has taken", options->rank,
                       (int)member->process);
  }
  if (status == SL_OK) {
    for (int i = 0; i < options->size; ++i) names[i] = options->names ? options->names[i] : i;
    *new = (sl_comm){.rank = options->rank, .size = options->size, .names = names, .segment = segment};
    new->header = header;
    new->member = header->member;
    new->tuning = header->tuning;
    new->crowded = true; /* until the others' processors are known */
    sl_member *own = new->member + new->rank;
    own->process = (int32_t)getpid();
    show_processors(own);
    own->probe = (uint64_t)(uintptr_t)header->nonce;
    status = sl_transfers_make(new);
    if (status == SL_OK) {
      atomic_compare_exchange_strong(&own->state, &absent, SL_MEMBER_PRESENT);
      *comm = new;
      return SL_OK;
    }
  }
  free(names);
  free(new);
  return status;
}

sl_status sl_comm_host_identity(char text[SL_COMM_TEXT]) {
  SL_REQUIRE(text, SL_INVALID_ARGUMENT, "text is NULL");
  char boot[64] = "";
  FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
  SL_REQUIRE(file, SL_UNSUPPORTED, "/proc/sys/kernel/random/boot_id can't be read: %s", strerror(errno));
  if (!fgets(boot, sizeof boot, file)) boot[0] = 0;
  fclose(file);
  boot[strcspn(boot, "\n")] = 0;
  /* Memory is found through /proc, so the same processes must be there. */
  struct stat space;
  SL_REQUIRE(!stat("/proc/self/ns/pid", &space), SL_UNSUPPORTED, "/proc/self/ns/pid can't be read: %s",
             strerror(errno));
  const char *alias = getenv("SLUICE_COMM_HOST");
  int used = snprintf(text, SL_COMM_TEXT, "%s:%llu:%llu:%s", boot, (unsigned long long)space.st_dev,
                      (unsigned long long)space.st_ino, alias ? alias : "");
  SL_REQUIRE(used < SL_COMM_TEXT, SL_INVALID_ARGUMENT, "SLUICE_COMM_HOST is \"%.40s...\", expected 100 bytes at most",
             alias);
  return SL_OK;
}

sl_status sl_comm_create(const sl_comm_options *options, sl_comm **comm, char handle[SL_COMM_TEXT]) {
  SL_CHECK(check_options(options));
  SL_REQUIRE(comm && handle, SL_INVALID_ARGUMENT, "comm and handle are where to write, expected no NULL");
  SL_REQUIRE(options->rank == 0, SL_INVALID_ARGUMENT, "options.rank is %d, but rank 0 creates the group",
             options->rank);
  size_t bytes = options->buffer_bytes ? options->buffer_bytes : DEFAULT_BUFFER;
  size_t least = SMALLEST_BUFFER + (size_t)options->size * 256; /* a piece for each rank must fit into half of it */
  if (bytes < least) bytes = least;
  SL_REQUIRE(bytes <= ((size_t)1 << 40) / (size_t)options->size, SL_OUT_OF_RANGE,
             "options.buffer_bytes is %zu, expected a TiB at most for all %d ranks", bytes, options->size);
  sl_segment *segment;
  SL_CHECK(sl_segment_create(options->size, bytes, &segment, handle));
  sl_header *header = sl_segment_header(segment);
  sl_comm_default_tuning(options->size, &header->tuning);
  if (options->tuning) header->tuning = *options->tuning;
  if (header->tuning.piece > header->slot_bytes) header->tuning.piece = header->slot_bytes;
  if (header->tuning.piece < SL_COMM_SMALLEST_PIECE) header->tuning.piece = SL_COMM_SMALLEST_PIECE;
  if (header->tuning.flat > header->tuning.piece) header->tuning.flat = header->tuning.piece;
  sl_status status = attach(options, segment, comm);
  if (status != SL_OK) sl_segment_close(segment);
  return status;
}

sl_status sl_comm_join(const sl_comm_options *options, const char *handle, sl_comm **comm) {
  SL_CHECK(check_options(options));
  SL_REQUIRE(comm && handle, SL_INVALID_ARGUMENT, "comm and handle must not be NULL");
  sl_segment *segment;
  SL_CHECK(sl_segment_open(handle, options->size, &segment));
  sl_status status = attach(options, segment, comm);
  if (status != SL_OK) sl_segment_close(segment);
  return status;
}

sl_status sl_comm_start(sl_comm *comm, int64_t timeout) {
  SL_REQUIRE(comm, SL_INVALID_ARGUMENT, "comm is NULL");
  SL_REQUIRE(!comm->started, SL_INVALID_ARGUMENT, "the communicator has been started before");
  const char *wanted = getenv("SLUICE_COMM_READS");
  bool reads = !wanted || strcmp(wanted, "0") != 0;
#if defined(PR_SET_PTRACER) /* where Yama restricts reading to ancestors, allow it to those of this group's user */
  if (reads) prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
#endif
  sl_signature signature = {.kind = SL_CALL_START, .root = -1};
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  SL_CHECK(sl_step_begin(comm));
  sl_step_arrive(comm);
  SL_CHECK(sl_step_wait(comm));
  comm->crowded = comm->size > count_processors(comm);
  for (int i = 0; i < comm->size && reads; ++i) reads = i == comm->rank || sl_comm_try_reading(comm, i);
  atomic_store(&comm->member[comm->rank].reads_all, reads);
  SL_CHECK(sl_step_begin(comm));
  sl_step_arrive(comm);
  SL_CHECK(sl_step_wait(comm));
  comm->reads_memory = true;
  for (int i = 0; i < comm->size; ++i) comm->reads_memory &= atomic_load(&comm->member[i].reads_all) == 1;
  comm->started = true;
  return SL_OK;
}

void sl_comm_close(sl_comm *comm) {
  if (!comm) return;
  atomic_store(&comm->member[comm->rank].state, SL_MEMBER_LEFT);
  sl_transfers_free(comm);
  sl_segment_close(comm->segment);
  free(comm->names);
  free(comm);
}

void sl_comm_abort(sl_comm *comm, const char *reason) {
  if (!comm) return;
  char name[64];
  sl_comm_break(comm, SL_PEER_LOST, "%s has aborted the group: %s", sl_comm_name_rank(comm, comm->rank, name),
                reason ? reason : "no reason was given");
}

sl_status sl_comm_state(sl_comm *comm) {
  SL_REQUIRE(comm, SL_INVALID_ARGUMENT, "comm is NULL");
  return sl_comm_is_broken(comm) ? sl_comm_fault(comm) : SL_OK;
}
