/* Checks of what the planner is given. */
#ifndef SL_PLAN_VALIDATE_H
#define SL_PLAN_VALIDATE_H

#include <sluice/plan.h>

sl_status sl_plan_validate(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout);

#endif
