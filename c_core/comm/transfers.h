/* The transfers of one communicator: what was begun here, and what has arrived. */
#ifndef SL_COMM_TRANSFERS_H
#define SL_COMM_TRANSFERS_H

#include "comm/group.h"

sl_status sl_transfers_make(sl_comm *comm);

/* Frees what has arrived and was never received. */
void sl_transfers_free(sl_comm *comm);

#endif
