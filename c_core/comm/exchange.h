/* Moving bytes between ranks: what broadcast, scatter, gather, all_gather and all_to_all have in common. */
#ifndef SL_COMM_EXCHANGE_H
#define SL_COMM_EXCHANGE_H

#include "comm/group.h"

/* One rank's part. For the own rank, in is copied to out. */
typedef struct sl_exchange {
  int from;               /* the only rank that gives; -1: all do */
  int to;                 /* the only rank that takes; -1: all do */
  bool same;              /* whoever gives, gives in[0] to everybody */
  const void *const *in;  /* [size], or [1] if same; read if this rank gives */
  const size_t *in_bytes; /* likewise */
  void *const *out;       /* [size]; read if this rank takes; from a rank that does not give nothing is taken */
  const size_t *out_bytes;
} sl_exchange;

sl_status sl_exchange_run(sl_comm *comm, const sl_exchange *exchange, sl_call_kind kind, int64_t timeout);

#endif
