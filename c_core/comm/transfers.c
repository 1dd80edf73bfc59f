/* Sending and receiving. A transfer that fits into a message travels in it. A larger one is offered: its receiver reads
 * it out of the sender's memory and says so or, where that is slower or not allowed, asks for it piece by piece. */
#define _GNU_SOURCE
#include "comm/transfers.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/futex.h"
#include "comm/inbox.h"
#include "comm/memory.h"
#include "comm/spin.h"
#include "comm/step.h"
#include "runtime/status.h"

enum { LOOK_INTERVAL = 50000000 /* ns between looks at whether the other side lives */ };

typedef enum transfer_state {
  WAITING, /* a receive that nothing has matched; a send whose message waits for a place in the inbox */
  UNDER_WAY,
  READING, /* a receive that a thread is copying, without the lock */
  DONE,
} transfer_state;

struct sl_transfer {
  sl_comm *comm;
  bool sends;
  _Atomic transfer_state state; /* DONE is read without the lock */
  char *buffer;
  size_t bytes, moved; /* moved: by pieces */
  int rank;
  uint64_t tag, number, destination;
  bool asked; /* a send whose receiver wants pieces */
  struct sl_transfer *next;
};

/* A message that waits: for a receive that matches, or for a place in another rank's inbox. */
typedef struct letter {
  sl_message message;
  int to;
  size_t bytes;
  struct letter *next;
  char content[];
} letter;

typedef struct letter_list {
  letter *first, **end;
} letter_list;

struct sl_transfers {
  pthread_mutex_t lock;
  uint64_t numbers;
  uint32_t taken;                   /* from the own inbox */
  sl_transfer *first, **end;        /* those that are not done, in the order in which they were begun */
  letter_list unexpected, outgoing; /* in order of arrival; in order of sending */
};

static void append_letter(letter_list *list, letter *added) {
  added->next = NULL;
  *list->end = added;
  list->end = &added->next;
}

static void remove_letter(letter_list *list, letter **link) {
  letter *gone = *link;
  *link = gone->next;
  if (list->end == &gone->next) list->end = link;
  free(gone);
}

static letter *make_letter(const sl_message *message, const void *content, size_t bytes, int to) {
  letter *new = malloc(sizeof *new + bytes);
  if (!new) return NULL;
  *new = (letter){.message = *message, .to = to, .bytes = bytes};
  if (bytes) memcpy(new->content, content, bytes);
  return new;
}

sl_status sl_transfers_make(sl_comm *comm) {
  struct sl_transfers *new = calloc(1, sizeof *new);
  SL_REQUIRE(new, SL_OUT_OF_MEMORY, "no memory for the transfers of a communicator");
  pthread_mutex_init(&new->lock, NULL);
  new->end = &new->first;
  new->unexpected.end = &new->unexpected.first;
  new->outgoing.end = &new->outgoing.first;
  comm->transfers = new;
  return SL_OK;
}

static sl_inbox *inbox_of(const sl_comm *comm, int rank) {
  return (sl_inbox *)((char *)comm->header + comm->header->inboxes + (size_t)rank * SL_INBOX_BYTES);
}

static void ring(sl_comm *comm, int rank) {
  sl_member *member = comm->member + rank;
  atomic_fetch_add(&member->events, 1);
  if (atomic_load(&member->event_sleepers)) sl_futex_wake_all(&member->events);
}

static const char *describe(const sl_transfer *transfer, char text[160]) {
  char name[64] = "any rank";
  if (transfer->rank >= 0) sl_comm_name_rank(transfer->comm, transfer->rank, name);
  snprintf(text, 160, "%s of %zu bytes %s %s, tag %" PRIu64, transfer->sends ? "send" : "recv", transfer->bytes,
           transfer->sends ? "to" : "from", name, transfer->tag);
  return text;
}

