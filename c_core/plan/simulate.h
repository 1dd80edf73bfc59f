/* Checks of sl_simulate_args, and how many events they lead to. */
#ifndef SL_PLAN_SIMULATE_H
#define SL_PLAN_SIMULATE_H

#include <sluice/schedule.h>

sl_status sl_simulate_validate(const sl_simulate_args *args, const sl_simulate_result *result);

/* Checks only what the sizes depend on. */
sl_status sl_simulate_validate_schedule(const sl_simulate_args *args);

/* Work, messages and reductions. */
int64_t sl_simulate_count_events(const sl_simulate_args *args);

/* Bytes of workspace; 0 where that doesn't fit into size_t. */
size_t sl_simulate_workspace(const sl_simulate_args *args);

#endif
