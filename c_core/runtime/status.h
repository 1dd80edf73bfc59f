/* How C core code reports a failure: return sl_fail(code, text), or the two macros below. */
#ifndef SL_RUNTIME_STATUS_H
#define SL_RUNTIME_STATUS_H

#include <sluice/status.h>

/* Records the text for sl_last_error() and returns status. */
sl_status sl_fail(sl_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Returns from the calling function with the given failure unless the condition holds. */
#define SL_REQUIRE(condition, status, ...)                 \
  do {                                                     \
    if (!(condition)) return sl_fail(status, __VA_ARGS__); \
  } while (0)

/* Passes a failure on to the caller. */
#define SL_CHECK(expression)                                \
  do {                                                      \
    sl_status sl_check_status_ = (expression);              \
    if (sl_check_status_ != SL_OK) return sl_check_status_; \
  } while (0)

#endif
