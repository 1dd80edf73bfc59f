/* Small messages go through the slots, a piece in each step. Large ones stay where they are: the slots say where, and
 * whoever takes one copies it out of the giver's process. */
#include "comm/exchange.h"

#include <inttypes.h>

#include "comm/memory.h"
#include "comm/step.h"
#include "runtime/status.h"

/* What lies at the start of a giver's slot, before the pieces: one entry for each destination, or a single one. */
typedef struct offer {
  uint64_t bytes, address;
} offer;

typedef struct offer_table {
  uint64_t largest; /* bytes of the largest message that this rank gives */
  offer offer[];
} offer_table;

typedef struct exchange_pass {
  sl_comm *comm;
  const sl_exchange *exchange;
  bool gives, takes;
  size_t table_bytes, piece; /* piece: bytes of one message in one step */
  size_t own_done;           /* of what this rank gives itself */
} exchange_pass;

static size_t in_bytes(const exchange_pass *pass, int rank) {
  return pass->exchange->in_bytes[pass->exchange->same ? 0 : rank];
}

static const char *in_of(const exchange_pass *pass, int rank) {
  return pass->exchange->in[pass->exchange->same ? 0 : rank];
}

static bool is_giver(const exchange_pass *pass, int rank) {
  return pass->exchange->from < 0 || pass->exchange->from == rank;
}

static const offer_table *table_of(const exchange_pass *pass, int rank) {
  return (const offer_table *)sl_step_slot(pass->comm, rank);
}

static const offer *offer_to_me(const exchange_pass *pass, int rank) {
  return table_of(pass, rank)->offer + (pass->exchange->same ? 0 : pass->comm->rank);
}

/* Bytes of the largest message that this rank gives to another. */
static size_t largest_own(const exchange_pass *pass) {
  size_t largest = 0;
  if (pass->comm->size == 1) return 0;
  for (int i = 0; i < (pass->exchange->same ? 1 : pass->comm->size); ++i) {
    if ((pass->exchange->same || i != pass->comm->rank) && in_bytes(pass, i) > largest) largest = in_bytes(pass, i);
  }
  return largest;
}

static void write_offers(const exchange_pass *pass, size_t largest) {
  sl_comm *comm = pass->comm;
  offer_table *table = (offer_table *)sl_step_slot(comm, comm->rank);
  table->largest = largest;
  for (int i = 0; i < (pass->exchange->same ? 1 : comm->size); ++i)
    table->offer[i] = (offer){in_bytes(pass, i), (uint64_t)(uintptr_t)in_of(pass, i)};
}

static size_t smaller(size_t x, size_t y) { return x < y ? x : y; }

/* Puts the pieces of this step into the own slot. */
static void write_pieces(const exchange_pass *pass, size_t done) {
  sl_comm *comm = pass->comm;
  char *slot = sl_step_slot(comm, comm->rank) + pass->table_bytes;
  for (int i = 0; i < (pass->exchange->same ? 1 : comm->size); ++i) {
    size_t bytes = in_bytes(pass, i);
    bool wanted = pass->exchange->same || (i != comm->rank && (pass->exchange->to < 0 || pass->exchange->to == i));
    if (wanted && done < bytes)
      sl_step_put(comm, slot + (size_t)i * pass->piece, in_of(pass, i) + done, smaller(bytes - done, pass->piece),
                  bytes - done);
  }
}

/* What this rank gives itself, up to there. */
static void copy_own(exchange_pass *pass, size_t until) {
  if (!pass->gives || !pass->takes) return;
  int rank = pass->comm->rank;
  size_t bytes = in_bytes(pass, rank), done = pass->own_done, end = smaller(until, bytes);
  char *out = pass->exchange->out[rank];
  if (end > done && out != in_of(pass, rank))
    sl_comm_copy_output(pass->comm, out + done, in_of(pass, rank) + done, end - done, bytes);
  if (end > done) pass->own_done = end;
}

static void read_pieces(const exchange_pass *pass, size_t done) {
  const sl_comm *comm = pass->comm;
  for (int turn = 1; turn < comm->size; ++turn) {
    int i = (comm->rank + turn) % comm->size; /* not all from the same rank at the same time */
    size_t bytes = is_giver(pass, i) ? pass->exchange->out_bytes[i] : 0;
    if (done >= bytes) continue;
    const char *slot = sl_step_slot(comm, i) + pass->table_bytes;
    sl_comm_copy_output(comm, (char *)pass->exchange->out[i] + done,
                        slot + (pass->exchange->same ? 0 : (size_t)comm->rank * pass->piece),
                        smaller(bytes - done, pass->piece), bytes);
  }
}

