/* What a rank's memory holds in a step. */
#ifndef SL_PLAN_MEMORY_H
#define SL_PLAN_MEMORY_H

#include <sluice/plan.h>

/* Parameters on one GPU of a stage. */
double sl_plan_stage_parameters(const sl_plan_model *model, const sl_plan_layout *layout, int64_t stage);

/* Fills the sizes of the estimate: those of the stage that needs most. */
void sl_plan_memory(const sl_plan_model *model, const sl_plan_layout *layout, int64_t micro_batches,
                    sl_plan_estimate *estimate);

#endif