/* Sends a message now, or keeps it until there is room; sent: which of the two. */
static sl_status post(sl_comm *comm, int to, sl_message message, const void *content, size_t bytes, bool *sent) {
  struct sl_transfers *all = comm->transfers;
  message.from = comm->rank;
  bool waits = false;
  for (letter *each = all->outgoing.first; each && !waits; each = each->next) waits = each->to == to;
  *sent = !waits && sl_inbox_put(inbox_of(comm, to), &message, content, bytes);
  if (*sent) {
    ring(comm, to);
    return SL_OK;
  }
  letter *new = make_letter(&message, content, bytes, to);
  SL_REQUIRE(new, SL_OUT_OF_MEMORY, "no memory for a message of %zu bytes that waits", bytes);
  append_letter(&all->outgoing, new);
  return SL_OK;
}

static void finish(struct sl_transfers *all, sl_transfer *transfer) {
  for (sl_transfer **link = &all->first; *link; link = &(*link)->next) {
    if (*link != transfer) continue;
    *link = transfer->next;
    if (all->end == &transfer->next) all->end = link;
    break;
  }
  transfer->state = DONE; /* last: its owner may free it now */
}

static sl_transfer *find_number(struct sl_transfers *all, uint64_t number) {
  for (sl_transfer *each = all->first; each; each = each->next) {
    if (each->number == number) return each;
  }
  return NULL;
}

static void post_waiting(sl_comm *comm) {
  struct sl_transfers *all = comm->transfers;
  uint64_t full[SL_COMM_MAX_SIZE / 64] = {0}; /* whoever has no room for one gets none of the later ones either */
  for (letter **link = &all->outgoing.first; *link;) {
    letter *each = *link;
    uint64_t bit = (uint64_t)1 << (each->to % 64);
    if (!(full[each->to / 64] & bit) &&
        sl_inbox_put(inbox_of(comm, each->to), &each->message, each->content, each->bytes)) {
      ring(comm, each->to);
      sl_transfer *sent = each->message.kind == SL_MESSAGE_WHOLE ? find_number(all, each->message.transfer) : NULL;
      if (sent) finish(all, sent);
      remove_letter(&all->outgoing, link);
    } else {
      full[each->to / 64] |= bit;
      link = &each->next;
    }
  }
}

/* Answers that wait for room: whoever waits for them would otherwise take this rank's leaving for a loss. */
static void send_remaining(sl_comm *comm) {
  struct sl_transfers *all = comm->transfers;
  for (int tries = 0; all->outgoing.first && tries < 1000 && !sl_comm_is_broken(comm); ++tries) {
    pthread_mutex_lock(&all->lock);
    post_waiting(comm);
    pthread_mutex_unlock(&all->lock);
    if (all->outgoing.first) usleep(1000);
  }
}

void sl_transfers_free(sl_comm *comm) {
  struct sl_transfers *all = comm->transfers;
  if (!all) return;
  send_remaining(comm);
  while (all->unexpected.first) remove_letter(&all->unexpected, &all->unexpected.first);
  while (all->outgoing.first) remove_letter(&all->outgoing, &all->outgoing.first);
  for (sl_transfer *each = all->first; each; each = each->next) each->comm = NULL;
  pthread_mutex_destroy(&all->lock);
  free(all);
  comm->transfers = NULL;
}

static bool matches(const sl_transfer *transfer, const sl_message *message) {
  return !transfer->sends && transfer->state == WAITING && transfer->tag == message->tag &&
         (transfer->rank == SL_COMM_ANY_RANK || transfer->rank == message->from);
}

