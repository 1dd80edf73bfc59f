/* Shared memory without a name: a memfd of rank 0's, which the others open through /proc. Its size is sealed, so that
 * nobody can cut it short under a reader; the handle has a random number that stands in the memory too. */
#define _GNU_SOURCE
#include "comm/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/inbox.h"
#include "runtime/status.h"

struct sl_segment {
  sl_header *header;
  size_t bytes;
  int file;
  int users; /* ranks of this process */
  sl_segment *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sl_segment *segments; /* all of this process */

/* Locks of single bytes behind the end of the file mark the living: the kernel drops them with the process, however it
 * ends, and a forked child does not inherit them. */
static const int64_t presence_offset = (int64_t)1 << 40;

sl_header *sl_segment_header(sl_segment *segment) { return segment->header; }

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

static sl_status add_segment(int file, size_t bytes, sl_segment **segment) {
  sl_segment *new = calloc(1, sizeof *new);
  SL_REQUIRE(new, SL_OUT_OF_MEMORY, "no memory for the record of a group");
  void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) {
    int error = errno;
    free(new);
    return sl_fail(SL_OUT_OF_MEMORY, "mapping %zu bytes of shared memory failed: %s", bytes, strerror(error));
  }
  *new = (sl_segment){memory, bytes, file, 1, segments};
  segments = *segment = new;
  return SL_OK;
}

