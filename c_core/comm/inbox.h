/* A rank's inbox: a ring of messages in shared memory that any rank may put into and its owner takes from. */
#ifndef SL_COMM_INBOX_H
#define SL_COMM_INBOX_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "comm/inbox_size.h"

typedef enum sl_message_kind {
  SL_MESSAGE_WHOLE = 1, /* a transfer with all of its content */
  SL_MESSAGE_OFFER,     /* a transfer whose content is at address in the sender's process */
  SL_MESSAGE_ASK,       /* the receiver of an offer won't read there: please send it */
  SL_MESSAGE_PIECE,     /* the next piece of what was asked for */
  SL_MESSAGE_TAKEN,     /* the receiver of an offer has read it */
} sl_message_kind;

typedef struct sl_message {
  uint32_t kind; /* sl_message_kind */
  int32_t from;
  uint64_t tag;
  uint64_t bytes;       /* of the whole transfer; of a piece: what lies in content */
  uint64_t address;     /* of an offer */
  uint64_t transfer;    /* the sender's number for it */
  uint64_t destination; /* of ask and piece: the receiver's number for it */
} sl_message;

typedef struct sl_inbox_slot {
  atomic_uint turn; /* index: free for that put; index + 1: full; as they count on and on */
  sl_message message;
  char content[];
} sl_inbox_slot;

/* What lies in shared memory, followed by the slots. */
typedef struct sl_inbox {
  _Alignas(64) atomic_uint puts;    /* slots that have been claimed */
  _Alignas(64) atomic_uint refused; /* 1: somebody found it full since the owner last looked */
  _Alignas(64) char slots[];
} sl_inbox;

#define SL_INBOX_BYTES (sizeof(sl_inbox) + (size_t)SL_INBOX_SLOTS * SL_INBOX_SLOT_BYTES)

static inline sl_inbox_slot *sl_inbox_at(sl_inbox *inbox, uint32_t index) {
  return (sl_inbox_slot *)(inbox->slots + (size_t)(index % SL_INBOX_SLOTS) * SL_INBOX_SLOT_BYTES);
}

void sl_inbox_clear(sl_inbox *inbox);

/* False: it is full. content: the bytes that belong to the message, SL_INBOX_CONTENT at most. */
bool sl_inbox_put(sl_inbox *inbox, const sl_message *message, const void *content, size_t bytes);

/* The oldest message, which stays where it is until sl_inbox_drop; NULL if there is none. taken: how many the owner has
 * taken so far; its to keep. */
const sl_inbox_slot *sl_inbox_peek(sl_inbox *inbox, uint32_t taken);
void sl_inbox_drop(sl_inbox *inbox, uint32_t taken);

#endif
