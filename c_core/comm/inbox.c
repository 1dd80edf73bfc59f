/* Each slot carries its turn: a putter claims the next index, fills the slot and passes the turn on to the owner, which
 * passes it on to the putter one round later. So putters meet in one compare-and-exchange, and the owner in none. */
#include "comm/inbox.h"

#include <string.h>

_Static_assert(offsetof(sl_inbox_slot, content) + SL_INBOX_CONTENT <= SL_INBOX_SLOT_BYTES,
               "a message must fit its slot");

void sl_inbox_clear(sl_inbox *inbox) {
  atomic_store(&inbox->puts, 0);
  for (uint32_t i = 0; i < SL_INBOX_SLOTS; ++i) atomic_store(&sl_inbox_at(inbox, i)->turn, i);
}

bool sl_inbox_put(sl_inbox *inbox, const sl_message *message, const void *content, size_t bytes) {
  unsigned index = atomic_load(&inbox->puts);
  sl_inbox_slot *slot;
  for (;;) {
    slot = sl_inbox_at(inbox, index);
    int32_t ahead = (int32_t)(atomic_load(&slot->turn) - index);
    if (ahead == 0) {
      if (atomic_compare_exchange_weak(&inbox->puts, &index, index + 1)) break;
    } else if (ahead < 0) {
      /* Say so first and look again then, so that the owner cannot miss it between the two. */
      if (atomic_exchange(&inbox->refused, 1)) return false;
      index = atomic_load(&inbox->puts);
    } else {
      index = atomic_load(&inbox->puts);
    }
  }
  slot->message = *message;
  if (bytes) memcpy(slot->content, content, bytes);
  atomic_store(&slot->turn, index + 1);
  return true;
}

const sl_inbox_slot *sl_inbox_peek(sl_inbox *inbox, uint32_t taken) {
  sl_inbox_slot *slot = sl_inbox_at(inbox, taken);
  return atomic_load(&slot->turn) == taken + 1 ? slot : NULL;
}

void sl_inbox_drop(sl_inbox *inbox, uint32_t taken) {
  atomic_store(&sl_inbox_at(inbox, taken)->turn, taken + SL_INBOX_SLOTS);
}
