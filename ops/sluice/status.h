/* Status codes and error text: the one way in which every Sluice function reports a failure. */
#ifndef SLUICE_STATUS_H
#define SLUICE_STATUS_H

#if defined(__GNUC__)
#define SL_API __attribute__((visibility("default")))
#else
#define SL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Every public function returns one of these; SL_OK is 0. */
typedef enum sl_status {
  SL_OK = 0,
  SL_INVALID_ARGUMENT = 1, /* an argument has a value, shape or dtype that is not allowed */
  SL_OUT_OF_RANGE = 2,     /* a size or an index exceeds what can be represented or addressed */
  SL_OUT_OF_MEMORY = 3,    /* the workspace that was handed in is too small, or the system has no memory left */
  SL_UNSUPPORTED = 4,      /* the request is well formed, but this build or this machine cannot serve it */
  SL_INTERNAL = 5,         /* a device or system call failed; the message names it */
  SL_PEER_LOST = 6,        /* another rank's process has ended or left the group: see comm.h */
  SL_TIMEOUT = 7,          /* another rank did not come in time */
  SL_MISMATCH = 8,         /* ranks of a group disagree on what they are doing */
} sl_status;

/* Text of the last failure on the calling thread: names the argument, its value and what was expected.
 * Valid until the next failing call on this thread. Empty before the first failure. Never NULL. */
SL_API const char *sl_last_error(void);

/* "ok", "invalid argument", ...; never NULL, also for values outside the enum. */
SL_API const char *sl_status_name(sl_status status);

#ifdef __cplusplus
}
#endif
#endif
