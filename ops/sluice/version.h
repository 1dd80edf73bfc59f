/* The version of the contract. */
#ifndef SLUICE_VERSION_H
#define SLUICE_VERSION_H

#include <sluice/status.h>

#define SL_VERSION_STRING "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library that was loaded; compare with SL_VERSION_STRING, that of the header. */
SL_API const char *sl_version(void);

#ifdef __cplusplus
}
#endif
#endif
