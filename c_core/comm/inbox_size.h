/* How much an inbox holds; apart from inbox.h because the tests, in C++, want to know the borders. */
#ifndef SL_COMM_INBOX_SIZE_H
#define SL_COMM_INBOX_SIZE_H

enum {
  SL_INBOX_SLOTS = 64,
  SL_INBOX_SLOT_BYTES = 16 << 10,
  SL_INBOX_CONTENT = SL_INBOX_SLOT_BYTES - 64 /* what a message can carry beside itself */
};

#endif
