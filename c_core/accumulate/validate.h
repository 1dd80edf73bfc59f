/* Checks of sl_accumulate_args that every entry point shares. */
#ifndef SL_ACCUMULATE_VALIDATE_H
#define SL_ACCUMULATE_VALIDATE_H

#include "accumulate/kernel.h"

/* Decides which fields of the args are read. */
typedef enum sl_accumulate_operation { SL_ACCUMULATE, SL_MEASURE, SL_READ } sl_accumulate_operation;

sl_status sl_accumulate_validate_count(int64_t count);
sl_status sl_accumulate_validate(const sl_accumulate_args *args, sl_accumulate_operation operation);

#endif