/* What the others offer this rank must be what it expects. */
static sl_status check_offers(const exchange_pass *pass) {
  sl_comm *comm = pass->comm;
  for (int i = 0; i < comm->size; ++i) {
    if (i == comm->rank || !is_giver(pass, i) || offer_to_me(pass, i)->bytes == pass->exchange->out_bytes[i]) continue;
    char name[64], other[64], call[160];
    return sl_comm_break(comm, SL_MISMATCH, "%s gives %s %" PRIu64 " bytes, which expects %zu, in %s",
                         sl_comm_name_rank(comm, i, name), sl_comm_name_rank(comm, comm->rank, other),
                         offer_to_me(pass, i)->bytes, pass->exchange->out_bytes[i],
                         sl_signature_describe(&comm->signature, call));
  }
  return SL_OK;
}

/* Waits for those whose slots this rank reads; all must know how many steps there are. */
static sl_status wait_for_givers(const exchange_pass *pass, bool first) {
  sl_comm *comm = pass->comm;
  if (pass->exchange->from >= 0)
    return pass->exchange->from == comm->rank ? SL_OK : sl_step_wait_for(comm, pass->exchange->from);
  return pass->takes || first ? sl_step_wait(comm) : SL_OK;
}

static sl_status run_direct(exchange_pass *pass) {
  sl_comm *comm = pass->comm;
  char call[160];
  copy_own(pass, SIZE_MAX);
  for (int turn = 1; turn < comm->size && pass->takes; ++turn) {
    int i = (comm->rank + turn) % comm->size;
    if (!is_giver(pass, i)) continue;
    const offer *given = offer_to_me(pass, i);
    SL_CHECK(sl_comm_read_memory(comm, i, pass->exchange->out[i], given->address, given->bytes,
                                 sl_signature_describe(&comm->signature, call)));
  }
  SL_CHECK(sl_step_begin(comm));
  sl_step_arrive(comm);
  return pass->gives ? sl_step_wait(comm) : SL_OK; /* until then others may be reading */
}

static sl_status run_steps(exchange_pass *pass, size_t largest) {
  sl_comm *comm = pass->comm;
  for (size_t done = 0;;) {
    if (pass->takes) read_pieces(pass, done);
    done += pass->piece;
    if (done >= largest) return SL_OK;
    SL_CHECK(sl_step_begin(comm));
    if (pass->gives) write_pieces(pass, done);
    sl_step_arrive(comm);
    copy_own(pass, done + pass->piece);
    SL_CHECK(wait_for_givers(pass, false));
  }
}

sl_status sl_exchange_run(sl_comm *comm, const sl_exchange *exchange, sl_call_kind kind, int64_t timeout) {
  exchange_pass pass = {.comm = comm, .exchange = exchange};
  pass.gives = is_giver(&pass, comm->rank);
  pass.takes = exchange->to < 0 || exchange->to == comm->rank;
  size_t entries = exchange->same ? 1 : (size_t)comm->size;
  pass.table_bytes = (sizeof(offer_table) + entries * sizeof(offer) + SL_COMM_LINE - 1) / SL_COMM_LINE * SL_COMM_LINE;
  pass.piece = (comm->header->slot_bytes - pass.table_bytes) / entries / SL_COMM_LINE * SL_COMM_LINE;
  pass.piece = smaller(pass.piece, comm->tuning.piece);
  size_t largest = pass.gives ? largest_own(&pass) : 0;
  bool direct = comm->reads_memory && largest >= comm->tuning.direct;

  sl_signature signature = {.kind = (uint8_t)kind,
                            .root = (int16_t)(exchange->from >= 0 ? exchange->from : exchange->to)};
  signature.bytes = pass.gives ? largest : exchange->out_bytes[exchange->from];
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  SL_CHECK(sl_step_begin(comm));
  if (pass.gives) write_offers(&pass, largest);
  if (pass.gives && !direct) write_pieces(&pass, 0);
  sl_step_arrive(comm);
  /* While the others come. What has just been put into the slot is in the cache, so it goes along with that. */
  copy_own(&pass, exchange->same && largest && !direct ? pass.piece : SIZE_MAX);
  SL_CHECK(wait_for_givers(&pass, true));
  if (pass.takes) SL_CHECK(check_offers(&pass));
  for (int i = 0; i < comm->size; ++i) {
    if (is_giver(&pass, i) && table_of(&pass, i)->largest > largest && i != comm->rank)
      largest = table_of(&pass, i)->largest;
  }
  return comm->reads_memory && largest >= comm->tuning.direct ? run_direct(&pass) : run_steps(&pass, largest);
}
