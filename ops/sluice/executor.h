/* The executor: how a caller lends its threads. Sluice starts no threads of its own for compute. */
#ifndef SLUICE_EXECUTOR_H
#define SLUICE_EXECUTOR_H

#include <stdint.h>

#include <sluice/status.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Work on the half-open range [begin, end). Must not throw and must not call back into the executor. */
typedef void (*sl_range_function)(void *context, int64_t begin, int64_t end);

typedef struct sl_executor {
  /* Cuts [0, count) into disjoint ranges that cover it, runs function on each, possibly at the same time,
   * and returns when all are done. self is the field below. */
  void (*parallel_for)(void *self, int64_t count, sl_range_function function, void *context);
  void *self;
  int32_t threads; /* how many ranges may run at the same time; at least 1 */
} sl_executor;

/* Runs everything on the calling thread. What a NULL executor means everywhere. */
SL_API const sl_executor *sl_serial_executor(void);

#ifdef __cplusplus
}
#endif
#endif