/* A receive has met its message. The lock is released while memory is read. */
static sl_status accept(sl_comm *comm, sl_transfer *transfer, const sl_message *message, const char *content) {
  struct sl_transfers *all = comm->transfers;
  char text[160], name[64];
  bool sent;
  transfer->rank = message->from;
  transfer->state = UNDER_WAY;
  if (message->bytes != transfer->bytes)
    return sl_comm_break(comm, SL_MISMATCH, "%s sends %" PRIu64 " bytes to a %s",
                         sl_comm_name_rank(comm, message->from, name), message->bytes, describe(transfer, text));
  if (message->kind == SL_MESSAGE_WHOLE) {
    if (message->bytes) memcpy(transfer->buffer, content, message->bytes);
    finish(all, transfer);
    return SL_OK;
  }
  sl_message answer = {.kind = SL_MESSAGE_ASK, .transfer = message->transfer, .destination = transfer->number};
  if (comm->reads_memory && message->bytes >= comm->tuning.direct_send) {
    uint64_t address = message->address, number = message->transfer;
    int from = message->from;
    transfer->state = READING;
    pthread_mutex_unlock(&all->lock);
    sl_status status =
        sl_comm_read_memory(comm, from, transfer->buffer, address, transfer->bytes, describe(transfer, text));
    pthread_mutex_lock(&all->lock);
    if (status != SL_OK) return status;
    answer.kind = SL_MESSAGE_TAKEN;
    answer.transfer = number;
    finish(all, transfer);
    return post(comm, from, answer, NULL, 0, &sent);
  }
  return post(comm, message->from, answer, NULL, 0, &sent);
}

/* Pieces of a send as long as the receiver's inbox has room; the rest when it has drained. */
static void send_pieces(sl_comm *comm, sl_transfer *transfer) {
  struct sl_transfers *all = comm->transfers;
  for (letter *each = all->outgoing.first; each; each = each->next) {
    if (each->to == transfer->rank) return;
  }
  while (transfer->moved < transfer->bytes) {
    size_t bytes = transfer->bytes - transfer->moved;
    if (bytes > SL_INBOX_CONTENT) bytes = SL_INBOX_CONTENT;
    sl_message piece = {
        .kind = SL_MESSAGE_PIECE, .from = comm->rank, .bytes = bytes, .destination = transfer->destination};
    if (!sl_inbox_put(inbox_of(comm, transfer->rank), &piece, transfer->buffer + transfer->moved, bytes)) return;
    ring(comm, transfer->rank);
    transfer->moved += bytes;
  }
  finish(all, transfer);
}

static sl_status take_piece(sl_comm *comm, const sl_message *message, const char *content) {
  sl_transfer *transfer = find_number(comm->transfers, message->destination);
  if (!transfer || transfer->sends || message->bytes > transfer->bytes - transfer->moved)
    return sl_comm_break(comm, SL_INTERNAL, "rank %d got a piece that it had not asked for", comm->names[comm->rank]);
  sl_comm_copy_output(comm, transfer->buffer + transfer->moved, content, message->bytes, transfer->bytes);
  transfer->moved += message->bytes;
  if (transfer->moved == transfer->bytes) finish(comm->transfers, transfer);
  return SL_OK;
}

/* One message from the inbox. Its slot is given back before anything that takes time or the lock away. */
static sl_status take_message(sl_comm *comm, const sl_inbox_slot *slot) {
  struct sl_transfers *all = comm->transfers;
  sl_message message = slot->message;
  sl_inbox *inbox = inbox_of(comm, comm->rank);
  sl_transfer *transfer = NULL;
  letter *arrived;
  switch (message.kind) {
    case SL_MESSAGE_WHOLE:
    case SL_MESSAGE_OFFER: {
      for (transfer = all->first; transfer && !matches(transfer, &message);) transfer = transfer->next;
      size_t content = message.kind == SL_MESSAGE_WHOLE ? message.bytes : 0;
      if (transfer && message.kind == SL_MESSAGE_WHOLE) {
        sl_status status = accept(comm, transfer, &message, slot->content);
        sl_inbox_drop(inbox, all->taken++);
        return status;
      }
      if (!transfer) {
        arrived = make_letter(&message, slot->content, content, comm->rank);
        if (!arrived) return sl_comm_break(comm, SL_OUT_OF_MEMORY, "no memory for a message that has arrived");
        append_letter(&all->unexpected, arrived);
      }
      sl_inbox_drop(inbox, all->taken++);
      return transfer ? accept(comm, transfer, &message, NULL) : SL_OK;
    }
    case SL_MESSAGE_PIECE: {
      sl_status status = take_piece(comm, &message, slot->content);
      sl_inbox_drop(inbox, all->taken++);
      return status;
    }
    default: break;
  }
  sl_inbox_drop(inbox, all->taken++);
  transfer = find_number(all, message.transfer);
  if (!transfer || !transfer->sends)
    return sl_comm_break(comm, SL_INTERNAL, "rank %d got an answer to nothing", comm->names[comm->rank]);
  if (message.kind == SL_MESSAGE_TAKEN) {
    finish(all, transfer);
  } else {
    transfer->asked = true;
    transfer->destination = message.destination;
  }
  return SL_OK;
}

