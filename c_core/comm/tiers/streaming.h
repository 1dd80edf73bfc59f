/* memcpy with stores that bypass the caches, for the x86 tiers to include. A plain store first reads the line it goes
 * to, and leaves it in this processor's cache; where another processor is the next to read it, both are wasted. */
#ifndef SL_COMM_STREAMING_H
#define SL_COMM_STREAMING_H

#include <stdint.h>
#include <string.h>

#include "runtime/tiers/simd.h"

static void copy_streaming(void *out, const void *in, size_t bytes) {
  enum { LINE = 64 };
  char *to = out;
  const char *from = in;
  size_t head = (0 - (uintptr_t)to) % LINE;
  if (head > bytes) head = bytes;
  memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  for (; bytes >= LINE; bytes -= LINE, to += LINE, from += LINE) {
    __m256i low = _mm256_loadu_si256((const __m256i *)from), high = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, low);
    _mm256_stream_si256((__m256i *)(to + 32), high);
  }
  memcpy(to, from, bytes);
  _mm_sfence(); /* these stores are not ordered with others on their own */
}

#endif
