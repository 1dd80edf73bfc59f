/* Checks of the arguments of ops/sluice/balance.h. */
#ifndef SL_PLAN_BALANCE_H
#define SL_PLAN_BALANCE_H

#include <sluice/balance.h>

sl_status sl_cut_validate(const sl_cut_args *args, const sl_cut_result *result);

/* Checks only what the workspace depends on. */
sl_status sl_cut_validate_sizes(const sl_cut_args *args);

sl_status sl_share_validate(const sl_share_args *args, const double *max_s);

#endif
