/* Status names and the thread-local text of the last failure. */
#include "runtime/status.h"

#include <stdarg.h>
#include <stdio.h>

#include <sluice/types.h>
#include <sluice/version.h>

enum { MESSAGE_CAPACITY = 512 };

static _Thread_local char last_error[MESSAGE_CAPACITY];

const char *sl_last_error(void) { return last_error; }

sl_status sl_fail(sl_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

const char *sl_status_name(sl_status status) {
  switch (status) {
    case SL_OK: return "ok";
    case SL_INVALID_ARGUMENT: return "invalid argument";
    case SL_OUT_OF_RANGE: return "out of range";
    case SL_OUT_OF_MEMORY: return "out of memory";
    case SL_UNSUPPORTED: return "unsupported";
    case SL_INTERNAL: return "internal error";
    case SL_PEER_LOST: return "peer lost";
    case SL_TIMEOUT: return "timeout";
    case SL_MISMATCH: return "mismatch";
  }
  return "unknown status";
}

size_t sl_dtype_size(sl_dtype dtype) {
  switch (dtype) {
    case SL_F32: return 4;
    case SL_BF16: return 2;
    case SL_F16: return 2;
    case SL_F64: return 8;
    case SL_I8: return 1;
    case SL_U8: return 1;
    case SL_I16: return 2;
    case SL_I32: return 4;
    case SL_I64: return 8;
    case SL_BOOL: return 1;
  }
  return 0;
}

const char *sl_dtype_name(sl_dtype dtype) {
  switch (dtype) {
    case SL_F32: return "float32";
    case SL_BF16: return "bfloat16";
    case SL_F16: return "float16";
    case SL_F64: return "float64";
    case SL_I8: return "int8";
    case SL_U8: return "uint8";
    case SL_I16: return "int16";
    case SL_I32: return "int32";
    case SL_I64: return "int64";
    case SL_BOOL: return "bool";
  }
  return "unknown dtype";
}

const char *sl_version(void) { return SL_VERSION_STRING; }