/* Moves everything as far as it goes. Called with the lock held. */
static sl_status progress(sl_comm *comm) {
  struct sl_transfers *all = comm->transfers;
  sl_inbox *inbox = inbox_of(comm, comm->rank);
  if (sl_comm_is_broken(comm)) return sl_comm_fault(comm);
  for (const sl_inbox_slot *slot; (slot = sl_inbox_peek(inbox, all->taken));) SL_CHECK(take_message(comm, slot));
  if (atomic_load(&inbox->refused)) {
    atomic_store(&inbox->refused, 0);
    for (int i = 0; i < comm->size; ++i) {
      if (i != comm->rank) ring(comm, i);
    }
  }
  post_waiting(comm);
  for (sl_transfer *each = all->first; each;) {
    sl_transfer *next = each->next;
    if (each->asked) send_pieces(comm, each);
    each = next;
  }
  return SL_OK;
}

static sl_status begin(sl_comm *comm, bool sends, void *buffer, size_t bytes, int rank, uint64_t tag,
                       sl_transfer **transfer) {
  SL_REQUIRE(comm && comm->started, SL_INVALID_ARGUMENT, "comm is %s, expected a communicator that was started",
             comm ? "not started" : "NULL");
  SL_REQUIRE(transfer, SL_INVALID_ARGUMENT, "transfer is NULL");
  SL_REQUIRE(buffer || bytes == 0, SL_INVALID_ARGUMENT, "buffer is NULL, expected %zu bytes", bytes);
  bool any = !sends && rank == SL_COMM_ANY_RANK;
  SL_REQUIRE(any || (rank >= 0 && rank < comm->size && rank != comm->rank), SL_INVALID_ARGUMENT,
             "rank is %d, expected another rank of 0 to %d", rank, comm->size - 1);
  sl_transfer *new = calloc(1, sizeof *new);
  SL_REQUIRE(new, SL_OUT_OF_MEMORY, "no memory for a transfer");
  *new = (sl_transfer){.comm = comm, .sends = sends, .buffer = buffer, .bytes = bytes, .rank = rank, .tag = tag};
  *transfer = new;
  return SL_OK;
}

static void append_transfer(struct sl_transfers *all, sl_transfer *transfer) {
  transfer->number = ++all->numbers;
  *all->end = transfer;
  all->end = &transfer->next;
}

sl_status sl_comm_send(sl_comm *comm, const void *buffer, size_t bytes, int rank, uint64_t tag,
                       sl_transfer **transfer) {
  SL_CHECK(begin(comm, true, (void *)(uintptr_t)buffer, bytes, rank, tag, transfer));
  struct sl_transfers *all = comm->transfers;
  sl_transfer *new = *transfer;
  pthread_mutex_lock(&all->lock);
  append_transfer(all, new);
  bool whole = bytes <= SL_INBOX_CONTENT;
  sl_message message = {.kind = whole ? SL_MESSAGE_WHOLE : SL_MESSAGE_OFFER, .tag = tag, .bytes = bytes};
  message.address = (uint64_t)(uintptr_t)buffer;
  message.transfer = new->number;
  new->state = UNDER_WAY;
  bool sent = false;
  sl_status status =
      sl_comm_is_broken(comm) ? sl_comm_fault(comm) : post(comm, rank, message, buffer, whole ? bytes : 0, &sent);
  if (status != SL_OK || (whole && sent)) finish(all, new);
  pthread_mutex_unlock(&all->lock);
  if (status != SL_OK) {
    free(new);
    *transfer = NULL;
  }
  return status;
}

