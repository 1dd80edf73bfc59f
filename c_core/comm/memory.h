/* Copies to outputs, and reading another rank's memory, where the system allows it (sl_comm.reads_memory). */
#ifndef SL_COMM_MEMORY_H
#define SL_COMM_MEMORY_H

#include "comm/group.h"

/* Whether it works, by trying. */
bool sl_comm_try_reading(const sl_comm *comm, int rank);

/* call: what the reading is for, for the error that breaks the group if the other process has gone. */
sl_status sl_comm_read_memory(sl_comm *comm, int rank, void *to, uint64_t address, size_t bytes, const char *call);

/* To an output; whole: its bytes, or those of the message that these are a part of. Large ones are written past the
 * caches. */
void sl_comm_copy_output(const sl_comm *comm, void *to, const void *from, size_t bytes, size_t whole);

#endif
