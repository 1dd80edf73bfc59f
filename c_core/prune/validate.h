/* Checks of sl_channel_norms_args. */
#ifndef SL_PRUNE_VALIDATE_H
#define SL_PRUNE_VALIDATE_H

#include <sluice/prune.h>

sl_status sl_channel_norms_validate(const sl_channel_norms_args *args);

#endif