sl_status sl_comm_receive(sl_comm *comm, void *buffer, size_t bytes, int rank, uint64_t tag, sl_transfer **transfer) {
  SL_CHECK(begin(comm, false, buffer, bytes, rank, tag, transfer));
  struct sl_transfers *all = comm->transfers;
  sl_transfer *new = *transfer;
  pthread_mutex_lock(&all->lock);
  append_transfer(all, new);
  sl_status status = SL_OK;
  for (letter **link = &all->unexpected.first; *link; link = &(*link)->next) {
    if (!matches(new, &(*link)->message)) continue;
    letter *met = *link; /* taken off the list first: accept may let go of the lock */
    *link = met->next;
    if (all->unexpected.end == &met->next) all->unexpected.end = link;
    status = accept(comm, new, &met->message, met->content);
    free(met);
    break;
  }
  if (status != SL_OK) finish(all, new);
  pthread_mutex_unlock(&all->lock);
  if (status != SL_OK) {
    free(new);
    *transfer = NULL;
  }
  return status;
}

sl_status sl_transfer_test(sl_transfer *transfer, bool *done) {
  SL_REQUIRE(transfer && done, SL_INVALID_ARGUMENT, "transfer and done must not be NULL");
  *done = false;
  if (transfer->comm == NULL) return sl_fail(SL_PEER_LOST, "the communicator of this transfer has been closed");
  struct sl_transfers *all = transfer->comm->transfers;
  pthread_mutex_lock(&all->lock);
  sl_status status = transfer->state == DONE ? SL_OK : progress(transfer->comm);
  *done = transfer->state == DONE;
  pthread_mutex_unlock(&all->lock);
  return *done ? SL_OK : status;
}

/* A copy to describe it from: another thread's progress may find out the rank meanwhile. */
static sl_transfer copy_of(const sl_transfer *transfer) {
  struct sl_transfers *all = transfer->comm->transfers;
  pthread_mutex_lock(&all->lock);
  sl_transfer copy = *transfer;
  pthread_mutex_unlock(&all->lock);
  return copy;
}

sl_status sl_transfer_look_after(sl_transfer *transfer) {
  bool done = false;
  SL_CHECK(sl_transfer_test(transfer, &done));
  if (done) return SL_OK;
  sl_comm *comm = transfer->comm;
  const sl_transfer copy = copy_of(transfer);
  char text[160];
  bool any = copy.rank == SL_COMM_ANY_RANK, hope = false;
  for (int i = any ? 0 : copy.rank; i < (any ? comm->size : copy.rank + 1); ++i) {
    if (i == comm->rank) continue;
    bool left = atomic_load(&comm->member[i].state) == SL_MEMBER_LEFT;
    if (!left && sl_segment_is_present(comm->segment, i)) {
      hope = true;
      continue;
    }
    if (any && left) continue;
    /* It may have sent it before it went. */
    SL_CHECK(sl_transfer_test(transfer, &done));
    if (done) return SL_OK;
    sl_comm_check_rank(comm, i, describe(&copy, text));
    return sl_comm_fault(comm);
  }
  if (hope) return SL_OK;
  SL_CHECK(sl_transfer_test(transfer, &done));
  return done ? SL_OK
              : sl_comm_break(comm, SL_PEER_LOST, "all other ranks have left the group; one was awaited for %s",
                              describe(&copy, text));
}

