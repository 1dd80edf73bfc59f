/* What lies in a group's shared memory: a header, a record for each rank, then each rank's buffers. Every rank maps it,
 * writes its own record and buffers, and reads the others'. Numbers that count on and on wrap around. */
#ifndef SL_COMM_LAYOUT_H
#define SL_COMM_LAYOUT_H

#include <stdatomic.h>
#include <stdint.h>

#include <sluice/comm.h>

#define SL_COMM_MAGIC "sluice-1"

enum {
  SL_COMM_LINE = 64,                /* bytes that processors pass around as one */
  SL_COMM_FAULT_TEXT = 512,         /* bytes of the text of an error that broke the group */
  SL_COMM_PROCESSORS = 1024,        /* that are told apart */
  SL_COMM_SMALLEST_PIECE = 16 << 10 /* bytes that a rank puts into its buffer at a time, at least */
};

/* A call as a rank made it; ranks compare theirs. */
typedef struct sl_signature {
  uint64_t bytes; /* of this rank's input */
  double factor;
  uint32_t call; /* how many calls the rank had made on the group before */
  int16_t root;  /* -1: none */
  uint8_t kind;  /* sl_call_kind */
  uint8_t dtype : 4, op : 4;
} sl_signature;

/* Why the group is broken: written once, by the rank that noticed. */
typedef struct sl_fault {
  atomic_uint state; /* 0: not broken, 1: being written, 2: readable */
  int32_t status;
  char text[SL_COMM_FAULT_TEXT];
} sl_fault;

typedef enum sl_member_state { SL_MEMBER_ABSENT = 0, SL_MEMBER_PRESENT = 1, SL_MEMBER_LEFT = 2 } sl_member_state;

/* One rank's record. What others write, or sleep on, has lines of its own. */
typedef struct sl_member {
  _Alignas(SL_COMM_LINE) atomic_uint state; /* sl_member_state */
  int32_t process;
  uint64_t probe;        /* address, in that process, of a copy of the nonce: read to find out whether one may */
  atomic_uint reads_all; /* 1: reading another rank's memory works here */
  uint64_t processors[SL_COMM_PROCESSORS / 64]; /* a bit for each that this rank may run on */
  _Alignas(SL_COMM_LINE) atomic_uint step;      /* the last one arrived at */
  atomic_uint step_sleepers;
  atomic_int processor;      /* where the rank was running when it last arrived */
  sl_signature signature[2]; /* of the last two calls: whoever sees the step has them too, all are one line */
  _Alignas(SL_COMM_LINE) atomic_uint events; /* see sl_comm_events() */
  atomic_uint event_sleepers;
} sl_member;

typedef struct sl_header {
  char magic[8];
  uint32_t size;
  uint32_t member_bytes; /* sizeof(sl_member): another build of the library has another */
  uint64_t nonce[2];
  uint64_t bytes;      /* of the whole */
  uint64_t slot_bytes; /* each rank has two slots */
  uint64_t slots;      /* where they begin: [size][2][slot_bytes] */
  uint64_t inboxes;    /* where they begin: [size][SL_INBOX_BYTES] */
  sl_comm_tuning tuning;
  _Alignas(SL_COMM_LINE) atomic_uint arrivals; /* at all steps by all ranks together */
  _Alignas(SL_COMM_LINE) atomic_uint phase;    /* the last step at which all have arrived */
  atomic_uint phase_sleepers;
  _Alignas(SL_COMM_LINE) sl_fault fault;
  _Alignas(SL_COMM_LINE) sl_member member[];
} sl_header;

_Static_assert(sizeof(sl_signature) == 24 && SL_COMM_MAX_SIZE < INT16_MAX, "a step and two signatures fill a line");

#endif
