/* Cuts the caller's workspace into aligned pieces. The same calls on an empty arena measure what is needed. */
#ifndef SL_RUNTIME_ARENA_H
#define SL_RUNTIME_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SL_ARENA_ALIGNMENT = 64 };

typedef struct sl_arena {
  char *base; /* NULL while measuring */
  size_t capacity;
  size_t used;   /* what has been asked for; may exceed capacity */
  bool overflow; /* the total does not fit into size_t */
} sl_arena;

static inline sl_arena sl_arena_make(void *base, size_t capacity) {
  sl_arena arena = {(char *)base, capacity, 0, false};
  return arena;
}

/* count * size bytes, 64-byte aligned; NULL while measuring or when the arena is too small. */
static inline void *sl_arena_take(sl_arena *arena, int64_t count, size_t size) {
  size_t bytes, end;
  size_t start = arena->used;
  if (__builtin_mul_overflow((size_t)count, size, &bytes) ||
      __builtin_add_overflow(bytes, (size_t)(SL_ARENA_ALIGNMENT - 1), &bytes)) {
    arena->overflow = true;
    return NULL;
  }
  bytes &= ~(size_t)(SL_ARENA_ALIGNMENT - 1);
  if (__builtin_add_overflow(start, bytes, &end)) {
    arena->overflow = true;
    return NULL;
  }
  arena->used = end;
  return arena->base && end <= arena->capacity ? arena->base + start : NULL;
}

#endif
