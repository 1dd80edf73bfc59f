/* One copy by the kernel from one process's pages to another's (process_vm_readv), and plain copies to outputs. */
#define _GNU_SOURCE
#include "comm/memory.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "comm/reduce.h"

bool sl_comm_try_reading(const sl_comm *comm, int rank) {
  uint64_t nonce[2];
  struct iovec to = {nonce, sizeof nonce}, from = {(void *)(uintptr_t)comm->member[rank].probe, sizeof nonce};
  return process_vm_readv(comm->member[rank].process, &to, 1, &from, 1, 0) == (ssize_t)sizeof nonce &&
         !memcmp(nonce, comm->header->nonce, sizeof nonce);
}

void sl_comm_copy_output(const sl_comm *comm, void *to, const void *from, size_t bytes, size_t whole) {
  if (whole >= comm->tuning.streaming)
    sl_copy_streaming(to, from, bytes);
  else if (bytes)
    memcpy(to, from, bytes);
}

sl_status sl_comm_read_memory(sl_comm *comm, int rank, void *to, uint64_t address, size_t bytes, const char *call) {
  int process = comm->member[rank].process;
  if (process == (int)getpid()) {
    sl_comm_copy_output(comm, to, (const void *)(uintptr_t)address, bytes, bytes);
    return SL_OK;
  }
  for (size_t done = 0; done < bytes;) {
    struct iovec local = {(char *)to + done, bytes - done},
                 remote = {(void *)(uintptr_t)(address + done), bytes - done};
    ssize_t got = process_vm_readv(process, &local, 1, &remote, 1, 0);
    if (got > 0) {
      done += (size_t)got;
      continue;
    }
    char name[64];
    if (got < 0 && errno == ESRCH) /* its locks may outlive its memory a little */
      return sl_comm_break(comm, SL_PEER_LOST, "%s has ended; it was awaited for %s",
                           sl_comm_name_rank(comm, rank, name), call);
    return sl_comm_break(comm, SL_PEER_LOST, "reading the memory of %s failed in %s: %s",
                         sl_comm_name_rank(comm, rank, name), call, got ? strerror(errno) : "nothing was read");
  }
  return SL_OK;
}