/* The end of a sentence on a timeout: a rank that is stopped, and kept others waiting if not this one. */
static const char *describe_stopped(const sl_comm *comm, char text[96]) {
  text[0] = 0;
  for (int i = 0; i < comm->size && !*text; ++i) {
    char name[64];
    if (i != comm->rank && sl_comm_is_stopped(comm, i))
      snprintf(text, 96, "; %s is stopped", sl_comm_name_rank(comm, i, name));
  }
  return text;
}

sl_status sl_transfer_wait(sl_transfer *transfer, int64_t timeout) {
  bool done = false;
  char text[160];
  SL_CHECK(sl_transfer_test(transfer, &done));
  if (done) return SL_OK;
  sl_comm *comm = transfer->comm;
  int64_t deadline = sl_comm_deadline(timeout), checked = sl_clock();
  for (sl_spin spin = sl_spin_begin(comm->crowded); !done;) {
    uint32_t seen = sl_comm_events(comm);
    SL_CHECK(sl_transfer_test(transfer, &done));
    if (done) return SL_OK;
    if (sl_spin_once(&spin)) continue;
    int64_t left = deadline - sl_clock();
    if (left > 0)
      SL_CHECK(sl_comm_wait_for_event(comm, seen, left < LOOK_INTERVAL ? left / 1000000 + 1 : LOOK_INTERVAL / 1000000));
    int64_t now = sl_clock();
    if (now - checked < LOOK_INTERVAL && now < deadline) continue;
    checked = now;
    SL_CHECK(sl_transfer_look_after(transfer));
    SL_CHECK(sl_transfer_test(transfer, &done));
    if (!done && now >= deadline) {
      char name[64], stopped[96];
      const sl_transfer copy = copy_of(transfer);
      return sl_comm_break(comm, SL_TIMEOUT, "timeout in %s at %s%s", describe(&copy, text),
                           sl_comm_name_rank(comm, comm->rank, name), describe_stopped(comm, stopped));
    }
  }
  return SL_OK;
}

int sl_transfer_peer(const sl_transfer *transfer) { return transfer ? transfer->rank : SL_COMM_ANY_RANK; }

void sl_transfer_free(sl_transfer *transfer) {
  if (!transfer) return;
  sl_comm *comm = transfer->comm;
  if (comm && transfer->state != DONE) {
    char text[160], name[64];
    const sl_transfer copy = copy_of(transfer);
    bool met = copy.state != DONE && (copy.sends || copy.state != WAITING);
    if (met && !sl_comm_is_broken(comm))
      sl_comm_break(comm, SL_PEER_LOST, "%s has called off a %s", sl_comm_name_rank(comm, comm->rank, name),
                    describe(&copy, text));
    struct sl_transfers *all = comm->transfers;
    pthread_mutex_lock(&all->lock);
    finish(all, transfer);
    pthread_mutex_unlock(&all->lock);
  }
  free(transfer);
}

uint32_t sl_comm_events(const sl_comm *comm) { return atomic_load(&comm->member[comm->rank].events); }

sl_status sl_comm_wait_for_event(sl_comm *comm, uint32_t seen, int64_t timeout) {
  sl_member *own = comm->member + comm->rank;
  int64_t deadline = sl_comm_deadline(timeout);
  atomic_fetch_add(&own->event_sleepers, 1);
  while (atomic_load(&own->events) == seen && !sl_comm_is_broken(comm)) {
    int64_t left = deadline - sl_clock();
    if (left <= 0) break;
    sl_futex_wait(&own->events, seen, left < 1000000000 ? left : 1000000000);
  }
  atomic_fetch_sub(&own->event_sleepers, 1);
  return sl_comm_is_broken(comm) ? sl_comm_fault(comm) : SL_OK;
}

void sl_comm_wake(sl_comm *comm) { ring(comm, comm->rank); }
