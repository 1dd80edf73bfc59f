/* Shared memory without a name: a memfd of rank 0's, which the others open through /proc. Its size is sealed, so that
 * nobody can cut it short under a reader; the handle has a random number that stands in the memory too. */
#define _GNU_SOURCE
#include "comm/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
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

static void free_segment(sl_segment *segment) {
  munmap(segment->header, segment->bytes);
  close(segment->file);
  free(segment);
}

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
static sl_status check_file(int file, const char *handle, size_t *bytes) {
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
  *bytes = (size_t)facts.st_size;
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

typedef struct file_location {
  long process, file;
  uint64_t nonce[2];
} file_location;

static sl_status parse_handle(const char *handle, file_location *location) {
  static const char prefix[] = "memfd:";
  char *end = NULL, digits[17] = {0};
  bool right = !strncmp(handle, prefix, sizeof prefix - 1);
  if (right) location->process = strtol(handle + sizeof prefix - 1, &end, 10);
  right = right && *end == ':' && location->process > 0 && location->process <= INT_MAX;
  if (right) location->file = strtol(end + 1, &end, 10);
  right = right && *end == ':' && location->file >= 0 && location->file <= INT_MAX;
  right = right && strlen(end + 1) == 32 && strspn(end + 1, "0123456789abcdef") == 32;
  SL_REQUIRE(right, SL_INVALID_ARGUMENT, "handle is \"%.100s\", expected what sl_comm_create() wrote", handle);
  memcpy(digits, end + 1, 16);
  location->nonce[0] = strtoull(digits, NULL, 16);
  location->nonce[1] = strtoull(end + 17, NULL, 16);
  return SL_OK;
}

static sl_status open_file(const file_location *location, int *file) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%ld/fd/%ld", location->process, location->file);
  *file = open(path, O_RDWR | O_CLOEXEC);
  SL_REQUIRE(*file >= 0, SL_UNSUPPORTED, "the group's memory %s can't be opened: %s", path, strerror(errno));
  return SL_OK;
}

/* Maps the file, or takes the segment that this process has of it: closing a file drops this process's marks on it,
 * whichever descriptor it was, so a known one is not opened again. The lock is held. */
static sl_status map_file(const file_location *location, const char *handle, int size, sl_segment **segment) {
  sl_segment *known = find_segment(location->nonce);
  if (known) {
    SL_CHECK(check_header(known->header, known->bytes, size, location->nonce, handle));
    known->users += 1;
    *segment = known;
    return SL_OK;
  }
  int file = -1;
  size_t bytes = 0;
  SL_CHECK(open_file(location, &file));
  sl_status status = check_file(file, handle, &bytes);
  if (status == SL_OK) status = add_segment(file, bytes, segment);
  if (status != SL_OK) {
    close(file);
    return status;
  }
  sl_segment *new = *segment;
  status = check_header(new->header, new->bytes, size, location->nonce, handle);
  if (status != SL_OK) {
    segments = new->next;
    free_segment(new);
  }
  return status;
}

sl_status sl_segment_open(const char *handle, int size, sl_segment **segment) {
  file_location location = {0};
  SL_CHECK(parse_handle(handle, &location));
  pthread_mutex_lock(&lock);
  sl_status status = map_file(&location, handle, size, segment);
  pthread_mutex_unlock(&lock);
  return status;
}

void sl_segment_close(sl_segment *segment) {
  pthread_mutex_lock(&lock);
  if (--segment->users == 0) {
    sl_segment **link = &segments;
    while (*link != segment) link = &(*link)->next;
    *link = segment->next;
    free_segment(segment);
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