sl_status sl_segment_create(int size, size_t buffer_bytes, sl_segment **segment, char handle[SL_COMM_TEXT]) {
  uint64_t nonce[2];
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t slot = round_up(buffer_bytes / 2, page);
  size_t slots = round_up(sizeof(sl_header) + (size_t)size * sizeof(sl_member), page);
  size_t inboxes = slots + (size_t)size * 2 * slot;
  size_t bytes = inboxes + (size_t)size * SL_INBOX_BYTES;
  SL_REQUIRE(getrandom(nonce, sizeof nonce, 0) == sizeof nonce, SL_INTERNAL, "getrandom failed: %s", strerror(errno));
  int file = memfd_create("sluice", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  SL_REQUIRE(file >= 0, SL_INTERNAL, "memfd_create failed: %s", strerror(errno));
  if (fchmod(file, S_IRUSR | S_IWUSR) || ftruncate(file, (off_t)bytes) ||
      fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
    int error = errno;
    close(file);
    return sl_fail(SL_OUT_OF_MEMORY, "%zu bytes of shared memory for a group of %d could not be had: %s", bytes, size,
                   strerror(error));
  }
  pthread_mutex_lock(&lock);
  sl_status status = add_segment(file, bytes, segment);
  if (status == SL_OK) {
    sl_header *header = (*segment)->header;
    memcpy(header->magic, SL_COMM_MAGIC, sizeof header->magic);
    header->size = (uint32_t)size;
    header->member_bytes = sizeof(sl_member);
    memcpy(header->nonce, nonce, sizeof nonce);
    header->bytes = bytes;
    header->slot_bytes = slot;
    header->slots = slots;
    header->inboxes = inboxes;
    for (int i = 0; i < size; ++i) sl_inbox_clear((sl_inbox *)((char *)header + inboxes + (size_t)i * SL_INBOX_BYTES));
    snprintf(handle, SL_COMM_TEXT, "memfd:%d:%d:%016" PRIx64 "%016" PRIx64, (int)getpid(), file, nonce[0], nonce[1]);
  } else {
    close(file);
  }
  pthread_mutex_unlock(&lock);
  return status;
}

static sl_segment *find_segment(const uint64_t nonce[2]) {
  for (sl_segment *each = segments; each; each = each->next) {
    if (!memcmp(each->header->nonce, nonce, sizeof each->header->nonce)) return each;
  }
  return NULL;
}

/* What a file must be before its content is looked at. */
static sl_status check_file(int file, const char *handle) {
  struct stat facts;
  SL_REQUIRE(!fstat(file, &facts), SL_UNSUPPORTED, "handle %s: fstat failed: %s", handle, strerror(errno));
  SL_REQUIRE(S_ISREG(facts.st_mode) && facts.st_uid == geteuid() && !(facts.st_mode & (S_IRWXG | S_IRWXO)),
             SL_UNSUPPORTED, "handle %s names a file of user %d with mode %o, expected one of user %d with mode 600",
             handle, (int)facts.st_uid, (unsigned)(facts.st_mode & 07777), (int)geteuid());
  int seals = fcntl(file, F_GET_SEALS);
  SL_REQUIRE(seals >= 0 && (seals & F_SEAL_SHRINK), SL_UNSUPPORTED,
             "handle %s names a file whose size can change, expected a sealed one", handle);
  SL_REQUIRE(facts.st_size >= (off_t)sizeof(sl_header), SL_UNSUPPORTED, "handle %s names a file of %lld bytes", handle,
             (long long)facts.st_size);
  return SL_OK;
}

/* What the memory must say before it is trusted. */
static sl_status check_header(const sl_header *header, size_t bytes, int size, const uint64_t nonce[2],
                              const char *handle) {
  SL_REQUIRE(!memcmp(header->magic, SL_COMM_MAGIC, sizeof header->magic) &&
                 !memcmp(header->nonce, nonce, sizeof header->nonce),
             SL_UNSUPPORTED, "handle %s names memory that is not of that group", handle);
  SL_REQUIRE(header->member_bytes == sizeof(sl_member), SL_UNSUPPORTED,
             "handle %s names memory of another version of this library", handle);
  SL_REQUIRE(header->size == (uint32_t)size, SL_INVALID_ARGUMENT,
             "options.size is %d, but the group of handle %s was made for %u", size, handle, header->size);
  SL_REQUIRE(header->bytes == bytes && header->slots <= bytes && header->slot_bytes <= bytes &&
                 header->slots >= sizeof *header + (size_t)size * sizeof(sl_member) && header->inboxes <= bytes &&
                 (header->inboxes - header->slots) / 2 / (size_t)size == header->slot_bytes &&
                 bytes - header->inboxes == (size_t)size * SL_INBOX_BYTES &&
                 header->tuning.piece >= SL_COMM_SMALLEST_PIECE && header->tuning.piece <= header->slot_bytes &&
                 header->tuning.flat <= header->tuning.piece,
             SL_UNSUPPORTED, "handle %s names memory whose sizes contradict each other", handle);
  return SL_OK;
}

static sl_status open_file(const char *handle, int *file, uint64_t nonce[2]) {
  int process, number, length = 0;
  SL_REQUIRE(sscanf(handle, "memfd:%d:%d:%16" SCNx64 "%16" SCNx64 "%n", &process, &number, &nonce[0], &nonce[1],
                    &length) == 4 &&
                 process > 0 && number >= 0 && !handle[length],
             SL_INVALID_ARGUMENT, "handle is \"%.100s\", expected what sl_comm_create() wrote", handle);
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", process, number);
  *file = open(path, O_RDWR | O_CLOEXEC);
  SL_REQUIRE(*file >= 0, SL_UNSUPPORTED, "the group's memory %s can't be opened: %s", path, strerror(errno));
  return SL_OK;
}

sl_status sl_segment_open(const char *handle, int size, sl_segment **segment) {
  int file = -1;
  uint64_t nonce[2];
  /* Closing a file drops this process's marks on it, whichever descriptor it was, so a known one is not opened
   * again. */
  unsigned long long words[2];
  const char *digits = strrchr(handle, ':');
  pthread_mutex_lock(&lock);
  sl_status status = SL_OK;
  if (digits && sscanf(digits + 1, "%16llx%16llx", &words[0], &words[1]) == 2) {
    nonce[0] = words[0], nonce[1] = words[1];
    sl_segment *known = find_segment(nonce);
    if (known) {
      status = check_header(known->header, known->bytes, size, nonce, handle);
      if (status == SL_OK) known->users += 1, *segment = known;
      pthread_mutex_unlock(&lock);
      return status;
    }
  }
  status = open_file(handle, &file, nonce);
  if (status == SL_OK) status = check_file(file, handle);
  struct stat facts;
  if (status == SL_OK && fstat(file, &facts))
    status = sl_fail(SL_UNSUPPORTED, "handle %s: fstat failed: %s", handle, strerror(errno));
  if (status == SL_OK) status = add_segment(file, (size_t)facts.st_size, segment);
  if (status == SL_OK) {
    sl_segment *new = *segment;
    file = -1;
    status = check_header(new->header, new->bytes, size, nonce, handle);
    if (status != SL_OK) {
      segments = new->next;
      munmap(new->header, new->bytes);
      close(new->file);
      free(new);
    }
  }
  if (file >= 0) close(file);
  pthread_mutex_unlock(&lock);
  return status;
}

void sl_segment_close(sl_segment *segment) {
  pthread_mutex_lock(&lock);
  if (--segment->users == 0) {
    sl_segment **link = &segments;
    while (*link != segment) link = &(*link)->next;
    *link = segment->next;
    munmap(segment->header, segment->bytes);
    close(segment->file);
    free(segment);
  }
  pthread_mutex_unlock(&lock);
}

static struct flock presence_of(int rank) {
  struct flock mark = {0};
  mark.l_type = F_WRLCK;
  mark.l_whence = SEEK_SET;
  mark.l_start = presence_offset + rank;
  mark.l_len = 1;
  return mark;
}

sl_status sl_segment_mark_presence(sl_segment *segment, int rank) {
  struct flock mark = presence_of(rank);
  SL_REQUIRE(!fcntl(segment->file, F_SETLK, &mark), SL_INVALID_ARGUMENT,
             "options.rank is %d, which another process has taken (%s)", rank, strerror(errno));
  return SL_OK;
}

bool sl_segment_is_present(sl_segment *segment, int rank) {
  if (segment->header->member[rank].process == (int32_t)getpid()) return true;
  struct flock mark = presence_of(rank);
  return fcntl(segment->file, F_GETLK, &mark) || mark.l_type != F_UNLCK;
}
